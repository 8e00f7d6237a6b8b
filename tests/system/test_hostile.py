# SPDX-License-Identifier: Apache-2.0
"""Hostile datagrams against a memory server and a memtap that serve a reader meanwhile."""

from collections.abc import Callable, Iterator
import contextlib
import os
import random
import select
import socket
import struct
import threading
from typing import Any

import pytest

from nova_snowflock import endpoint
from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import wire
from tests.system import plane

PAGES = 4096
DATA = plane.content(PAGES, seed=9)
FLOOD = 60_000
BURST = 2_000


class Relay:
    """Stands between memtap and server, hands on all that they send, and keeps it."""

    def __init__(self, server: str) -> None:
        self.up: list[bytes] = []
        self.down: list[bytes] = []
        self.server = endpoint.parse(server)
        self.memtap: endpoint.Address | None = None
        self._front, self._back = (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)
        )
        for sock in (self._front, self._back):
            sock.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
            sock.bind(("127.0.0.1", 0))
        self._running = True
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def address(self) -> str:
        """Where memtap takes the server to be."""
        return endpoint.format(self._front.getsockname())

    def to_server(self, datagram: bytes) -> None:
        """As if it came from memtap."""
        self._back.sendto(datagram, self.server)

    def to_memtap(self, datagram: bytes) -> None:
        """As if it came from the server."""
        assert self.memtap is not None
        self._front.sendto(datagram, self.memtap)

    def _run(self) -> None:
        while self._running:
            for sock in select.select([self._front, self._back], [], [], 0.05)[0]:
                datagram, sender = sock.recvfrom(1 << 16)
                if sock is self._front:
                    self.memtap = sender
                    self.to_server(datagram)
                    self.up.append(datagram)
                else:
                    self.to_memtap(datagram)
                    self.down.append(datagram)

    def close(self) -> None:
        self._running = False
        self._thread.join()
        self._front.close()
        self._back.close()


@pytest.fixture
def image() -> Iterator[plane.Loopback]:
    with plane.loopback() as made:
        yield made


@pytest.fixture
def relay(image: plane.Loopback) -> Iterator[Relay]:
    """A server and a lazy memtap, and all that they say to each other."""
    between = Relay(image.serve(DATA)["servers"][0])
    image.tap(descriptor=plane.served_from(image.descriptor, between.address))
    try:
        plane.wait_for(memtap(image), state="attached")
        plane.until(lambda: plane.status(image.server)["memtaps"], "the first request")
        yield between
    finally:
        plane.stop(memtap(image))
        between.close()


def memtap(image: plane.Loopback) -> str:
    return str(image.directory / "memtap")


def read(image: plane.Loopback, page: int, pages: int = 4) -> bool:
    """Whether a reader finds what it must."""
    seen = plane.read(image.path(), page * PAGE_SIZE, pages * PAGE_SIZE)
    return seen == DATA[page * PAGE_SIZE : (page + pages) * PAGE_SIZE]


def refused(run_directory: str) -> int:
    """How many datagrams were not taken for what they pretend to be."""
    status = plane.status(run_directory)
    counters = ("rejected", "replayed", "malformed", "stale", "unserved")
    return sum(status.get(counter, 0) for counter in counters)


def expect_refused(run_directory: str, count: int) -> None:
    """Wait until as many were refused, and see that no more were."""
    plane.until(lambda: refused(run_directory) >= count, f"{count} to be refused")
    assert refused(run_directory) == count


def session_of(datagram: bytes) -> int:
    return int(wire.HEADER.unpack_from(datagram)[3])


