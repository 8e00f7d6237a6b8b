# SPDX-License-Identifier: Apache-2.0
"""Talk to the workload inside a test guest over a terminal."""

import os
import select
import time
import tty

from tests.guest import client as guest_client


def connect(path: str, timeout: float = 120.0) -> "ConsoleClient":
    """A connection to the workload behind a terminal, which takes one at a time.

    Returns once it answers.

    :raises GuestError: it does not, within `timeout` seconds
    """
    client = ConsoleClient(Terminal(path), timeout)
    deadline = time.monotonic() + timeout
    while True:
        # What comes before the guest has opened its port is lost.
        try:
            client.call("tick", timeout=1.0)
        except guest_client.GuestError:
            if time.monotonic() > deadline:
                client.close()
                raise
        else:
            return client


class ConsoleClient(guest_client.GuestClient):
    """A client that a terminal connects, in place of a socket."""

    def __init__(self, terminal: "Terminal", timeout: float) -> None:
        self._timeout = timeout
        self._socket = terminal  # type: ignore[assignment]
        self._received = b""
        # Ends what an earlier client may have sent half of.
        terminal.sendall(b"\n")


class Terminal:
    """A terminal with as much of a socket's interface as the client uses."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        tty.setraw(self._fd)
        self._timeout = 0.0

    def settimeout(self, seconds: float) -> None:
        self._timeout = seconds

    def sendall(self, message: bytes) -> None:
        view = memoryview(message)
        while view:
            view = view[os.write(self._fd, view) :]

    def recv(self, size: int) -> bytes:
        readable, _, _ = select.select([self._fd], [], [], self._timeout)
        if not readable:
            raise TimeoutError
        return os.read(self._fd, size)

    def close(self) -> None:
        os.close(self._fd)
