# SPDX-License-Identifier: Apache-2.0
"""The agents of a host's guests: each speaks for its own server, and none keeps others waiting."""

from collections.abc import Callable, Iterator
import json
import random
import socket
import struct
import threading
from typing import Any

import pytest

from nova_snowflock import exception
from nova_snowflock.guest import protocol
from nova_snowflock.virt.agents import agents as host_agents
from nova_snowflock.virt.agents import calls as guest_calls
from nova_snowflock.virt.agents import channel as agent_channel
from tests.unit.virt.agents.guests import TIMEOUT
from tests.unit.virt.agents.guests import Clock
from tests.unit.virt.agents.guests import Guest
from tests.unit.virt.agents.guests import until
from tests.unit.virt.agents.world import Asked

A = "11111111-1111-4111-8111-111111111111"
B = "22222222-2222-4222-8222-222222222222"
FORK = "ffffffff-0000-4000-8000-000000000001"


class Calls:
    """Answers with what was asked, when it may."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.go_on = threading.Event()
        self.go_on.set()
        self.answers: Callable[[dict[str, Any], guest_calls.Part], dict[str, Any]] = (
            lambda arguments, part: arguments
        )
        self.swept = 0

    def answer(
        self,
        server: str,
        request: str,
        call: str,
        arguments: dict[str, Any],
        part: guest_calls.Part,
    ) -> dict[str, Any]:
        self.asked.append((server, request, call, arguments))
        assert self.go_on.wait(TIMEOUT)
        return self.answers(arguments, part)

    def sweep(self) -> None:
        self.swept += 1


class Host:
    def __init__(self) -> None:
        self.calls = Calls()
        self.guests: dict[str, Guest] = {}
        self.connected: list[str] = []
        self.online: list[tuple[str, Any]] = []
        self.has_link = True
        self.opened: Callable[[], list[str]] = lambda: list(self.guests)
        self.on_connect: Callable[[str], None] = lambda server: None
        self.describe: Callable[[str], protocol.Message] = lambda server: {
            "type": "you",
            "server": server,
        }
        calls: Any = self.calls
        self.agents = host_agents.Agents(
            self._connect,
            lambda: self.opened(),
            lambda server: self.describe(server),
            self._go_online,
            calls,
        )

    def _connect(self, server: str) -> socket.socket:
        self.connected.append(server)
        self.on_connect(server)
        ours, guests = socket.socketpair()
        self.guests[server] = Guest(guests)
        return ours

    def _go_online(self, server: str, itself: protocol.Message) -> bool:
        self.online.append((server, itself.get("reseeded")))
        return self.has_link

    def guest(self, server: str = A) -> Guest:
        """A guest that is heard, and knows it."""
        self.agents.watch(server)
        assert self.guests[server].hear() == {"type": "you", "server": server}
        return self.guests[server]

    def is_heard(self, server: str = A) -> bool:
        return server in self.agents._guests


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(agent_channel, "time", clock)
    return clock


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.calls.go_on.set()
    for guest in host.guests.values():
        guest.connection.close()
    until(lambda: not host.agents._guests)
    until(lambda: not host.agents._requests)


# Who is who


def test_you(host: Host) -> None:
    guest = host.guest()
    guest.say("hello", version=1, agent="1.0")
    assert guest.hear() == {"type": "you", "server": A}


def test_clone_is_told_at_once(host: Host) -> None:
    host.agents.watch(A, {"type": "you", "server": "given"})
    assert host.guests[A].hear()["server"] == "given"
    # Who is heard already, is told too.
    host.agents.watch(A, {"type": "you", "server": "again"})
    assert host.guests[A].hear()["server"] == "again"
    host.agents.watch(A)
    assert host.connected == [A]


def test_each_is_itself(host: Host) -> None:
    for server in (A, B):
        host.guest(server)
    for server in (B, A):
        host.guests[server].say("hello", server=A)
        assert host.guests[server].hear()["server"] == server


@pytest.mark.parametrize("reseeded", [True, False, 1])
def test_online(host: Host, reseeded: Any) -> None:
    guest = host.guest()
    guest.say("self", fork=FORK, problems=[], reseeded=reseeded)
    assert guest.hear() == {"type": "online"}
    assert host.online == [(A, reseeded)]


def test_not_online(host: Host) -> None:
    host.has_link = False
    guest = host.guest()
    guest.say("self", fork=FORK, problems=[], reseeded=True)
    guest.say("hello")
    assert guest.hear()["type"] == "you"
    assert host.online == [(A, True)]


# Forks


def quiesce(host: Host, *, seconds: float = TIMEOUT, is_open: bool = True) -> host_agents.Quiesced:
    return host.agents.quiesce(A, is_open, FORK, {"a": "b"}, [{"mac": "x"}], seconds)


def test_quiesce(host: Host) -> None:
    guest = host.guest()
    asked = Asked(quiesce, host)
    guest.say("hello")
    assert guest.hear("prefork") == {
        "type": "prefork",
        "fork": FORK,
        "params": {"a": "b"},
        "seconds": TIMEOUT,
        "interfaces": [{"mac": "x"}],
    }
    guest.say("ready", fork=FORK, problems=[])
    assert asked.result() == host_agents.Quiesced(True, [])
    host.agents.forked(A, FORK, {"a": "b"})
    parent = {"type": "parent", "fork": FORK, "params": {"a": "b"}}
    assert guest.hear() == {**parent, "error": None}
    host.agents.forked(A, FORK, {"a": "b"}, "no")
    assert guest.hear() == {**parent, "error": "no"}


def test_quiesce_is_the_first_to_talk_to_it(host: Host) -> None:
    asked = Asked(quiesce, host)
    until(lambda: A in host.guests)
    guest = host.guests[A]
    assert guest.hear()["type"] == "you"
    guest.say("hello")
    guest.hear("prefork")
    guest.say("ready", fork=FORK, problems=["the hook a failed\nagain\x1b[31m\ud800", "b"])
    assert asked.result() == host_agents.Quiesced(True, ["the hook a failed again [31m ", "b"])


@pytest.mark.parametrize(
    "problems",
    [None, "text", 1, {}, [None], [1], [[[]]], [{"a": "b"}]],
)
def test_problems_that_are_none(host: Host, problems: Any) -> None:
    guest = host.guest()
    asked = Asked(quiesce, host)
    guest.say("hello")
    guest.hear("prefork")
    guest.say("ready", fork=FORK, problems=problems)
    assert asked.result() == host_agents.Quiesced(True, [])


def test_many_problems(host: Host) -> None:
    guest = host.guest()
    asked = Asked(quiesce, host)
    guest.say("hello")
    guest.hear("prefork")
    guest.say("ready", fork=FORK, problems=["x" * 500] * 100)
    assert asked.result().problems == ["x" * 200] * 20


def test_silent_agent(host: Host) -> None:
    guest = host.guest()
    guest.say("hello")
    guest.hear("you")
    quiesced = quiesce(host, seconds=0.01)
    assert quiesced.agent
    [problem] = quiesced.problems
    assert "0.01 s" in problem


@pytest.mark.parametrize("fork", ["another", None, [FORK], {}])
def test_ready_for_another_fork(host: Host, fork: Any) -> None:
    guest = host.guest()
    guest.say("ready", fork=fork, problems=[])
    guest.say("hello")
    guest.hear("you")
    assert quiesce(host, seconds=0.01).problems


def test_ready_counts_once(host: Host) -> None:
    guest = host.guest()
    guest.say("ready", fork=FORK, problems=["early"])
    guest.say("hello")
    guest.hear("you")
    assert quiesce(host).problems == ["early"]
    assert quiesce(host, seconds=0.01).problems != ["early"]


def test_absent_agent(host: Host) -> None:
    assert quiesce(host, is_open=False) == host_agents.Quiesced(False, [])
    assert host.connected == []


def test_agent_that_does_not_answer(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_agents, "_ANSWER", 0.01)
    host.guest()
    quiesced = quiesce(host)
    assert not quiesced.agent
    assert "does not answer" in quiesced.problems[0]


def test_port_that_cannot_be_had(host: Host) -> None:
    def fail(server: str) -> None:
        raise FileNotFoundError("it has ended")

    host.on_connect = fail
    assert not quiesce(host).agent
    assert not host.is_heard()


def test_fork_with_more_than_a_message_holds(host: Host) -> None:
    """It is forked all the same, and not told."""
    guest = host.guest()
    guest.say("hello")
    guest.hear("you")
    params = {str(n): "\N{SNOWFLAKE}" * 255 for n in range(64)}
    quiesced = host.agents.quiesce(A, True, FORK, params, [], 0.01)
    assert quiesced.agent
    assert quiesced.problems
    host.agents.forked(A, FORK, params)
    guest.say("hello")
    assert guest.hear()["type"] == "you"


def test_forked_without_agent(host: Host) -> None:
    host.agents.forked(A, FORK, {})
    assert host.connected == []


# Requests


def test_request(host: Host) -> None:
    guest = host.guest()
    guest.ask("r", "call", a="b")
    assert guest.hear() == {"type": "answer", "id": "r", "result": {"a": "b"}}
    assert host.calls.asked == [(A, "r", "call", {"a": "b"})]
    # It was answered, so it may be asked again: whoever answers knows it.
    guest.ask("r", "call")
    assert guest.hear()["result"] == {}


def test_request_with_parts(host: Host) -> None:
    def answers(arguments: dict[str, Any], part: guest_calls.Part) -> dict[str, Any]:
        part(1, 0, "QQ==")
        part(2, 5, "")
        return {}

    host.calls.answers = answers
    guest = host.guest()
    guest.ask("r")
    assert [guest.hear() for _ in range(3)] == [
        {"type": "part", "id": "r", "clone_id": 1, "offset": 0, "data": "QQ=="},
        {"type": "part", "id": "r", "clone_id": 2, "offset": 5, "data": ""},
        {"type": "answer", "id": "r", "result": {}},
    ]


def test_errors(host: Host) -> None:
    errors = iter([guest_calls.CallError("refused", "no"), ZeroDivisionError("secret")])

    def answers(arguments: dict[str, Any], part: guest_calls.Part) -> dict[str, Any]:
        raise next(errors)

    host.calls.answers = answers
    guest = host.guest()
    guest.ask("r")
    assert guest.hear() == {
        "type": "answer",
        "id": "r",
        "error": {"kind": "refused", "message": "no"},
    }
    guest.ask("s")
    answer = guest.hear()
    assert answer["error"]["kind"] == "failed"
    assert "secret" not in str(answer)


def test_answer_that_is_too_long(host: Host) -> None:
    def answers(arguments: dict[str, Any], part: guest_calls.Part) -> dict[str, Any]:
        return {"a": "x" * protocol.MAX_LINE}

    host.calls.answers = answers
    guest = host.guest()
    guest.ask("r")
    answer = guest.hear()
    assert (answer["id"], answer["error"]["kind"]) == ("r", "failed")


def test_busy(host: Host) -> None:
    host.calls.go_on.clear()
    guest, other = host.guest(A), host.guest(B)
    for n in range(9):
        guest.ask(str(n))
    busy = guest.hear()
    assert (busy["id"], busy["error"]["kind"]) == ("8", "busy")
    until(lambda: len(host.calls.asked) == 8)
    # Others are not.
    other.ask("x")
    until(lambda: len(host.calls.asked) == 9)
    host.calls.go_on.set()
    assert sorted(guest.hear()["id"] for _ in range(8)) == list("01234567")
    assert other.hear()["id"] == "x"
    guest.ask("9")
    assert guest.hear()["result"] == {}


def test_same_request_twice(host: Host) -> None:
    host.calls.go_on.clear()
    guest = host.guest()
    for _ in range(20):
        guest.ask("r")
    guest.say("hello")  # everything has been heard
    assert guest.hear()["type"] == "you"
    host.calls.go_on.set()
    assert guest.hear()["id"] == "r"
    until(lambda: not host.agents._requests)
    guest.ask("s")
    assert guest.hear()["id"] == "s"
    assert [asked[1] for asked in host.calls.asked] == ["r", "s"]


def test_same_request_of_two_guests(host: Host) -> None:
    host.calls.go_on.clear()
    for server in (A, B):
        host.guest(server).ask("r", "call", of=server)
    until(lambda: len(host.calls.asked) == 2)
    host.calls.go_on.set()
    for server in (A, B):
        assert host.guests[server].hear()["result"] == {"of": server}


def test_answer_on_another_connection(host: Host) -> None:
    """Also if the request is asked again there; it is done once."""
    host.calls.go_on.clear()
    guest = host.guest()
    guest.ask("r")
    until(lambda: host.calls.asked)
    guest.connection.close()
    until(lambda: not host.is_heard())
    again = host.guest()
    again.ask("r")
    again.say("hello")
    assert again.hear()["type"] == "you"
    host.calls.go_on.set()
    assert again.hear() == {"type": "answer", "id": "r", "result": {}}
    assert len(host.calls.asked) == 1


def test_answer_when_the_guest_is_gone(host: Host) -> None:
    host.calls.go_on.clear()
    guest = host.guest()
    guest.ask("r")
    until(lambda: host.calls.asked)
    guest.connection.close()
    until(lambda: not host.is_heard())
    host.calls.go_on.set()
    until(lambda: not host.agents._requests)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"id": "r"},
        {"id": "r", "call": "info"},
        {"id": "r", "call": "info", "arguments": []},
        {"id": "r", "call": "info", "arguments": None},
        {"id": "r", "call": 1, "arguments": {}},
        {"id": "", "call": "info", "arguments": {}},
        {"id": "x" * 65, "call": "info", "arguments": {}},
        {"id": 7, "call": "info", "arguments": {}},
        {"id": None, "call": "info", "arguments": {}},
        {"id": ["r"], "call": "info", "arguments": {}},
    ],
)
def test_requests_that_are_none(host: Host, fields: dict[str, Any]) -> None:
    guest = host.guest()
    guest.say("request", **fields)
    guest.say("hello")
    assert guest.hear()["type"] == "you"
    assert host.calls.asked == []
    assert host.agents._requests == {}


@pytest.mark.parametrize("identity", ["\0", "\ud800", "\N{SNOWFLAKE}" * 64, "../../x", "a\nb"])
def test_odd_requests(host: Host, identity: str) -> None:
    guest = host.guest()
    guest.ask(identity, "\0\ud800" * 1000)
    assert guest.hear() == {"type": "answer", "id": identity, "result": {}}


# What is not expected


def test_messages_that_make_no_sense(host: Host) -> None:
    guest = host.guest()
    values: list[Any] = [
        None,
        True,
        0,
        -1,
        10**300,
        "x" * 5000,
        "\ud800\0",
        [],
        {},
        [[[]]],
        {"a": {}},
    ]
    kinds = ["hello", "ready", "self", "done", "request", "you", "", "\0", "__class__"]
    choose = random.Random(7)
    names = ["fork", "problems", "reseeded", "id", "call", "arguments", "version"]
    for _ in range(500):
        fields = {name: choose.choice(values) for name in names}
        # Not requests that are answered: there is nobody who reads so much.
        kind = choose.choice(kinds)
        if kind == "request":
            fields["id"] = None
        guest.say(kind, **fields)
        if kind in ("hello", "self"):
            assert guest.hear()["type"] in ("you", "online")
    guest.say("hello")
    assert guest.hear()["type"] == "you"
    assert len(host.connected) == 1


def test_bytes_that_make_no_sense(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    guest, other = host.guest(A), host.guest(B)
    choose = random.Random(7)
    for _ in range(100):
        guest.send(choose.randbytes(choose.randrange(5000)))
    guest.send(b"\n")
    guest.say("hello")
    assert guest.hear()["type"] == "you"
    other.say("hello")
    assert other.hear()["type"] == "you"
    guest.connection.close()
    until(lambda: not host.is_heard())
    until(lambda: "make no sense" in caplog.text)
    assert len(caplog.records) == 1


def test_guest_that_nests_deep(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever depth can still be read: nothing is raised, and nothing logged."""
    guest = host.guest()
    for depth in range(100, 1000, 7):
        nested = "[" * depth + "]" * depth
        guest.send(f'{{"type":"ready","fork":"x","problems":[{nested}]}}\n'.encode())
        guest.send(f'{{"type":"done","problems":{nested}}}\n'.encode())
    guest.say("hello")
    assert guest.hear()["type"] == "you"
    assert caplog.records == []


