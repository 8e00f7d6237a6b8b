# SPDX-License-Identifier: Apache-2.0
"""What the network between two hosts does by itself: plain sockets in Python, nothing encrypted."""

from collections.abc import Sequence
import contextlib
import socket
import time

from tests import emulation

REQUEST = 60
ANSWER = 4096
_CHUNK = 1 << 20
_TIMEOUT = 30.0


def round_trips(
    server: emulation.Host, client: emulation.Host, count: int, size: int = ANSWER
) -> list[float]:
    """Seconds of ``count`` exchanges of UDP datagrams: 60 bytes there, ``size`` bytes back."""
    port = server.run(_free_port, socket.SOCK_DGRAM)
    echo = server.submit(_answer, (server.address, port), count, size)
    times = client.run(_ask, (server.address, port), count)
    echo.result()
    return times


def bulk(server: emulation.Host, clients: Sequence[emulation.Host], size: int) -> float:
    """Seconds until the last of the clients has got ``size`` bytes by a TCP stream of its own."""
    port = server.run(_free_port, socket.SOCK_STREAM)
    senders = server.submit(_send, (server.address, port), len(clients), size)
    started = time.monotonic()
    for receiver in [client.submit(_receive, (server.address, port)) for client in clients]:
        if receiver.result() != size:
            raise ConnectionError("a TCP stream broke off")
    senders.result()
    return time.monotonic() - started


# On a host


def _free_port(kind: int) -> int:
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _answer(address: tuple[str, int], count: int, size: int) -> None:
    answer = bytes(size)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(_TIMEOUT)
        sock.bind(address)
        for _ in range(count):
            _, peer = sock.recvfrom(REQUEST)
            sock.sendto(answer, peer)


def _ask(address: tuple[str, int], count: int) -> list[float]:
    request = bytes(REQUEST)
    times = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(_TIMEOUT)
        while True:  # until the other end listens, whose refusal comes as an error
            sock.connect(address)
            with contextlib.suppress(ConnectionRefusedError):
                sock.send(request)
                sock.recv(1 << 16)
                break
        for _ in range(count - 1):
            started = time.perf_counter()
            sock.send(request)
            sock.recv(1 << 16)
            times.append(time.perf_counter() - started)
    return times


def _send(address: tuple[str, int], count: int, size: int) -> None:
    chunk = bytes(_CHUNK)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(address))
        listener.settimeout(_TIMEOUT)
        streams = [stack.enter_context(listener.accept()[0]) for _ in range(count)]
        for _ in range(size // _CHUNK):
            for stream in streams:
                stream.sendall(chunk)


def _receive(address: tuple[str, int]) -> int:
    size = 0
    buffer = bytearray(_CHUNK)
    deadline = time.monotonic() + _TIMEOUT
    while True:
        try:
            stream = socket.create_connection(address, _TIMEOUT)
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
    with stream:
        while received := stream.recv_into(buffer):
            size += received
    return size
