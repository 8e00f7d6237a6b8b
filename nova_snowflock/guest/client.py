# SPDX-License-Identifier: Apache-2.0
"""SnowFlock's API for the programs in a guest: they fork the machine that they run on.

Each call has a connection of its own to the agent. It is opened before the fork and goes on to work
in each clone: its other end is the agent in the same guest, and was cloned with it. Calls wait as
long as it takes, and any of them may fail with a :class:`SnowFlockError`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping
import contextlib
import json
import os
import socket
import time
from typing import Any, NamedTuple, NoReturn, TypeVar

from nova_snowflock.guest import protocol

SOCKET = "/run/snowflock/guest.sock"
"""Where the agent listens, unless the environment's ``SNOWFLOCK_SOCKET`` says otherwise."""

_T = TypeVar("_T")


class SnowFlockError(Exception):
    """A call failed. The message is the agent's or the host's."""

    kind = ""
    """As docs/guest.rst lists them; empty if it is none of those."""


class Refused(SnowFlockError):
    """It is not allowed: by the owner, by quota, by what the server is."""

    kind = "refused"


class Invalid(SnowFlockError):
    """The call, an argument or a ticket is wrong."""

    kind = "invalid"


class Failed(SnowFlockError):
    """It was tried and did not work. It may be tried again."""

    kind = "failed"


class Busy(SnowFlockError):
    """There are too many requests at a time."""

    kind = "busy"


class Forked(SnowFlockError):
    """The guest was forked meanwhile, and this is a clone: its parent had asked."""

    kind = "forked"


class Offline(SnowFlockError):
    """This guest's host knows nothing of forks."""

    kind = "offline"


class NoAgent(SnowFlockError):
    """The agent cannot be reached, or went away; what it was asked may have been done."""


_KINDS: dict[str, type[SnowFlockError]] = {
    error.kind: error for error in (Refused, Invalid, Failed, Busy, Forked, Offline)
}


class Ticket(NamedTuple):
    """Permission to be cloned once, ``n`` times at a time."""

    id: str
    n: int


class Checkpoint(NamedTuple):
    """This machine as it was: ``clone_id`` is 0 in the parent, and 1.. in clones made of it."""

    id: str
    clone_id: int


class Fork(NamedTuple):
    """What :func:`fork` made: ``clone_id`` is 0 in the parent, and 1.. in the clones."""

    clone_id: int
    ticket: Ticket


class Joined(NamedTuple):
    """A clone that has ended: ``status`` is what it gave to :func:`exit`, None if it did not.

    ``error`` is None, or a sentence that says why there is no status.
    """

    clone_id: int
    status: int | None
    error: str | None
    result: bytes


class HeldTicket(NamedTuple):
    """A ticket of this server; ``state`` is ``granted``, ``cloning`` or ``cloned``."""

    ticket: Ticket
    state: str


class Info(NamedTuple):
    """What this server is; ``fork``, ``parent`` and ``params`` are a clone's.

    ``limit`` is how many clones it may have at a time.
    """

    server: str
    clone_id: int
    fork: str | None
    parent: str | None
    params: dict[str, str]
    limit: int
    tickets: tuple[HeldTicket, ...]


def request_ticket(n: int) -> Ticket:
    """Ask for up to ``n`` clones. The ticket says how many are granted: at least one."""
    return _call(
        "request_ticket", lambda result: Ticket(str(result["ticket"]), int(result["n"])), n=n
    )


def clone(ticket: Ticket | str, params: Mapping[str, str] | None = None) -> int:
    """Fork this machine. Returns 0 in the parent, and 1..n in the clones.

    :param params: what the clones' agents and hooks are told
    """
    arguments = {"ticket": _ticket(ticket), **_params(params)}
    return _call("clone", lambda result: int(result["clone_id"]), **arguments)


def checkpoint_parent(params: Mapping[str, str] | None = None) -> Checkpoint:
    """Keep this machine as it is now. Clones made of it later return from here as well."""
    return _call(
        "checkpoint_parent",
        lambda result: Checkpoint(str(result["checkpoint"]), int(result["clone_id"])),
        **_params(params),
    )


def create_clones(checkpoint: Checkpoint | str, ticket: Ticket | str) -> None:
    """Make clones of a checkpoint. They return from :func:`checkpoint_parent`."""
    identifier = checkpoint.id if isinstance(checkpoint, Checkpoint) else checkpoint
    _call("create_clones", _nothing, checkpoint=identifier, ticket=_ticket(ticket))


