# SPDX-License-Identifier: Apache-2.0
"""A guest may say anything, as often as it likes, or nothing; and may not listen."""

from collections.abc import Iterator
import contextlib
import json
import socket
import struct
import threading
from typing import Any

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies
import pytest

from nova_snowflock.guest import protocol
from nova_snowflock.virt.agents import channel as agent_channel
from tests.unit.virt.agents.guests import TIMEOUT
from tests.unit.virt.agents.guests import Clock
from tests.unit.virt.agents.guests import Guest
from tests.unit.virt.agents.world import Asked

_MS = 1000


class _Soon:
    """A socket's timeouts, all of which are short."""

    @staticmethod
    def pack(seconds: int, microseconds: int) -> bytes:
        return struct.pack("@ll", 0, 20 * _MS)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(agent_channel, "time", clock)
    return clock


def connected() -> tuple[agent_channel.Channel, Guest]:
    ours, guests = socket.socketpair()
    return agent_channel.Channel(ours), Guest(guests)


@pytest.fixture
def both() -> Iterator[tuple[agent_channel.Channel, Guest]]:
    channel, guest = connected()
    yield channel, guest
    channel.close()
    guest.connection.close()


def heard(data: bytes) -> tuple[list[protocol.Message], int]:
    """What there is in what a guest says, and how many lines made no sense."""
    channel, guest = connected()

    def say() -> None:
        guest.send(data)
        guest.connection.close()

    saying = Asked(say)
    messages = list(channel.messages())
    saying.result()
    channel.close()
    return messages, channel.dropped


def test_begins_with_the_end_of_a_line(both: tuple[agent_channel.Channel, Guest]) -> None:
    assert both[1].connection.recv(100) == b"\n"


def test_both_ways(both: tuple[agent_channel.Channel, Guest]) -> None:
    channel, guest = both
    channel.say({"type": "you", "name": "\N{SNOWFLAKE}"})
    assert guest.hear() == {"type": "you", "name": "\N{SNOWFLAKE}"}
    guest.say("hello", version=1)
    assert next(channel.messages()) == {"type": "hello", "version": 1}


def test_lines_that_make_no_sense(clock: Clock) -> None:
    nonsense = [
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"\0",
        b'"hello"',
        b'{"type":1}',
        b'{"type":null}',
        b'{"type":["hello"]}',
        b'{"type":"x","n":' + b"9" * 60000 + b"}",
        b"[" * 60000,
        b'{"type":"x","a":' + b"[" * 60000,
        b'{"a":' * 10000,
        b"x" * (1 << 20),
    ]
    said = b"".join(line + b"\n" for line in nonsense)
    messages, dropped = heard(said + b'\n\n{"type":"hello"}\n')
    assert messages == [{"type": "hello"}]
    assert dropped == len(nonsense)


def test_odd_but_messages(clock: Clock) -> None:
    messages, dropped = heard(b'{"type":"\\ud800\\u0000","a":1e999,"a":NaN}\n')
    assert [message["type"] for message in messages] == ["\ud800\0"]
    assert dropped == 0


_JSON = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats()
    | strategies.text(),
    lambda inner: strategies.lists(inner) | strategies.dictionaries(strategies.text(), inner),
)
_LINES = strategies.lists(
    strategies.binary()
    | _JSON.map(lambda value: json.dumps(value).encode())
    | strategies.dictionaries(strategies.just("type"), _JSON).map(
        lambda value: json.dumps(value).encode()
    )
)


