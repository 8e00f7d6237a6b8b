# SPDX-License-Identifier: Apache-2.0
"""The UNIX socket on which programs in the guest ask for forks."""

from __future__ import annotations

import contextlib
import grp
import json
import logging
import os
import select
import socket
import threading
import time
from typing import Any, Protocol

from nova_snowflock.guest import client
from nova_snowflock.guest import pending
from nova_snowflock.guest import protocol

LOG = logging.getLogger(__name__)

GROUP = "snowflock"
"""Who may ask, beside root."""

_CONNECTIONS = 128
_SEND_TIMEOUT = 60.0
_TRY_AGAIN = 0.2


class Asked(Protocol):
    """As :class:`nova_snowflock.guest.agent.Agent`."""

    def begin(self, call: str, arguments: dict[str, Any]) -> pending.Request: ...

    def forget(self, request: pending.Request) -> None: ...


class ProgramServer:
    """Answers from a thread for each connection."""

    def __init__(self, agent: Asked, path: str = client.SOCKET, group: str = GROUP) -> None:
        """
        :param path: of the socket, in a directory for it alone
        :param group: who may ask, beside root, if there is such a group
        :raises OSError: it cannot be listened on
        """
        self._agent = agent
        self._slots = threading.BoundedSemaphore(_CONNECTIONS)
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        if os.path.lexists(path):
            os.unlink(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        previous = os.umask(0o177)
        try:
            self._socket.bind(path)
        finally:
            os.umask(previous)
        try:
            os.chown(path, -1, grp.getgrnam(group).gr_gid)
        except KeyError:
            LOG.info("There is no group %s: only root may ask for forks", group)
        os.chmod(path, 0o660)
        self._socket.listen(_CONNECTIONS)

    def start(self) -> None:
        """Answer from now on."""
        threading.Thread(target=self._serve, name="programs", daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                self._accept()
            except (OSError, RuntimeError) as error:  # it is gone already, or there is no thread
                LOG.warning("A program's connection was not accepted: %s", error)
                time.sleep(_TRY_AGAIN)

    def _accept(self) -> None:
        connection, _ = self._socket.accept()
        with contextlib.ExitStack() as failed:
            failed.enter_context(connection)
            if not self._slots.acquire(blocking=False):
                LOG.warning("A program's connection was refused: there are %d", _CONNECTIONS)
                connection.setblocking(False)
                busy = _error("busy", f"{_CONNECTIONS} programs are connected already.")
                connection.send(_encode(busy))
                return
            failed.callback(self._slots.release)
            threading.Thread(target=self._answer, args=[connection], daemon=True).start()
            failed.pop_all()

    def _answer(self, connection: socket.socket) -> None:
        try:
            with connection:
                begun = bytearray()
                while True:
                    line = _receive(connection, begun)
                    if line is None:
                        return
                    reply = self._ask(connection, line)
                    if reply is None:
                        return
                    connection.settimeout(_SEND_TIMEOUT)
                    connection.sendall(_encode(reply))
                    connection.settimeout(None)
        except OSError as error:
            LOG.info("A program's connection broke off: %s", error)
        finally:
            self._slots.release()

    def _ask(self, connection: socket.socket, line: bytes) -> dict[str, Any] | None:
        """The reply; None if nobody waits for one any more."""
        try:
            call, arguments = _decode(line)
            request = self._agent.begin(call, arguments)
        except pending.Refusal as refusal:
            return _error(refusal.kind, str(refusal))
        try:
            poll = select.poll()
            poll.register(request, select.POLLIN)
            # Not whether it has more to say: only whether it has gone.
            poll.register(connection, 0)
            answered = any(fd == request.fileno() for fd, _ in poll.poll())
            return request.wait() if answered else None
        finally:
            self._agent.forget(request)


def _receive(connection: socket.socket, begun: bytearray) -> bytes | None:
    """The next line; an empty one if it is too long, None if there is none.

    :param begun: what has been received after the line before
    """
    skipping = False
    while True:
        line, end, rest = begun.partition(b"\n")
        skipping = skipping or len(line) >= protocol.MAX_LINE
        if end:
            begun[:] = rest
            return b"" if skipping else bytes(line)
        if skipping:
            begun.clear()
        data = connection.recv(65536)
        if not data:
            return None
        begun += data


def _decode(line: bytes) -> tuple[str, dict[str, Any]]:
    try:
        asked = json.loads(line)
    except (ValueError, RecursionError):
        asked = None
    call = asked.get("call") if isinstance(asked, dict) else None
    arguments = asked.get("arguments", {}) if isinstance(asked, dict) else None
    if not isinstance(call, str) or not isinstance(arguments, dict):
        raise pending.Refusal(
            "invalid",
            'A request is a line of at most 64 KiB with {"call": ..., "arguments": {...}}.',
        )
    return call, arguments


def _error(kind: str, message: str) -> dict[str, Any]:
    return {"error": {"kind": kind, "message": message}}


def _encode(reply: dict[str, Any]) -> bytes:
    return json.dumps(reply, separators=(",", ":")).encode() + b"\n"
