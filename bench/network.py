# SPDX-License-Identifier: Apache-2.0
"""What the network between two hosts does by itself: plain sockets in Python, nothing encrypted."""

from collections.abc import Sequence
from concurrent import futures
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
    address = server.run(_open, server.address, socket.SOCK_DGRAM)
    answering = server.submit(_answer, address, count, size)
    times = client.run(_ask, address, count)
    answering.result()
    return times


def bulk(server: emulation.Host, clients: Sequence[emulation.Host], size: int) -> float:
    """Seconds until the last of the clients has got ``size`` bytes by a TCP stream of its own."""
    address = server.run(_open, server.address, socket.SOCK_STREAM)
    started = time.monotonic()
    sending = server.submit(_send, address, len(clients), size)
    for receiving in [client.submit(_receive, address) for client in clients]:
        if receiving.result() != size:
            raise ConnectionError("a TCP stream broke off")
    sending.result()
    return time.monotonic() - started


def copy(source: emulation.Host, hosts: Sequence[emulation.Host], path: str) -> None:
    """Copy a file to the same place on other hosts, to all at once."""
    address = source.run(_open, source.address, socket.SOCK_STREAM)
    sending = source.submit(_send_file, address, len(hosts), path)
    for receiving in [host.submit(_receive_file, address, path) for host in hosts]:
        receiving.result()
    sending.result()


# On a host

_open_sockets: dict[tuple[str, int], socket.socket] = {}


def _open(host: str, kind: int) -> tuple[str, int]:
    """Have a socket that waits for the other end; its address."""
    sock = socket.socket(socket.AF_INET, kind)
    sock.settimeout(_TIMEOUT)
    sock.bind((host, 0))
    if kind == socket.SOCK_STREAM:
        sock.listen()
    address: tuple[str, int] = sock.getsockname()
    _open_sockets[address] = sock
    return address


def _answer(address: tuple[str, int], count: int, size: int) -> None:
    answer = bytes(size)
    with _open_sockets.pop(address) as sock:
        for _ in range(count):
            _, peer = sock.recvfrom(REQUEST)
            sock.sendto(answer, peer)


def _ask(address: tuple[str, int], count: int) -> list[float]:
    request = bytes(REQUEST)
    times = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(_TIMEOUT)
        sock.connect(address)
        for _ in range(count):
            started = time.perf_counter()
            sock.send(request)
            sock.recv(1 << 16)
            times.append(time.perf_counter() - started)
    return times


def _send(address: tuple[str, int], count: int, size: int) -> None:
    chunk = bytes(_CHUNK)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(_open_sockets.pop(address))
        streams = [stack.enter_context(listener.accept()[0]) for _ in range(count)]
        for _ in range(size // _CHUNK):
            for stream in streams:
                stream.sendall(chunk)


def _receive(address: tuple[str, int]) -> int:
    size = 0
    buffer = bytearray(_CHUNK)
    with socket.create_connection(address, _TIMEOUT) as stream:
        while received := stream.recv_into(buffer):
            size += received
    return size


def _send_file(address: tuple[str, int], count: int, path: str) -> None:
    def send(stream: socket.socket) -> None:
        with stream, open(path, "rb") as file:
            stream.sendfile(file)

    with _open_sockets.pop(address) as listener, futures.ThreadPoolExecutor(count) as pool:
        streams = [listener.accept()[0] for _ in range(count)]
        list(pool.map(send, streams))


def _receive_file(address: tuple[str, int], path: str) -> None:
    buffer = memoryview(bytearray(_CHUNK))
    with socket.create_connection(address, _TIMEOUT) as stream, open(path, "wb") as file:
        while received := stream.recv_into(buffer):
            file.write(buffer[:received])