def make(chosen: random.Random, genuine: list[bytes], reflected: list[bytes]) -> bytes:
    """One that is empty, random, cut, altered, forged, repeated or turned back."""
    kind = chosen.randrange(8)
    datagram = chosen.choice(genuine)
    if kind == 0:
        return chosen.randbytes(chosen.choice((0, 1, 19, 20, 35, 36, 37, 100, 1400)))
    if kind == 1:
        return datagram[: chosen.randrange(len(datagram))]
    if kind == 2:
        altered = bytearray(datagram)
        altered[chosen.randrange(len(altered))] ^= 1 << chosen.randrange(8)
        return bytes(altered)
    if kind == 3:
        header = datagram[:12] + chosen.choice((chosen.randbytes(8), datagram[12:20]))
        return header + chosen.randbytes(chosen.randrange(16, 1400))
    if kind == 4:
        session, sequence = (chosen.getrandbits(64) for _ in range(2))
        number = chosen.randrange(8)
        header = wire.HEADER.pack(wire.MAGIC, wire.VERSION, number, session, sequence)
        return header + chosen.randbytes(chosen.randrange(16, 200))
    if kind == 5:
        return chosen.choice(reflected)
    if kind == 6:
        return datagram + chosen.randbytes(chosen.randrange(1, 50))
    return datagram


@contextlib.contextmanager
def stranger(address: str = "127.0.0.1") -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
        sock.bind((address, 0))
        yield sock


def heard_by(sock: socket.socket) -> list[bytes]:
    """All that has come so far."""
    sock.setblocking(False)
    heard = []
    with contextlib.suppress(BlockingIOError):
        while True:
            heard.append(sock.recv(1 << 16))
    return heard


