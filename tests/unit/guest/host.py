# SPDX-License-Identifier: Apache-2.0
"""A host for an agent under test, that comes and goes; and a guest that notes what is done to it.

The agent's descriptor stays the same, as that of a virtio-serial port does: while the host is away
it reports a hang-up, and when it is there again it is good again.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
import os
import socket
import threading
import time
from typing import Any

from nova_snowflock.guest import agent as guest_agent
from nova_snowflock.guest import protocol

TIMEOUT = 10.0
PARENT = "11111111-1111-4111-8111-111111111111"
CLONE = "22222222-2222-4222-8222-222222222222"
GRANDCHILD = "33333333-3333-4333-8333-333333333333"
FORK = "ffffffff-0000-4000-8000-000000000001"
FORK_2 = "ffffffff-0000-4000-8000-000000000002"
ENTROPY = bytes(range(32))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def you(server: str = PARENT, **more: Any) -> protocol.Message:
    """Of a parent, if nothing else is said."""
    return {
        "type": "you",
        "version": 1,
        "server": server,
        "name": "a-name",
        "time": 1.8e9,
        "fork": None,
        "parent": None,
        "clone_id": 0,
        "params": {},
        "request": None,
        "network": "auto",
        "interfaces": [{"mac": f"52:54:00:00:00:{server[:2]}"}],
        "entropy": base64.b64encode(ENTROPY).decode(),
        **more,
    }


def you_are_a_clone(**more: Any) -> protocol.Message:
    told = {"fork": FORK, "parent": PARENT, "clone_id": 3, "params": {"n": "1"}, **more}
    return you(**{"server": CLONE, **told})


class Steps:
    """Does nothing, notes it, and fails where it must."""

    hook_seconds = 7.0

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.failing: dict[str, str] = {}
        self.hooks_may_end = threading.Event()
        self.hooks_may_end.set()

    def names(self) -> list[str]:
        return [name for name, *_ in self.calls]

    def _note(self, name: str, *arguments: Any) -> None:
        self.calls.append((name, *arguments))
        if name in self.failing:
            raise OSError(self.failing[name])

    def clock(self, seconds: Any) -> None:
        self._note("clock", seconds)

    def reseed(self, entropy: bytes) -> None:
        self._note("reseed", entropy)

    def configure(
        self, before: Sequence[protocol.Message], after: Sequence[protocol.Message]
    ) -> tuple[list[Any], list[str]]:
        self._note("configure", before, after)
        return list(after), []

    def missing(self, after: Sequence[protocol.Message]) -> list[str]:
        return ["it is missing"] if "missing" in self.failing else []

    def announce(self, devices: Sequence[Any]) -> list[str]:
        self._note("announce", devices)
        return []

    def hostname(self, name: Any) -> None:
        self._note("hostname", name)

    def machine_id(self, server: str) -> None:
        self._note("machine_id", server)

    def ssh_host_keys(self) -> None:
        self._note("ssh_host_keys")

    def hooks(
        self, told: Mapping[str, Any], seconds: float, abandoned: Callable[[], bool]
    ) -> list[str]:
        self._note("hooks", dict(told), seconds)
        deadline = time.monotonic() + TIMEOUT
        while not self.hooks_may_end.wait(0.002) and time.monotonic() < deadline:
            if abandoned():
                return ["abandoned"]
        return []

    def events(self) -> list[str]:
        return [call[1]["event"] for call in self.calls if call[0] == "hooks"]


class Host:
    """The other end of the port."""

    def __init__(self, steps: Steps | None = None, **options: Any) -> None:
        self.steps = steps or Steps()
        self.opened = 0
        self._fd = -1
        self._connection: socket.socket | None = None
        self._lines = protocol.Lines()
        self._heard: list[protocol.Message] = []
        options = {"look_again": 0.002, **options}
        self.agent = guest_agent.Agent(self._open, self.steps, **options)
        self._thread = threading.Thread(target=self.agent.run)
        self._thread.start()
        until(lambda: self._fd >= 0)

    def _open(self) -> int:
        here, there = socket.socketpair()
        there.close()
        here.setblocking(False)
        self.opened += 1
        self._fd = here.detach()
        return self._fd

    def connect(self) -> None:
        """Be there, and say nothing."""
        here, there = socket.socketpair()
        there.setblocking(False)
        here.settimeout(TIMEOUT)
        os.dup2(there.fileno(), self._fd)
        there.close()
        self._connection, self._lines, self._heard = here, protocol.Lines(), []

    def disconnect(self) -> None:
        """Go away, and return when the agent has seen it."""
        assert self._connection is not None
        self._connection.close()
        until(lambda: not self.agent._port._here)

    def replace(self) -> None:
        """Be another host, without a moment in which the agent could have seen that none is there.

        As after a fork: the port's state is what it was in the parent.
        """
        old = self._connection
        assert old is not None
        self.connect()
        # It waits for the socket that was there: unlike a port, this is another one.
        self.agent._port._wake()
        old.close()

    def write(self, data: bytes) -> None:
        assert self._connection is not None
        self._connection.sendall(data)

    def say(self, *messages: protocol.Message) -> None:
        for message in messages:
            self.write(protocol.encode(message))

    def raw(self) -> bytes:
        assert self._connection is not None
        return self._connection.recv(65536)

    def hear(self, kind: str) -> protocol.Message:
        """The next message, which must be of that type."""
        assert self._connection is not None
        while not self._heard:
            self._heard += self._lines.feed(self._connection.recv(65536))
        message = self._heard.pop(0)
        assert message["type"] == kind, message
        return message

    def meet(self, told: protocol.Message | None = None) -> None:
        """Connect, answer the agent's hello, and return when it has heard that."""
        self.connect()
        self.write(b"\n")
        self.hear("hello")
        self.say(told or you())
        until(lambda: self.agent._told)

    def silent(self) -> None:
        """Fail if the agent has said or says something, up to the answer to a question."""
        request = self.agent.begin("silent?", {})
        try:
            assert self.hear("request")["call"] == "silent?"
        finally:
            self.agent.forget(request)

    def close(self) -> None:
        self.steps.hooks_may_end.set()
        self.agent.stop()
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        if self._connection is not None:
            self._connection.close()