def test_what_fails_is_passed_over(host: Host) -> None:
    guest = host.guest()

    def fail(server: str) -> protocol.Message:
        raise ZeroDivisionError

    describe, host.describe = host.describe, fail
    guest.say("hello")
    guest.ask("r")
    assert guest.hear()["id"] == "r"
    host.describe = describe
    guest.say("hello")
    assert guest.hear()["type"] == "you"


def test_logs_are_not_for_guests_to_fill(host: Host, caplog: pytest.LogCaptureFixture) -> None:
    guest = host.guest()
    for _ in range(50):
        guest.say("done", fork=FORK, problems=["x\r\nINFO forged", "y" * 1000])
        guest.say("self", fork=FORK, problems=["z"])
        assert guest.hear()["type"] == "online"
    assert len(caplog.records) == 20
    assert "x  INFO forged" in caplog.text
    assert "y" * 201 not in caplog.text


def test_flood(host: Host, clock: Clock) -> None:
    guest = host.guest()
    for _ in range(200):
        guest.say("hello")
        assert guest.hear()["type"] == "you"
    assert clock.slept


# Guests that keep their host waiting


class _Soon:
    @staticmethod
    def pack(seconds: int, microseconds: int) -> bytes:
        return struct.pack("@ll", 0, 20000)