def flood(
    image: plane.Loopback,
    run_directory: str,
    seed: int,
    genuine: list[bytes],
    reflected: list[bytes],
    ways: list[Callable[[bytes], Any]],
) -> None:
    """Send, while reading, and see that each datagram was refused."""
    chosen = random.Random(seed)
    pid = plane.client(run_directory).peer()
    before = refused(run_directory)
    for sent in range(BURST, FLOOD + 1, BURST):
        for _ in range(BURST):
            chosen.choice(ways)(make(chosen, genuine, reflected))
        assert read(image, chosen.randrange(PAGES // 2))
        expect_refused(run_directory, before + sent)
    assert plane.client(run_directory).peer() == pid
    assert len(plane.log(run_directory)) < 10_000


def test_flood_at_the_server(image: plane.Loopback, relay: Relay) -> None:
    assert read(image, 0, 256)
    genuine, reflected = list(relay.up), list(relay.down)
    before = plane.status(image.server)
    memtap_before = plane.status(memtap(image))
    with stranger() as sock:
        ways = [relay.to_server, lambda datagram: sock.sendto(datagram, relay.server)]
        flood(image, image.server, 1, genuine, reflected, ways)
        assert heard_by(sock) == []
    after = plane.status(image.server)
    asked = sum(
        plane.status(memtap(image))[counter] - memtap_before[counter]
        for counter in ("fault_requests", "background_requests", "repeated_requests")
    )
    # One more if memtap had been silent for long.
    assert after["requests"] - before["requests"] in (asked, asked + 1)
    assert after["memtaps"] == before["memtaps"]
    for counter in ("rejected", "replayed", "malformed"):
        assert after[counter] > before[counter] + FLOOD // 20
    assert plane.read_all(image.path()) == DATA


def test_flood_at_the_memtap(image: plane.Loopback, relay: Relay) -> None:
    assert read(image, 0, 256)
    genuine, reflected = list(relay.down), list(relay.up)
    before = plane.status(memtap(image))
    with stranger() as sock:
        ways = [relay.to_memtap, lambda datagram: sock.sendto(datagram, relay.memtap or ("", 0))]
        flood(image, memtap(image), 2, genuine, reflected, ways)
        assert heard_by(sock) == []
    after = plane.status(memtap(image))
    for counter in ("rejected", "replayed", "malformed", "stale"):
        assert after[counter] > before[counter] + FLOOD // 20
    server = plane.status(image.server)
    assert after["bytes_unicast"] <= server["bytes_unicast"]
    assert plane.read_all(image.path()) == DATA


def test_flood_at_the_group(image: plane.Loopback) -> None:
    group = "239.77.9.9:20999"
    image.serve(DATA, group=group)
    for name in ("memtap", "other"):
        plane.wait_for(image.tap(name), state="attached")
    plane.until(lambda: len(plane.status(image.server)["memtaps"]) == 2, "both memtaps")
    chosen = random.Random(3)
    before = refused(memtap(image))
    genuine = [wire.HEADER.pack(b"SF", 1, wire.DATA, 5, 1) + bytes(1400)]
    with stranger() as sock:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        for _ in range(BURST):
            sock.sendto(make(chosen, genuine, genuine), endpoint.parse(group))
    assert read(image, 0, 256)
    expect_refused(memtap(image), before + BURST)


def test_what_was_recorded_before(image: plane.Loopback, relay: Relay) -> None:
    """Of an earlier server: nothing of it is worth anything to the next."""
    assert read(image, 0, 64)
    image.kill_server()
    old_up, old_down = list(relay.up), list(relay.down)
    image.serve(DATA, address=endpoint.format(relay.server))
    assert read(image, 64, 64)
    plane.wait_for(memtap(image), outstanding=0)
    server, client = plane.status(image.server), plane.status(memtap(image))
    sessions = {session_of(datagram) for datagram in old_up}
    hellos = [d for d in old_up if d[3] == wire.HELLO]
    assert len(sessions) >= 2
    assert hellos
    before = refused(image.server), refused(memtap(image))
    with stranger() as sock:
        for datagram in old_up:
            sock.sendto(datagram, relay.server)
        for datagram in old_down:
            relay.to_memtap(datagram)
        expect_refused(image.server, before[0] + len(old_up) - len(hellos))
        expect_refused(memtap(image), before[1] + len(old_down))
        # An old HELLO may be answered, once, by no more than itself. That leads nowhere.
        answers = heard_by(sock)
        assert sum(map(len, answers)) <= sum(map(len, hellos))
        assert {answer[3] for answer in answers} <= {wire.WELCOME}
    after, client_after = plane.status(image.server), plane.status(memtap(image))
    for counter in ("requests", "memtaps", "pages_unicast", "bytes_unicast"):
        assert after[counter] == server[counter]
    for counter in ("pages", "bytes_unicast", "bytes_repeated"):
        assert client_after[counter] == client[counter]
    assert read(image, 128, 256)
    assert plane.read_all(image.path()) == DATA


def test_empty_datagram(image: plane.Loopback, relay: Relay) -> None:
    relay.to_server(b"")
    relay.to_memtap(b"")
    assert read(image, 0, 64)
    assert plane.status(image.server)["malformed"] == 1
    assert plane.status(memtap(image))["malformed"] == 1


def attached(image: plane.Loopback) -> plane.Client:
    """By hand, and confirmed."""
    client = plane.Client(image.key, image.serve(DATA, mtu=9000)["servers"][0])
    client.attach()
    assert client.fetch(1, 8) == DATA[: 8 * PAGE_SIZE]
    return client


def test_replayed_hello_does_not_redirect(image: plane.Loopback) -> None:
    client = attached(image)
    hello = client.hello()
    request = client.request([wire.Run(1, 8, 8)], wire.FAULT | wire.REPAIR)
    with stranger() as sock:
        client.send(hello)
        client.socket.settimeout(plane.DEADLINE)
        assert client.socket.recv(1 << 16)[3] == wire.WELCOME
        for _ in range(3):
            sock.sendto(hello, client.server)
        plane.until(lambda: plane.status(image.server)["replayed"] == 3, "the replays")
        assert client.fetch(1, 16) == DATA[: 16 * PAGE_SIZE]
        client.send(request)
        plane.until(lambda: plane.status(image.server)["requests"] == 3, "the request")
        sock.sendto(request, client.server)
        plane.until(lambda: plane.status(image.server)["replayed"] == 4, "the replay")
        assert heard_by(sock) == []
        assert plane.status(image.server)["memtaps"] == [
            endpoint.format(client.socket.getsockname())
        ]
    client.close()


def test_replayed_hello_does_not_lock_out(image: plane.Loopback) -> None:
    """Nor if it comes first: its sender was not heard, or what it sent was held back."""
    client = plane.Client(image.key, image.serve(DATA, mtu=9000)["servers"][0])
    with stranger() as sock:
        sock.sendto(client.hello(), client.server)
        client.send(client.hello())
        assert client.welcomed()
        assert client.fetch(1, 8) == DATA[: 8 * PAGE_SIZE]
        assert {datagram[3] for datagram in heard_by(sock)} <= {wire.WELCOME}
    client.close()


def test_hellos_of_many_sessions(image: plane.Loopback) -> None:
    """Whoever has recorded thousands of greetings drives out nobody who is there."""
    client = attached(image)
    with stranger() as sock:
        for number in range(3000):
            sealer = wire.Sealer(number + 1, wire.session_key(image.key, "hello", number + 1))
            sock.sendto(sealer.seal(wire.HELLO, wire.encode_session(number)), client.server)
            if not number % 100:
                plane.status(image.server)
        assert client.fetch(1, 16) == DATA[: 16 * PAGE_SIZE]
        assert len(plane.status(image.server)["memtaps"]) == 1
    client.close()


def test_source_port_zero(image: plane.Loopback) -> None:
    """Nobody can be answered there."""
    client = plane.Client(image.key, image.serve(DATA, mtu=9000)["servers"][0])
    hello = client.hello()
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
        header = struct.pack(">HHHH", 0, client.server[1], 8 + len(hello), 0)
        raw.sendto(header + hello, ("127.0.0.1", 0))
    client.attach()
    assert client.fetch(1, 8) == DATA[: 8 * PAGE_SIZE]
    client.close()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"short",
        bytes(16) + b"\x04",
        bytes(17) + b"a part of a run"[:11],
        wire.encode_request(wire.Request(0, 0, wire.FAULT, [wire.Run(1, PAGES, 1)])),
        wire.encode_request(wire.Request(0, 0, wire.FAULT, [wire.Run(1, PAGES - 1, 2)])),
        wire.encode_request(wire.Request(0, 0, wire.FAULT, [wire.Run(1, (1 << 64) - 1, 1)])),
        wire.encode_request(wire.Request(0, 0, wire.BACKGROUND, [wire.Run(1, PAGES, 1)])),
        wire.encode_request(wire.Request(0, 0, wire.FAULT, [wire.Run(1, 0, 0)])),
        wire.encode_request(wire.Request(0, 0, wire.FAULT, [wire.Run(7, 0, 1)])),
    ],
)
def test_request_of_one_who_has_the_key(image: plane.Loopback, payload: bytes) -> None:
    client = attached(image)
    client.send(client.sealer.seal(wire.REQUEST, payload))
    plane.until(lambda: plane.status(image.server)["malformed"] == 1, "the refusal")
    assert client.fetch(1, 8) == DATA[: 8 * PAGE_SIZE]
    client.close()


def test_reports_of_one_who_lies(image: plane.Loopback) -> None:
    client = attached(image)
    chosen = random.Random(4)
    for _ in range(200):
        received, expected = (chosen.choice((0, 1, 1 << 40, (1 << 64) - 1)) for _ in range(2))
        request = wire.encode_request(wire.Request(received, expected, wire.BACKGROUND, []))
        client.send(client.sealer.seal(wire.REQUEST, request))
    plane.until(lambda: plane.status(image.server)["requests"] == 201, "the reports")
    assert client.fetch(1, 16) == DATA[: 16 * PAGE_SIZE]
    client.close()


def test_another_image_has_another_key(image: plane.Loopback) -> None:
    status = image.serve(DATA, mtu=9000)
    client = plane.Client(os.urandom(32), status["servers"][0])
    client.send(client.hello())
    plane.until(lambda: plane.status(image.server)["rejected"] == 1, "the refusal")
    assert not client.welcomed(timeout=0.0001)
    client.close()
