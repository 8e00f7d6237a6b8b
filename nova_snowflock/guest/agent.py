# SPDX-License-Identifier: Apache-2.0
"""The agent: what the host says is done, and what programs ask is passed on.

One thread talks to the host and is never kept from it. Another one does what takes time, one thing
after the other. Both, and the memory of both, are cloned with the guest at any point: that the host
names another server than before is all that tells a clone's agent what it is.
"""

from __future__ import annotations

import binascii
from collections.abc import Callable, Mapping, Sequence
import json
import logging
import queue
import threading
import time
from typing import Any, Protocol

from nova_snowflock.guest import hooks
from nova_snowflock.guest import pending
from nova_snowflock.guest import port
from nova_snowflock.guest import protocol

LOG = logging.getLogger(__name__)

VERSION = "1.0"
"""Of the agent."""

_PREFORK_SECONDS = 10.0
# Of the time that the host waits for hooks: the rest is for the answer to get there.
_PREFORK_SHARE = 0.9
_PROBLEM_LENGTH = 300
_PROBLEMS_LENGTH = 40 << 10


class Steps(Protocol):
    """As :class:`nova_snowflock.guest.becoming.Steps`."""

    hook_seconds: float

    def clock(self, seconds: Any) -> None: ...

    def reseed(self, entropy: bytes) -> None: ...

    def configure(
        self, before: Sequence[protocol.Message], after: Sequence[protocol.Message]
    ) -> tuple[list[Any], list[str]]: ...

    def missing(self, after: Sequence[protocol.Message]) -> list[str]: ...

    def announce(self, devices: Sequence[Any]) -> list[str]: ...

    def hostname(self, name: Any) -> None: ...

    def machine_id(self, server: str) -> None: ...

    def ssh_host_keys(self) -> None: ...

    def hooks(
        self, told: Mapping[str, Any], seconds: float, abandoned: Callable[[], bool]
    ) -> list[str]: ...


class _Problems:
    """What went wrong with one thing that the host wants done."""

    def __init__(self) -> None:
        self.sentences: list[str] = []

    def add(self, sentences: Sequence[str]) -> None:
        for sentence in sentences:
            LOG.warning("%s", sentence)
            self.sentences.append(sentence)

    def attempt(self, what: str, step: Callable[..., Any], *arguments: Any) -> bool:
        """Make a step, and say whether it succeeded.

        :param what: what is the case if it failed
        :param step: raises, or returns the sentences of its problems
        """
        try:
            found = step(*arguments)
        except Exception as error:
            # Whatever it is, it is reported, and the other steps are made.
            self.add([f"{what}: {str(error) or type(error).__name__}."])
            return False
        self.add(found or ())
        return not found


