# SPDX-License-Identifier: Apache-2.0
"""SnowFlock's API for programs, over a real socket."""

import base64
from collections.abc import Callable, Iterator
import json
import os
import pathlib
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from nova_snowflock import guest
from nova_snowflock.guest import client
from tests.unit.guest import agents


@pytest.fixture
def agent(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[agents.Agent]:
    agent = agents.Agent(tmp_path / "guest.sock")
    monkeypatch.setenv("SNOWFLOCK_SOCKET", agent.path)
    yield agent
    agent.close()
    assert agent.wrong == []


def test_request_ticket(agent: agents.Agent) -> None:
    agent.answers["request_ticket"] = {"ticket": "t", "n": 3}
    assert guest.request_ticket(8) == guest.Ticket("t", 3)
    assert agent.calls == [("request_ticket", {"n": 8})]


@pytest.mark.parametrize("clone_id", [0, 5])
def test_clone(agent: agents.Agent, clone_id: int) -> None:
    agent.answers["clone"] = {"clone_id": clone_id}
    assert guest.clone(guest.Ticket("t", 5)) == clone_id
    assert guest.clone("u", {"job": "\N{SNOWFLAKE}\n"}) == clone_id
    assert agent.calls == [
        ("clone", {"ticket": "t"}),
        ("clone", {"ticket": "u", "params": {"job": "\N{SNOWFLAKE}\n"}}),
    ]


@pytest.mark.parametrize("clone_id", [0, 2])
def test_fork(agent: agents.Agent, clone_id: int) -> None:
    agent.answers["request_ticket"] = {"ticket": "t", "n": 2}
    agent.answers["clone"] = {"clone_id": clone_id}
    assert guest.fork(4, {"a": "b"}) == (clone_id, guest.Ticket("t", 2))
    assert agent.calls == [
        ("request_ticket", {"n": 4}),
        ("clone", {"ticket": "t", "params": {"a": "b"}}),
    ]


def test_checkpoint(agent: agents.Agent) -> None:
    agent.answers["checkpoint_parent"] = {"checkpoint": "c", "clone_id": 0}
    agent.answers["create_clones"] = {}
    agent.answers["release"] = {}
    checkpoint = guest.checkpoint_parent({"a": "b"})
    assert checkpoint == guest.Checkpoint("c", 0)
    guest.create_clones(checkpoint, guest.Ticket("t", 1))
    guest.release(checkpoint)
    assert agent.calls == [
        ("checkpoint_parent", {"params": {"a": "b"}}),
        ("create_clones", {"checkpoint": "c", "ticket": "t"}),
        ("release", {"checkpoint": "c"}),
    ]


def test_kill(agent: agents.Agent) -> None:
    agent.answers["kill"] = {}
    guest.kill(guest.Ticket("t", 1))
    assert agent.calls == [("kill", {"ticket": "t"})]


def test_join(agent: agents.Agent) -> None:
    large = os.urandom(3 << 20)
    agent.answers["join"] = {
        "clones": [
            {
                "clone_id": 2,
                "status": 7,
                "error": None,
                "size": len(large),
                "result": base64.b64encode(large).decode(),
            },
            {"clone_id": 1, "status": None, "error": "it is gone", "size": 0, "result": ""},
        ]
    }
    assert guest.join(guest.Ticket("t", 2)) == [
        guest.Joined(1, None, "it is gone", b""),
        guest.Joined(2, 7, None, large),
    ]


def test_info(agent: agents.Agent) -> None:
    agent.answers["info"] = {
        "server": "s",
        "clone_id": 1,
        "fork": "f",
        "parent": "p",
        "params": {"a": "b"},
        "limit": 8,
        "tickets": [{"ticket": "t", "n": 2, "state": "granted"}],
        "of a later version": True,
    }
    held = guest.HeldTicket(guest.Ticket("t", 2), "granted")
    assert guest.info() == guest.Info("s", 1, "f", "p", {"a": "b"}, 8, (held,))


class Awake(Exception):
    """In place of sleeping forever."""


@pytest.mark.parametrize("size", [0, 1, 32 << 10, (32 << 10) + 1, 200_000])
def test_exit(agent: agents.Agent, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            raise Awake

    monkeypatch.setattr(time, "sleep", sleep)
    agent.answers["put"] = {}
    agent.answers["exit"] = {}
    result = os.urandom(size)
    with pytest.raises(Awake):
        guest.exit(9, result)
    *pieces, last = agent.calls
    assert last == ("exit", {"status": 9})
    sent = b""
    for call, arguments in pieces:
        assert call == "put"
        assert arguments["offset"] == len(sent)
        sent += base64.b64decode(arguments["data"])
    assert sent == result
    assert agent.connections == 1


def test_exit_that_is_refused_returns_to_the_caller(agent: agents.Agent) -> None:
    agent.answers["put"] = {}
    agent.answers["exit"] = agents.Refusal("refused", "this is no clone")
    with pytest.raises(guest.Refused, match="this is no clone"):
        guest.exit(0, b"x")
    agent.answers["put"] = agents.Refusal("refused", "too large")
    with pytest.raises(guest.Refused, match="too large"):
        guest.exit(0, b"x")
    assert [call for call, _ in agent.calls] == ["put", "exit", "put"]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("refused", guest.Refused),
        ("invalid", guest.Invalid),
        ("failed", guest.Failed),
        ("busy", guest.Busy),
        ("forked", guest.Forked),
        ("offline", guest.Offline),
        ("of a later version", guest.SnowFlockError),
        (["refused"], guest.SnowFlockError),
    ],
)
def test_kinds_of_errors(agent: agents.Agent, kind: Any, error: type[guest.SnowFlockError]) -> None:
    agent.answers["kill"] = agents.Refusal(kind, "a sentence")
    with pytest.raises(guest.SnowFlockError, match=r"^a sentence$") as raised:
        guest.kill("t")
    assert type(raised.value) is error
    assert raised.value.kind == (kind if error is not guest.SnowFlockError else "")


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"{\n",
        b"[]\n",
        b"\xff\n",
        b"null\n",
        b'{"result": []}\n',
        b'{"error": "refused"}\n',
        b'{"result": {}}\n',
        b'{"result": {"ticket": "t", "n": null}}\n',
        b'{"result": {"ticket": "t", "n": "many"}}\n',
        b"[" * 100_000 + b"\n",
    ],
)
def test_answers_that_make_no_sense(agent: agents.Agent, line: bytes) -> None:
    agent.answers["request_ticket"] = line
    with pytest.raises(guest.SnowFlockError, match=r"the agent's answer") as raised:
        guest.request_ticket(1)
    assert type(raised.value) is guest.SnowFlockError