def test_guest_that_does_not_read(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_channel, "_TIMEVAL", _Soon)
    host.guest(A)
    other = host.guest(B)
    params = {"x": "x" * 60000}

    def tell() -> None:
        while host.is_heard(A):
            host.agents.forked(A, FORK, params)

    dropped = Asked(tell)
    other.ask("r")
    assert other.hear()["id"] == "r"
    dropped.result()
    # It is heard anew.
    host.guests[A].connection.close()
    guest = host.guest(A)
    guest.say("hello")
    assert guest.hear()["type"] == "you"


def test_guest_that_asks_and_does_not_read(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agent_channel, "_TIMEVAL", _Soon)

    def answers(arguments: dict[str, Any], part: guest_calls.Part) -> dict[str, Any]:
        for _ in range(100):
            part(1, 0, "x" * 60000)
        return {}

    host.calls.answers = answers
    guest = host.guest()
    for n in range(8):
        guest.ask(str(n))
    until(lambda: not host.is_heard())
    until(lambda: not host.agents._requests)


def test_connection_that_takes_long(host: Host) -> None:
    """Others are connected to, heard and answered meanwhile."""
    begun, go_on = threading.Event(), threading.Event()

    def slowly(server: str) -> None:
        if server == A:
            begun.set()
            assert go_on.wait(TIMEOUT)

    host.on_connect = slowly
    first, second = Asked(host.agents.watch, A), Asked(host.agents.watch, A)
    assert begun.wait(TIMEOUT)
    try:
        other = Asked(host.guest, B).result()
        other.ask("r")
        assert other.hear()["id"] == "r"
    finally:
        go_on.set()
    for watching in (first, second):
        watching.result()
    assert host.connected.count(A) == 1


