# SPDX-License-Identifier: Apache-2.0
"""Connections come through the privileged process, each to who asked for it."""

from collections.abc import Callable, Iterator
import os
import pathlib
import socket
import tempfile
import threading

import pytest

from nova_snowflock.virt import privileged
from nova_snowflock.virt.agents import courier as agents_courier
from tests.unit.virt.agents.world import Asked

SERVER = "11111111-1111-4111-8111-111111111111"
Send = Callable[[str, str], None]


@pytest.fixture
def directory() -> Iterator[pathlib.Path]:
    # The names of sockets are short.
    with tempfile.TemporaryDirectory() as directory:
        yield pathlib.Path(directory)


@pytest.fixture
def courier(directory: pathlib.Path) -> agents_courier.Courier:
    return agents_courier.Courier(str(directory))


def send(name: str, address: str, descriptors: list[int]) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(address)
        socket.send_fds(sender, [name.encode()], descriptors)


def guests(ends: dict[str, socket.socket]) -> Send:
    """Sends what the privileged process would."""

    def send_channel(domain: str, address: str) -> None:
        ours, ends[domain] = socket.socketpair()
        with ours:
            send(domain, address, [ours.fileno()])

    return send_channel


def test_fetch(
    courier: agents_courier.Courier, directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: dict[str, socket.socket] = {}
    monkeypatch.setattr(privileged, "send_channel", guests(ends))
    for _ in range(2):
        with courier.fetch(SERVER) as connection, ends[SERVER] as end:
            connection.sendall(b"hello")
            assert end.recv(100) == b"hello"
    assert os.listdir(directory) == []


def test_left_behind(
    courier: agents_courier.Courier, directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a service that was killed."""
    (directory / "courier").touch()
    ends: dict[str, socket.socket] = {}
    monkeypatch.setattr(privileged, "send_channel", guests(ends))
    with courier.fetch(SERVER), ends[SERVER]:
        pass


def test_many_at_a_time(courier: agents_courier.Courier, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: dict[str, socket.socket] = {}
    monkeypatch.setattr(privileged, "send_channel", guests(ends))
    servers = [SERVER[:-2] + f"{n:02d}" for n in range(20)]
    start = threading.Barrier(len(servers))

    def fetch(server: str) -> socket.socket:
        start.wait()
        return courier.fetch(server)

    fetched = {server: Asked(fetch, server) for server in servers}
    for server, asked in fetched.items():
        with asked.result() as connection, ends[server] as end:
            connection.sendall(server.encode())
            assert end.recv(100) == server.encode()


def test_no_port(
    courier: agents_courier.Courier, directory: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(domain: str, address: str) -> None:
        raise FileNotFoundError("no port")

    monkeypatch.setattr(privileged, "send_channel", fail)
    with pytest.raises(OSError, match="no port"):
        courier.fetch(SERVER)
    assert os.listdir(directory) == []


@pytest.mark.parametrize("what", ["other", "none", "nothing"])
def test_what_is_not_the_connection(
    courier: agents_courier.Courier, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    monkeypatch.setattr(agents_courier, "_TIMEOUT", 0.01)
    ours, theirs = socket.socketpair()

    def strange(domain: str, address: str) -> None:
        with ours:
            if what == "other":
                send(domain.replace("1", "2"), address, [ours.fileno()])
            elif what == "none":
                send(domain, address, [])

    monkeypatch.setattr(privileged, "send_channel", strange)
    with pytest.raises(OSError):  # noqa: PT011
        courier.fetch(SERVER)
    # And nothing is left open.
    theirs.settimeout(20)
    assert theirs.recv(1) == b""
    theirs.close()