@pytest.mark.parametrize(
    "clones", [None, {}, [None], [{}], [{"clone_id": 1, "status": 0, "error": None, "result": "x"}]]
)
def test_joins_that_make_no_sense(agent: agents.Agent, clones: Any) -> None:
    agent.answers["join"] = {"clones": clones} if clones != {} else {}
    with pytest.raises(guest.SnowFlockError, match="answer to join makes no sense"):
        guest.join("t")


@pytest.mark.parametrize("line", [b"", b'{"result": {"ticket": "t", '])
def test_an_agent_that_goes_away(agent: agents.Agent, line: bytes) -> None:
    def answer(arguments: dict[str, Any]) -> Any:
        # What is no line is followed by the end of the connection.
        return line

    agent.answers["request_ticket"] = answer
    if line:
        agent.answered = _break_off  # type: ignore[method-assign]
    with pytest.raises(guest.NoAgent, match="broke off"):
        guest.request_ticket(1)


def _break_off(pid: int, line: bytes) -> None:
    raise BrokenPipeError


def test_no_agent(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNOWFLOCK_SOCKET", str(tmp_path / "nothing"))
    calls: list[Callable[[], object]] = [
        guest.info,
        guest.fork,
        guest.checkpoint_parent,
        lambda: guest.join("t"),
        lambda: guest.exit(0),
    ]
    for call in calls:
        with pytest.raises(guest.NoAgent, match=r"no agent listens on .*/nothing: "):
            call()


def test_default_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SNOWFLOCK_SOCKET", raising=False)
    monkeypatch.setattr(client, "SOCKET", "/no/such/socket")
    with pytest.raises(guest.NoAgent, match="/no/such/socket"):
        guest.info()


def test_an_agent_that_does_not_listen(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Has too many connections, say: it tells, and closes, before it is asked."""
    path = tmp_path / "guest.sock"
    monkeypatch.setenv("SNOWFLOCK_SOCKET", str(path))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with client._Connection() as connection:
            accepted, _ = listener.accept()
            accepted.sendall(b'{"error": {"kind": "busy", "message": "too many"}}\n')
            accepted.close()
            with pytest.raises(guest.Busy, match="too many"):
                connection.ask("info", {})
        with client._Connection() as connection:
            listener.accept()[0].close()
            with pytest.raises(guest.NoAgent, match="broke off"):
                connection.ask("info", {})


def test_requests_that_are_too_long(agent: agents.Agent) -> None:
    with pytest.raises(guest.Invalid, match="longer than 65536"):
        guest.clone("t", {"a": "x" * (64 << 10)})
    assert agent.calls == []


def test_a_connection_goes_on_in_the_clones(agent: agents.Agent) -> None:
    """It was opened before the fork, and is asked on in each of them: processes, here."""
    agent.answers["info"] = {"a": 1}
    with client._Connection() as connection:
        for _ in range(2):
            child = os.fork()
            if not child:
                try:
                    os._exit(0 if connection.ask("info", {}) == {"a": 1} else 2)
                finally:
                    os._exit(1)
            assert os.waitpid(child, 0)[1] == 0
        assert connection.ask("info", {}) == {"a": 1}
    assert agent.connections == 1
    assert len(agent.calls) == 3


def test_descriptors_are_closed(agent: agents.Agent) -> None:
    agent.answers["kill"] = agents.Refusal("busy")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        with pytest.raises(guest.Busy):
            guest.kill("t")
    assert agent.connections == 5
    deadline = time.monotonic() + 10
    while len(os.listdir("/proc/self/fd")) > before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert len(os.listdir("/proc/self/fd")) == before


def test_imports_are_light() -> None:
    """The agent and every program pay for them."""
    code = "import sys, json; from nova_snowflock import guest; print(json.dumps([*sys.modules]))"
    shown = subprocess.run(
        [sys.executable, "-S", "-c", code], check=True, capture_output=True, text=True
    )
    heavy = {
        "asyncio",
        "concurrent",
        "email",
        "hashlib",
        "http",
        "logging",
        "multiprocessing",
        "ssl",
        "subprocess",
        "zipfile",
    }
    assert heavy & set(json.loads(shown.stdout)) == set()