def test_clone_that_does_not_read_when_it_is_told(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That it is told again keeps nobody else waiting."""
    host.guest(A)
    begun, go_on = threading.Event(), threading.Event()

    def say(self: Any, message: protocol.Message) -> None:
        begun.set()
        assert go_on.wait(TIMEOUT)

    with monkeypatch.context() as patch:
        patch.setattr(host.agents._guests[A].channel, "say", say.__get__(host))
        told = Asked(host.agents.watch, A, {"type": "you"})
        assert begun.wait(TIMEOUT)
        try:
            other = Asked(host.guest, B).result()
            other.ask("r")
            assert other.hear()["id"] == "r"
        finally:
            go_on.set()
        told.result()


# Looks


@pytest.mark.parametrize(
    "error", [OSError("no"), exception.ControlError("no"), ValueError("no"), KeyError("no")]
)
def test_guest_that_makes_trouble(host: Host, error: Exception) -> None:
    """Others are looked for all the same, and so it is with what else is to be done."""

    def fail(server: str) -> None:
        if server == A:
            raise error

    host.on_connect = fail
    host.opened = lambda: [A, B]
    host.agents._look_once()
    assert host.is_heard(B)
    assert not host.is_heard(A)
    assert host.calls.swept == 1
    host.on_connect = lambda server: None
    host.agents._look_once()
    assert host.is_heard(A)
    assert host.connected.count(B) == 1


def test_looks_that_fail(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = iter([OSError("libvirt"), None])
    seen = threading.Event()

    def opened() -> list[str]:
        error = next(looks, None)
        if error is not None:
            raise error
        seen.set()
        return [B]

    class Time:
        """Lets it look twice."""

        def __init__(self) -> None:
            self.looks = threading.Semaphore(2)

        def sleep(self, seconds: float) -> None:
            assert seconds == host_agents._LOOK_AGAIN
            self.looks.acquire()

    host.opened = opened
    monkeypatch.setattr(host_agents, "time", Time())
    host.agents.start()
    assert seen.wait(TIMEOUT)
    until(lambda: host.is_heard(B))


def test_server_that_is_not_known(host: Host) -> None:
    """It is deleted, for example: the connection goes, and comes when it is known."""

    def fail(server: str) -> protocol.Message:
        raise KeyError(server)

    describe, host.describe = host.describe, fail
    host.agents.watch(A)
    with pytest.raises(EOFError):
        host.guests[A].hear()
    until(lambda: not host.is_heard())
    host.describe = describe
    host.guest()


def test_no_thread_is_left(host: Host) -> None:
    before = set(threading.enumerate())
    for _ in range(5):
        guest = host.guest()
        guest.ask("r")
        guest.hear("answer")
        guest.connection.close()
        until(lambda: not host.is_heard())
    until(lambda: set(threading.enumerate()) <= before)


def test_messages_are_json() -> None:
    """What hosts say can be read by any agent."""
    said = protocol.encode({"type": "you", "name": "\N{SNOWFLAKE}\n"})
    assert said.count(b"\n") == 1
    assert said.isascii()
    assert json.loads(said)["name"] == "\N{SNOWFLAKE}\n"