def exit(status: int = 0, result: bytes = b"") -> NoReturn:
    """End this clone, and leave its parent a status (0..255) and a result. Does not return.

    :raises Refused: this is no clone, or the result is larger than its host takes
    """
    with _Connection() as connection:
        for offset in range(0, len(result), protocol.MAX_PIECE):
            piece = base64.b64encode(result[offset : offset + protocol.MAX_PIECE]).decode()
            connection.ask("put", {"offset": offset, "data": piece})
        connection.ask("exit", {"status": status})
    while True:  # until the host stops this machine
        time.sleep(3600)


def join(ticket: Ticket | str) -> list[Joined]:
    """Wait until all clones of a ticket have ended; what they leave, by ``clone_id``."""
    return _call("join", _joined, ticket=_ticket(ticket))


def kill(ticket: Ticket | str) -> None:
    """Stop all clones of a ticket."""
    _call("kill", _nothing, ticket=_ticket(ticket))


def release(checkpoint: Checkpoint | str) -> None:
    """Keep a checkpoint no longer. Clones that have been made of it go on."""
    identifier = checkpoint.id if isinstance(checkpoint, Checkpoint) else checkpoint
    _call("release", _nothing, checkpoint=identifier)


def info() -> Info:
    """What this server is, and what it may do."""
    return _call("info", _info)


def fork(n: int = 1, params: Mapping[str, str] | None = None) -> Fork:
    """Ask for a ticket and use it: :func:`request_ticket` and :func:`clone` in one."""
    ticket = request_ticket(n)
    return Fork(clone(ticket, params), ticket)


class _Connection:
    def __init__(self) -> None:
        path = os.environ.get("SNOWFLOCK_SOCKET") or SOCKET
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(path)
        except OSError as error:
            self._socket.close()
            raise NoAgent(f"no agent listens on {path}: {error}") from error
        self._answers = self._socket.makefile("rb")

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._answers.close()
        self._socket.close()

    def ask(self, call: str, arguments: dict[str, Any]) -> dict[str, Any]:
        try:
            request = protocol.encode({"call": call, "arguments": arguments})
        except ValueError as error:
            raise Invalid(str(error)) from error
        try:
            # An agent that closes at once may have said why before.
            with contextlib.suppress(BrokenPipeError):
                self._socket.sendall(request)
            line = self._answers.readline()
        except OSError as error:
            raise NoAgent(f"the agent broke off: {error}") from error
        if not line.endswith(b"\n"):
            raise NoAgent("the agent broke off")
        return _result(line)


def _call(call: str, make: Callable[[dict[str, Any]], _T], **arguments: Any) -> _T:
    with _Connection() as connection:
        result = connection.ask(call, arguments)
    try:
        return make(result)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SnowFlockError(f"the agent's answer to {call} makes no sense: {error!r}") from error


def _result(line: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SnowFlockError(f"the agent's answer is not JSON: {error}") from error
    if isinstance(answer, dict):
        if isinstance(answer.get("error"), dict):
            kind = answer["error"].get("kind")
            known = _KINDS.get(kind, SnowFlockError) if isinstance(kind, str) else SnowFlockError
            raise known(str(answer["error"].get("message") or kind))
        if isinstance(answer.get("result"), dict):
            result: dict[str, Any] = answer["result"]
            return result
    raise SnowFlockError("the agent's answer has neither a result nor an error")


def _ticket(ticket: Ticket | str) -> str:
    return ticket.id if isinstance(ticket, Ticket) else ticket


def _params(params: Mapping[str, str] | None) -> dict[str, Any]:
    return {} if params is None else {"params": dict(params)}


def _nothing(result: dict[str, Any]) -> None:
    pass


def _joined(result: dict[str, Any]) -> list[Joined]:
    clones = [
        Joined(
            int(clone["clone_id"]),
            clone["status"],
            clone["error"],
            base64.b64decode(clone["result"], validate=True),
        )
        for clone in result["clones"]
    ]
    return sorted(clones, key=lambda clone: clone.clone_id)


def _info(result: dict[str, Any]) -> Info:
    return Info(
        str(result["server"]),
        int(result["clone_id"]),
        result["fork"],
        result["parent"],
        dict(result["params"] or {}),
        int(result["limit"]),
        tuple(
            HeldTicket(Ticket(str(ticket["ticket"]), int(ticket["n"])), str(ticket["state"]))
            for ticket in result["tickets"]
        ),
    )