class Agent:
    """A guest's. :meth:`run` is for the main thread, all else for any."""

    def __init__(
        self,
        open_port: Callable[[], int],
        steps: Steps,
        *,
        online_seconds: float = 10.0,
        offline_seconds: float = 10.0,
        look_again: float = 0.2,
    ) -> None:
        """
        :param open_port: see :class:`port.Port`
        :param steps: what is done to the guest
        :param online_seconds: how long a clone waits at most for its interfaces to have a link
        :param offline_seconds: how long programs wait at most for the host's first word
        :param look_again: see :class:`port.Port`
        """
        self._steps = steps
        self._online_seconds = online_seconds
        self._offline_seconds = offline_seconds
        self._port = port.Port(open_port, self._arrived, self._received, look_again=look_again)
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._changed = threading.Condition()
        # All of these change under its lock.
        self._server: str | None = None
        self._interfaces: list[protocol.Message] = []
        self._asked = False  # said hello and was not told since
        self._told = False  # by the host that is there now
        self._online = False
        self._said: dict[str, protocol.Message] = {}
        self._preparing: str | None = None
        self._pending = pending.Table()
        self._left: list[pending.Request] = []  # by the parent, for a clone to answer
        self._handlers: dict[str, Callable[[protocol.Message], None]] = {
            "you": self._you,
            "online": self._link,
            "prefork": self._prefork,
            "parent": self._parent,
            "answer": self._answer,
            "part": self._part,
        }

    def run(self) -> None:
        """Serve until stopped."""
        threading.Thread(target=self._work, name="worker", daemon=True).start()
        self._port.run()

    def stop(self) -> None:
        """Have :meth:`run` return."""
        self._port.stop()

    # For programs.

    def begin(self, call: str, arguments: dict[str, Any]) -> pending.Request:
        """Ask the host. The caller closes the request with :meth:`forget`.

        :raises Refusal: it is not asked
        """
        request = pending.Request(call, arguments)
        try:
            with self._changed:
                self._pending.add(request)
                if self._told:
                    self._port.send(request.message)
                elif self._server is None:
                    timer = threading.Timer(self._offline_seconds, self._give_up, [request.id])
                    timer.daemon = True
                    timer.start()
        except BaseException:
            self.forget(request)
            raise
        return request

    def forget(self, request: pending.Request) -> None:
        """Its asker has its answer, or waits no more."""
        with self._changed:
            self._pending.take(request.id)
        request.close()

    def call(self, call: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Ask the host, and return an object with ``result`` or ``error``."""
        try:
            request = self.begin(call, arguments)
        except pending.Refusal as refusal:
            return {"error": {"kind": refusal.kind, "message": str(refusal)}}
        try:
            return request.wait()
        finally:
            self.forget(request)

    def _give_up(self, identity: str) -> None:
        with self._changed:
            request = self._pending.take(identity) if self._server is None else None
        if request:
            request.fail("offline", "This guest's host knows nothing of forks.")

    # What the host says. In the thread that reads, so nothing here waits.

    def _arrived(self) -> None:
        with self._changed:
            self._told = False
            self._hello()

    def _hello(self) -> None:
        self._asked = True
        self._port.send({"type": "hello", "version": protocol.VERSION, "agent": VERSION})

    def _received(self, message: protocol.Message) -> None:
        handler = self._handlers.get(message["type"])
        if handler is None:
            return
        try:
            with self._changed:
                handler(message)
        except (ValueError, KeyError, TypeError) as error:
            LOG.warning(
                "What the host said (%s) was passed over, as it makes no sense: %s",
                message["type"],
                error,
            )

    def _you(self, you: protocol.Message) -> None:
        server, fork = _text(you, "server"), you.get("fork")
        heard, self._asked = self._asked, False
        before, self._interfaces = self._interfaces, _objects(you.get("interfaces"))
        previous, self._server = self._server, server
        # An agent that was started just before may have been told of nothing but the fork.
        prepared = fork is not None and fork == self._preparing
        forked = previous != server and (previous is not None or prepared)
        if forked or not heard:
            # What was said before, if anything, was said to another host.
            self._hello()
        self._told = True
        if forked:
            LOG.info("This is server %s now, a clone of %s", server, previous)
            self._said.clear()
            self._online = False
            self._preparing = None
            self._left += self._pending.take_all()
            self._jobs.put(lambda: self._become(you, before))
        elif previous is None and fork is not None:
            LOG.info("This is server %s, a clone that has booted since", server)
            self._jobs.put(lambda: self._awake(you))
        for said in self._said.values():
            self._port.send(said)
        for request in self._pending.all():
            self._port.send(request.message)
        self._changed.notify_all()

    def _link(self, _message: protocol.Message) -> None:
        self._online = True
        self._changed.notify_all()

    def _prefork(self, message: protocol.Message) -> None:
        fork = _text(message, "fork")
        if "interfaces" in message:
            self._interfaces = _objects(message["interfaces"])
        if fork == self._preparing:
            # Asked again. If it has not been said yet, it will be.
            if "ready" in self._said:
                self._port.send(self._said["ready"])
            return
        self._preparing = fork
        self._said.pop("ready", None)
        seconds = message.get("seconds")
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
            seconds = _PREFORK_SECONDS
        deadline = time.monotonic() + seconds * _PREFORK_SHARE
        server = self._server
        told = hooks.context(
            "prefork", server=server, fork=fork, parent=server, params=_object(message, "params")
        )
        self._jobs.put(lambda: self._prepare(told, deadline))

    def _parent(self, message: protocol.Message) -> None:
        fork = _text(message, "fork")
        concluded = self._said.get("parent")
        if fork == self._preparing:
            self._preparing = None
            self._said.pop("ready", None)
        elif concluded is not None and concluded["fork"] == fork:
            self._port.send(concluded)
            return
        self._said.pop("parent", None)
        server, error = self._server, message.get("error")
        told = hooks.context(
            "parent",
            server=server,
            fork=fork,
            parent=server,
            params=_object(message, "params"),
            error=None if error is None else str(error),
        )
        self._jobs.put(lambda: self._conclude(told))

    def _answer(self, message: protocol.Message) -> None:
        request = self._pending.take(message.get("id"))
        if request:
            request.answer(message)

    def _part(self, message: protocol.Message) -> None:
        request = self._pending.get(message.get("id"))
        if request:
            request.part(message)

    # What takes time. In the worker.

    def _work(self) -> None:
        while True:
            job = self._jobs.get()
            try:
                job()
            except Exception:
                LOG.exception("A fork was not dealt with, which is a bug of this agent")

    def _is(self, server: str | None) -> bool:
        with self._changed:
            return self._server == server

    def _say(
        self, slot: str, server: str | None, kind: str, problems: _Problems, **more: Any
    ) -> None:
        """Say something, now and to each host that comes, unless the guest was forked meanwhile."""
        message = {"type": kind, **more, "problems": _clip(problems.sentences)}
        with self._changed:
            if self._server == server:
                self._said[slot] = message
                self._port.send(message)

    def _run_hooks(self, problems: _Problems, told: Mapping[str, Any], seconds: float) -> None:
        server = told["server"]
        problems.attempt(
            "The hooks were not run",
            self._steps.hooks,
            told,
            seconds,
            lambda: not self._is(server),
        )

    def _prepare(self, told: Mapping[str, Any], deadline: float) -> None:
        problems = _Problems()
        self._run_hooks(problems, told, deadline - time.monotonic())
        with self._changed:
            if self._preparing != told["fork"]:
                return  # forked without waiting for it
            self._say("ready", told["server"], "ready", problems, fork=told["fork"])

    def _conclude(self, told: Mapping[str, Any]) -> None:
        problems = _Problems()
        self._run_hooks(problems, told, self._steps.hook_seconds)
        self._say("parent", told["server"], "done", problems, fork=told["fork"])

    def _awake(self, you: protocol.Message) -> None:
        problems = _Problems()
        itself = {
            "reseeded": self._reseed(you, problems),
            "configured": self._configured(you, problems),
        }
        self._say("self", you["server"], "self", problems, fork=you["fork"], **itself)
        self._say("done", you["server"], "done", problems, fork=you["fork"])

    def _become(self, you: protocol.Message, before: list[protocol.Message]) -> None:
        steps, problems = self._steps, _Problems()
        server, fork = you["server"], you.get("fork")
        devices: list[Any] = []
        problems.attempt("The clock was not set", steps.clock, you.get("time"))
        reseeded = self._reseed(you, problems)
        if you.get("network") == "agent":

            def configure() -> list[str]:
                found, failed = steps.configure(before, _objects(you.get("interfaces")))
                devices.extend(found)
                return failed

            problems.attempt("The network interfaces have their parent's addresses", configure)
        problems.attempt("The host name is the parent's", steps.hostname, you.get("name"))
        problems.attempt("The machine ID is the parent's", steps.machine_id, server)
        itself = {"reseeded": reseeded, "configured": self._configured(you, problems)}
        self._say("self", server, "self", problems, fork=fork, **itself)
        if devices:
            self._wait_for_link(server, problems)
            problems.attempt("The addresses were not announced", steps.announce, devices)
        params = you.get("params")
        told = hooks.context(
            "clone",
            server=server,
            fork=fork,
            parent=you.get("parent"),
            clone_id=you.get("clone_id") or 0,
            params=params if isinstance(params, dict) else {},
        )
        self._run_hooks(problems, told, steps.hook_seconds)
        self._tell_programs(you)
        if self._is(server):
            problems.attempt("The SSH host keys are the parent's", steps.ssh_host_keys)
        self._say("done", server, "done", problems, fork=fork)
        LOG.info("Became server %s, with %d problems", server, len(problems.sentences))

    def _configured(self, you: protocol.Message, problems: _Problems) -> bool:
        """Whether nothing would be heard under the parent's MACs if there were a link."""
        if you.get("network") != "agent":
            return True  # who replaces the interfaces sees to that
        interfaces = _objects(you.get("interfaces"))
        what = "Whose network interfaces these are is not known"
        return problems.attempt(what, self._steps.missing, interfaces)

    def _reseed(self, you: protocol.Message, problems: _Problems) -> bool:
        def reseed() -> None:
            self._steps.reseed(binascii.a2b_base64(you.get("entropy") or ""))

        return problems.attempt("The kernel has the random numbers of its siblings", reseed)

    def _wait_for_link(self, server: str, problems: _Problems) -> None:
        with self._changed:
            online = self._changed.wait_for(
                lambda: self._online or self._server != server, self._online_seconds
            )
        if not online:
            problems.add(
                [f"After {self._online_seconds:g} s the host had not said that there is a link."]
            )

    def _tell_programs(self, you: protocol.Message) -> None:
        """Answer what was asked before the guest was forked."""
        with self._changed:
            if self._server != you["server"]:
                return  # and forked again: they are told with the others
            left, self._left = self._left, []
        for request in left:
            if request.id != you.get("request"):
                request.fail("forked", "The guest was forked, and this was asked by its parent.")
                continue
            result = {"clone_id": you.get("clone_id")}
            if request.call == "checkpoint_parent":
                result["checkpoint"] = you.get("fork")
            request.finish({"result": result})


def _text(message: protocol.Message, name: str) -> str:
    value = message.get(name)
    if not isinstance(value, str):
        raise ValueError(f"it has no {name}")
    return value


def _object(message: protocol.Message, name: str) -> dict[str, Any]:
    value = message.get(name)
    return value if isinstance(value, dict) else {}


def _objects(value: Any) -> list[protocol.Message]:
    # What is none keeps its place: the n-th is the n-th.
    return [one if isinstance(one, dict) else {} for one in value or ()]


def _clip(problems: Sequence[str]) -> list[str]:
    """As many sentences as a message has room for."""
    clipped: list[str] = []
    room = _PROBLEMS_LENGTH
    for number, problem in enumerate(problems):
        problem = problem[:_PROBLEM_LENGTH]
        room -= len(json.dumps(problem)) + 1
        if room < 0:
            clipped.append(f"And {len(problems) - number} more.")
            break
        clipped.append(problem)
    return clipped
