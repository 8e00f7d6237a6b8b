# SPDX-License-Identifier: Apache-2.0
"""The greeting: a memtap's attachment and a server's registry, with a network between them."""

import pytest

from nova_snowflock import endpoint
from nova_snowflock.memtap import wire
from nova_snowflock.memtap.client import attachment
from nova_snowflock.memtap.server import registry

KEY = bytes(range(32))
SERVERS = [("10.0.0.1", 1), ("10.0.0.2", 2)]
HOME = ("10.0.0.9", 9)
AWAY = ("10.0.0.66", 66)


class Memtap:
    def __init__(self, key: bytes = KEY) -> None:
        self.now = 100.0
        self.sent: list[tuple[bytes, endpoint.Address]] = []
        self.attachment = attachment.Attachment(
            key, SERVERS, lambda datagram, address: self.sent.append((datagram, address))
        )

    def hello(self) -> bytes:
        self.now += 10
        self.attachment.greet(self.now)
        return self.last(wire.HELLO)

    def request(self) -> bytes:
        self.attachment.request(wire.FAULT, [wire.Run(1, 2, 3)], 0.0)
        return self.last(wire.REQUEST)

    def last(self, kind: int) -> bytes:
        datagram, _ = self.sent[-1]
        assert wire.HEADER.unpack_from(datagram)[2] == kind
        return datagram


class Members(registry.Registry):
    """A registry, and whom it has dropped."""

    def __init__(self, key: bytes = KEY) -> None:
        self.dropped: list[registry.Memtap] = []
        super().__init__(key, self.dropped.append)


def session(datagram: bytes) -> int:
    return int(wire.HEADER.unpack_from(datagram)[3])


def greet(
    members: registry.Registry, hello: bytes, address: endpoint.Address = HOME
) -> registry.Memtap | None:
    return members.greet(session(hello), memoryview(hello), address, 0.0)


def take(
    members: registry.Registry, datagram: bytes, address: endpoint.Address = HOME, now: float = 0.0
) -> tuple[registry.Memtap, bytes] | None:
    return members.open(session(datagram), memoryview(datagram), address, now)


def attach(memtap: Memtap, members: registry.Registry, everyone: int = 0) -> registry.Memtap:
    """The whole greeting."""
    member = greet(members, memtap.hello())
    assert member is not None
    welcome = member.sealer.seal(wire.WELCOME, wire.encode_session(everyone))
    assert memtap.attachment.welcome(session(welcome), memoryview(welcome))
    return member


def test_greeting() -> None:
    memtap, members = Memtap(), Members()
    member = attach(memtap, members, everyone=5)
    assert memtap.attachment.attached
    assert set(memtap.attachment.openers) == {member.sealer.session, 5}
    assert members.confirmed == 0
    opened = take(members, memtap.request())
    assert opened is not None
    assert opened[0] is member
    assert wire.decode_request(opened[1]).runs == [wire.Run(1, 2, 3)]
    assert members.confirmed == 1
    assert members.receivers() == [member]


def test_greets_until_answered() -> None:
    memtap = Memtap()
    due = 100.0
    waits = []
    for _ in range(10):
        due, last = memtap.attachment.greet(due), due
        waits.append(due - last)
    assert len(memtap.sent) == 10
    assert waits == sorted(waits)
    assert waits[0] < waits[-1] <= 2.0
    memtap.attachment.greet(due - 0.01)
    assert len(memtap.sent) == 10
    assert len({session(datagram) for datagram, _ in memtap.sent}) == 1


def test_asks_the_next_server() -> None:
    memtap = Memtap()
    servers = []
    for _ in range(4):
        memtap.hello()
        servers.append(memtap.sent[-1][1])
        memtap.attachment.lose(memtap.now)
    assert servers in (SERVERS * 2, SERVERS[::-1] * 2)


def test_without_the_key() -> None:
    memtap, members = Memtap(bytes(32)), Members()
    assert greet(members, memtap.hello()) is None
    assert members.refused() == (1, 0)


def test_an_impostor_does_not_attach_a_memtap() -> None:
    memtap, members = Memtap(), Members(bytes(32))
    memtap.hello()
    sealer = wire.Sealer(5, wire.session_key(bytes(32), "answer", session(memtap.sent[0][0]), 5))
    forged = sealer.seal(wire.WELCOME, wire.encode_session(0))
    assert not memtap.attachment.welcome(5, memoryview(forged))
    assert not memtap.attachment.attached
    assert memtap.attachment.refused() == (1, 0)
    assert members.confirmed == 0


def test_an_old_welcome_answers_no_new_hello() -> None:
    memtap, members = Memtap(), Members()
    member = greet(members, memtap.hello())
    assert member is not None
    welcome = member.sealer.seal(wire.WELCOME, wire.encode_session(0))
    memtap.attachment.lose(memtap.now)
    memtap.hello()
    assert not memtap.attachment.welcome(session(welcome), memoryview(welcome))
    assert not memtap.attachment.attached


def test_a_welcome_of_the_wrong_form() -> None:
    memtap, members = Memtap(), Members()
    member = greet(members, memtap.hello())
    assert member is not None
    wrong = member.sealer.seal(wire.WELCOME, b"123")
    with pytest.raises(ValueError, match="wrong length"):
        memtap.attachment.welcome(session(wrong), memoryview(wrong))
    assert not memtap.attachment.attached


