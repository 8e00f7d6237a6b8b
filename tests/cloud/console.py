# SPDX-License-Identifier: Apache-2.0
"""Talk to the test guest in a server of the embedded cloud, over its serial console."""

import os
import select
import time
import tty

import libvirt
from lxml import etree

from devstack.embedded import hosts
from tests.guest import client as guest_client


def connect(server: str, host: str, timeout: float = 120.0) -> guest_client.GuestClient:
    """A connection to the workload of the server of that UUID, which runs on the host.

    Returns once it answers. The console takes one connection at a time.

    :raises GuestError: it does not, within `timeout` seconds
    """
    machine = hosts.attach(host)
    path = machine.path(machine.run(terminal, server))
    client = ConsoleClient(Terminal(str(path)), timeout)
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


def terminal(server: str) -> str:
    """On the host: the pseudo terminal of the domain's serial port."""
    source = description(server).find("devices/serial[@type='pty']/source")
    if source is None:
        raise LookupError(f"domain {server} has no pseudo terminal")
    return str(source.attrib["path"])


def description(server: str) -> etree._Element:
    """On the host: XML of the server's domain."""
    with libvirt.open("qemu:///system") as connection:
        return etree.fromstring(connection.lookupByUUIDString(server).XMLDesc())