@settings(max_examples=200, deadline=None)
@given(_LINES)
def test_anything(lines: list[bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agent_channel, "time", Clock())
        messages, _ = heard(b"\n".join(lines) + b'\n{"type":"last"}\n')
    assert messages[-1] == {"type": "last"}
    for message in messages:
        assert isinstance(message["type"], str)


# Floods


def test_flood_of_bytes_is_slowed_down(clock: Clock) -> None:
    size = agent_channel._BURST + (10 << 20)
    line = b"x" * 1023 + b"\n"
    heard(line * (size >> 10))
    assert sum(clock.slept) == pytest.approx(10.0)


def test_flood_of_messages_is_slowed_down(clock: Clock) -> None:
    """Also if they are short: each is handled."""
    most = agent_channel._BURST // agent_channel._COST
    messages, _ = heard(b'{"type":"x"}\n' * (most + 160))
    assert len(messages) == most + 160
    assert sum(clock.slept) == pytest.approx(10.0)


def test_flood_is_slowed_down_before_it_is_handled(clock: Clock) -> None:
    """Thousands of messages fit into what is read at once."""
    most = agent_channel._BURST // agent_channel._COST
    channel, guest = connected()
    guest.send(b'{"type":"x"}\n' * (most + 2))
    messages = channel.messages()
    slept = []
    for _ in range(most + 2):
        next(messages)
        slept.append(len(clock.slept))
    assert slept == [0] * most + [1, 2]
    assert max(clock.slept) <= agent_channel._COST / agent_channel._RATE
    channel.close()
    guest.connection.close()


def test_allowance_comes_back(clock: Clock) -> None:
    channel, guest = connected()
    messages = channel.messages()
    most = agent_channel._BURST // agent_channel._COST
    for _ in range(2):
        clock.now += 1e6
        for _ in range(most):
            guest.say("x")
            next(messages)
    assert clock.slept == []
    guest.say("x")
    next(messages)
    assert len(clock.slept) == 1
    channel.close()
    guest.connection.close()


def test_usual_talk_is_not_slowed_down(clock: Clock) -> None:
    """A large message counts once."""
    count = agent_channel._BURST // agent_channel._COST
    line = json.dumps({"type": "x", "data": "x" * 65000}).encode().ljust(65535) + b"\n"
    messages, _ = heard(line * (count // 2))
    assert len(messages) == count // 2
    assert clock.slept == []


# Guests that do not listen


def test_hearing_waits_and_speaking_does_not() -> None:
    ours, guests = socket.socketpair()
    ours.settimeout(1)
    channel = agent_channel.Channel(ours)
    assert ours.gettimeout() is None
    option = ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16)
    assert struct.unpack("@ll", option) == (agent_channel._SEND_TIMEOUT, 0)
    channel.close()
    guests.close()


def _speak_until_closed(channel: agent_channel.Channel) -> None:
    while True:
        channel.say({"type": "x", "data": "x" * 60000})


def test_guest_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_channel, "_TIMEVAL", _Soon)
    channel, guest = connected()
    hearing = Asked(lambda: list(channel.messages()))
    with pytest.raises(agent_channel.Closed):
        _speak_until_closed(channel)
    assert hearing.result() == []  # the connection is given up
    with pytest.raises(agent_channel.Closed):
        channel.say({"type": "x"})
    channel.close()
    guest.connection.close()


def test_guest_that_does_not_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_channel, "_TIMEVAL", _Soon)
    ours, guests = socket.socketpair()
    ours.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            ours.send(b"x" * 65536)
    with pytest.raises(agent_channel.Closed):
        agent_channel.Channel(ours)
    assert ours.fileno() == -1
    guests.close()


@pytest.mark.parametrize("by", ["guest", "host"])
def test_end(by: str) -> None:
    channel, guest = connected()
    hearing = Asked(lambda: list(channel.messages()))
    if by == "guest":
        guest.connection.close()
    else:
        channel.close()
        channel.close()
    assert hearing.result() == []
    with pytest.raises(agent_channel.Closed):
        _speak_until_closed(channel)
    channel.close()


def test_close_waits_for_who_speaks() -> None:
    """Or its descriptor could have become another guest's."""
    ours, guests = socket.socketpair()
    begun, go_on = threading.Event(), threading.Event()
    descriptors: list[int] = []

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(ours, name)

        def sendall(self, data: bytes) -> None:
            if data != b"\n":
                begun.set()
                assert go_on.wait(TIMEOUT)
                descriptors.append(ours.fileno())
            ours.sendall(data)

        def shutdown(self, how: int) -> None:
            ours.shutdown(how)
            go_on.set()

    slow: Any = Slow()
    channel = agent_channel.Channel(slow)
    speaking = Asked(channel.say, {"type": "x"})
    assert begun.wait(TIMEOUT)
    channel.close()
    with pytest.raises(agent_channel.Closed):
        speaking.result()
    [descriptor] = descriptors
    assert descriptor >= 0
    assert ours.fileno() == -1
    guests.close()


def test_many_speak() -> None:
    """Each says whole messages."""
    channel, guest = connected()

    def speak(number: int) -> None:
        for _ in range(20):
            channel.say({"type": "x", "n": number, "x": "x" * 9999})

    speakers = [Asked(speak, number) for number in range(8)]
    said = sorted(guest.hear()["n"] for _ in range(160))
    assert said == sorted(list(range(8)) * 20)
    for speaker in speakers:
        speaker.result()
    channel.close()
    guest.connection.close()


def test_what_is_too_long_is_not_said(both: tuple[agent_channel.Channel, Guest]) -> None:
    channel, guest = both
    with pytest.raises(ValueError, match="longer"):
        channel.say({"type": "x", "data": "x" * protocol.MAX_LINE})
    channel.say({"type": "y"})
    assert guest.hear() == {"type": "y"}