def test_a_replayed_hello_moves_nobody() -> None:
    memtap, members = Memtap(), Members()
    hello = memtap.hello()
    member = greet(members, hello)
    assert member is not None
    assert greet(members, hello, AWAY) is None
    assert member.address == HOME
    attach(memtap, members)
    assert take(members, memtap.request()) is not None
    assert greet(members, hello, AWAY) is None
    again = greet(members, memtap.attachment._hello.seal(wire.HELLO, bytes(8)), AWAY)
    assert again is member
    assert member.address == HOME


def test_a_replayed_hello_locks_nobody_out() -> None:
    memtap, members = Memtap(), Members()
    unheard = memtap.hello()
    assert greet(members, unheard, AWAY) is not None
    member = greet(members, memtap.hello())
    assert member is not None
    assert member.address == HOME


def test_a_replayed_hello_confirms_nobody() -> None:
    memtap, members = Memtap(), Members()
    attach(memtap, members)
    take(members, memtap.request())
    memtap.attachment.lose(memtap.now)
    unheard = memtap.hello()
    assert greet(members, unheard, AWAY) is not None
    assert members.confirmed == 1
    assert [member.address for member in members.receivers()] == [HOME]


def test_a_replayed_request_moves_nobody() -> None:
    memtap, members = Memtap(), Members()
    member = attach(memtap, members)
    request = memtap.request()
    assert take(members, request) is not None
    assert take(members, request, AWAY) is None
    assert member.address == HOME
    assert members.refused() == (0, 1)


def test_a_memtap_may_move() -> None:
    memtap, members = Memtap(), Members()
    member = attach(memtap, members)
    assert take(members, memtap.request()) is not None
    assert take(members, memtap.request(), AWAY) is not None
    assert member.address == AWAY


def test_whoever_greets_again_is_one_memtap() -> None:
    memtap, members = Memtap(), Members()
    first = attach(memtap, members)
    old = memtap.request()
    take(members, old)
    memtap.attachment.lose(memtap.now)
    member = attach(memtap, members)
    assert take(members, memtap.request()) is not None
    assert members.receivers() == [member]
    assert members.dropped == [first]
    assert members.confirmed == 1
    assert take(members, old) is None


def test_requests_of_another_server_are_refused() -> None:
    memtap, first, second = Memtap(), Members(), Members()
    hello = memtap.hello()
    member = greet(first, hello)
    assert member is not None
    welcome = member.sealer.seal(wire.WELCOME, wire.encode_session(0))
    memtap.attachment.welcome(session(welcome), memoryview(welcome))
    assert greet(second, hello) is not None
    assert take(second, memtap.request()) is None
    assert second.refused() == (1, 0)
    assert second.confirmed == 0


def test_whoever_is_silent_is_forgotten() -> None:
    memtap, members = Memtap(), Members()
    member = attach(memtap, members)
    take(members, memtap.request(), now=0.0)
    members.drop_silent(1.0)
    assert members.dropped == []
    members.drop_silent(3600.0)
    assert members.dropped == [member]
    assert members.confirmed == 0
    assert members.receivers() == []
    assert take(members, memtap.request()) is None


def test_whoever_has_nothing_to_ask_is_not_silent() -> None:
    memtap, members = Memtap(), Members()
    attach(memtap, members)
    now = 0.0
    while now < 3600.0:
        sent = len(memtap.sent)
        memtap.attachment.keep_alive(now)
        for datagram, _ in memtap.sent[sent:]:
            assert take(members, datagram, now=now) is not None
        members.drop_silent(now)
        assert members.dropped == []
        now += 1.0
    assert len(memtap.sent) < 3600


def test_strangers_do_not_drive_out_memtaps() -> None:
    members = Members()
    memtap = Memtap()
    attach(memtap, members)
    take(members, memtap.request())
    for _ in range(3000):
        number = wire.new_session()
        sealer = wire.Sealer(number, wire.session_key(KEY, "hello", number))
        assert greet(members, sealer.seal(wire.HELLO, bytes(8)), AWAY) is not None
    assert take(members, memtap.request()) is not None


def test_many_runs_are_several_requests() -> None:
    memtap, members = Memtap(), Members()
    attach(memtap, members)
    runs = [wire.Run(1, 2 * page, 1) for page in range(1000)]
    sent = len(memtap.sent)
    memtap.attachment.request(wire.BACKGROUND, runs, 0.0)
    asked: list[wire.Run] = []
    for datagram, address in memtap.sent[sent:]:
        assert len(datagram) + 48 <= wire.MINIMUM_MTU
        assert address in SERVERS
        opened = take(members, datagram)
        assert opened is not None
        asked += wire.decode_request(opened[1]).runs
    assert asked == runs


def test_good_bye() -> None:
    memtap, members = Memtap(), Members()
    member = attach(memtap, members)
    take(members, memtap.request())
    memtap.attachment.leave()
    opened = take(members, memtap.last(wire.BYE))
    assert opened is not None
    members.drop(member)
    assert members.confirmed == 0
    assert not memtap.attachment.attached
    sent = len(memtap.sent)
    memtap.attachment.leave()
    memtap.attachment.request(wire.FAULT, [wire.Run(1, 2, 3)], 0.0)
    assert len(memtap.sent) == sent
