# SPDX-License-Identifier: Apache-2.0
"""Guests that say what they want, and a clock that they cannot wait for."""

from collections.abc import Callable
import json
import socket
import time
from typing import Any

from nova_snowflock.guest import protocol

TIMEOUT = 20.0


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


class Clock:
    """In place of :mod:`time`: who sleeps has slept."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds
        self.slept.append(seconds)


class Guest:
    """The guest's end of a connection."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.settimeout(TIMEOUT)
        self._lines = protocol.Lines()
        self._heard: list[protocol.Message] = []

    def say(self, kind: str, **more: Any) -> None:
        self.send(json.dumps({"type": kind, **more}).encode() + b"\n")

    def send(self, data: bytes) -> None:
        self.connection.sendall(data)

    def hear(self, kind: str | None = None) -> protocol.Message:
        """The next message, or the next of a kind."""
        while True:
            while not self._heard:
                data = self.connection.recv(1 << 16)
                if not data:
                    raise EOFError
                self._heard += self._lines.feed(data)
            message = self._heard.pop(0)
            if kind in (None, message["type"]):
                return message

    def ask(self, request: str, call: str = "info", **arguments: Any) -> None:
        self.say("request", id=request, call=call, arguments=arguments)
