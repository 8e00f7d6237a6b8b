# SPDX-License-Identifier: Apache-2.0
"""The shell's ``snowflock``."""

import base64
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import pytest

from nova_snowflock.guest import client
from nova_snowflock.guest import command
from tests.unit.guest import agents

Capture = pytest.CaptureFixture[str]

INFO = {
    "server": "s",
    "clone_id": 1,
    "fork": "f",
    "parent": None,
    "params": {"b": "c d", "a": ""},
    "limit": 8,
    "tickets": [{"ticket": "t", "n": 2, "state": "granted"}],
}


@pytest.mark.parametrize(
    ("arguments", "answers", "calls", "out"),
    [
        (["request-ticket", "4"], {}, [("request_ticket", {"n": 4})], "a-ticket 4\n"),
        (["clone", "t"], {}, [("clone", {"ticket": "t"})], "0\n"),
        (
            ["clone", "t", "--param", "a=b=c", "--param", "d="],
            {"clone": {"clone_id": 3}},
            [("clone", {"ticket": "t", "params": {"a": "b=c", "d": ""}})],
            "3\n",
        ),
        (
            ["checkpoint", "--param", "a=b"],
            {"checkpoint_parent": {"checkpoint": "c", "clone_id": 2}},
            [("checkpoint_parent", {"params": {"a": "b"}})],
            "c 2\n",
        ),
        (
            ["create-clones", "c", "t"],
            {"create_clones": {}},
            [("create_clones", {"checkpoint": "c", "ticket": "t"})],
            "",
        ),
        (["kill", "t"], {"kill": {}}, [("kill", {"ticket": "t"})], ""),
        (["release", "c"], {"release": {}}, [("release", {"checkpoint": "c"})], ""),
        (
            ["fork", "2", "--param", "a=b"],
            {},
            [
                ("request_ticket", {"n": 2}),
                ("clone", {"ticket": "a-ticket", "params": {"a": "b"}}),
            ],
            "0 a-ticket\n",
        ),
        (
            ["fork"],
            {"clone": {"clone_id": 1}},
            [("request_ticket", {"n": 1}), ("clone", {"ticket": "a-ticket"})],
            "1 a-ticket\n",
        ),
        (
            ["info"],
            {"info": INFO},
            [("info", {})],
            "server s\nclone_id 1\nfork f\nparent -\nlimit 8\nparam a=\nparam b=c d\n"
            "ticket t 2 granted\n",
        ),
    ],
)
def test_calls(
    host: agents.Host,
    capsys: Capture,
    arguments: list[str],
    answers: dict[str, agents.Answer],
    calls: list[Any],
    out: str,
) -> None:
    host.answers.update(answers)
    assert command.main(arguments) == 0
    assert host.calls == calls
    assert capsys.readouterr() == (out, "")


def test_info_in_json(host: agents.Host, capsys: Capture) -> None:
    host.answers["info"] = INFO
    assert command.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == INFO


@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("refused", 3),
        ("invalid", 4),
        ("failed", 5),
        ("busy", 6),
        ("forked", 7),
        ("offline", 8),
        ("of a later version", 10),
    ],
)
def test_errors(host: agents.Host, capsys: Capture, kind: str, status: int) -> None:
    host.answers["kill"] = agents.Refusal(kind, "a sentence")
    assert command.main(["kill", "t"]) == status
    assert capsys.readouterr() == ("", "snowflock: a sentence\n")


def test_no_agent(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setenv("SNOWFLOCK_SOCKET", str(tmp_path / "nothing"))
    assert command.main(["info"]) == 9
    assert "nothing" in capsys.readouterr().err


def test_whoever_waits_may_interrupt(
    host: agents.Host, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def interrupt(ticket: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "join", interrupt)
    assert command.main(["join", "t"]) == 130
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    "arguments", [[], ["fly"], ["clone"], ["clone", "t", "--param", "x"], ["request-ticket", "x"]]
)
def test_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        command.main(arguments)
    assert raised.value.code == 2


def clone(clone_id: int, status: int | None, result: bytes, error: str | None) -> dict[str, Any]:
    data = base64.b64encode(result).decode()
    return {"clone_id": clone_id, "status": status, "error": error, "result": data}


def test_join(host: agents.Host, tmp_path: pathlib.Path, capsys: Capture) -> None:
    host.answers["join"] = {"clones": [clone(2, 0, b"\0two", None), clone(1, 0, b"one", None)]}
    directory = tmp_path / "a" / "b"
    assert command.main(["join", "t", "--directory", str(directory)]) == 0
    assert capsys.readouterr().out == "1 0 3\n2 0 4\n"
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == {
        "1": b"one",
        "2": b"\0two",
    }
    assert host.calls == [("join", {"ticket": "t"})]


@pytest.mark.parametrize(
    ("status", "error", "line"),
    [(3, None, "1 3 0"), (None, "it is\ngone", "1 - 0 it is gone")],
)
def test_join_of_clones_that_failed(
    host: agents.Host, capsys: Capture, status: int | None, error: str | None, line: str
) -> None:
    host.answers["join"] = {"clones": [clone(1, status, b"", error), clone(2, 0, b"", None)]}
    assert command.main(["join", "t"]) == command.UNSUCCESSFUL == 11
    assert capsys.readouterr().out == f"{line}\n2 0 0\n"


def test_join_does_not_ask_if_it_cannot_write(
    host: agents.Host, tmp_path: pathlib.Path, capsys: Capture
) -> None:
    (tmp_path / "file").touch()
    assert command.main(["join", "t", "--directory", str(tmp_path / "file")]) == 1
    assert "file" in capsys.readouterr().err
    assert host.calls == []


@pytest.mark.parametrize(("arguments", "status"), [([], 0), (["7"], 7)])
def test_exit(host: agents.Host, tmp_path: pathlib.Path, arguments: list[str], status: int) -> None:
    """As a process of its own: it does not return, and its host stops it."""
    host.role = 4
    result = tmp_path / "result"
    result.write_bytes(os.urandom(100_000))
    process = subprocess.run(
        [sys.executable, "-m", command.__name__, "exit", *arguments, "--result", str(result)],
        timeout=60,
    )
    assert process.returncode == -signal.SIGKILL
    assert host.statuses == {4: status}
    assert host.results == {4: result.read_bytes()}


def test_exit_with_standard_input(host: agents.Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff of bytes")))
    assert command.main(["exit", "--result", "-"]) == 3
    assert host.results == {0: b"\xff of bytes"}


def test_exit_without_its_file(host: agents.Host, capsys: Capture) -> None:
    assert command.main(["exit", "--result", "/no/such/file"]) == 1
    assert "/no/such/file" in capsys.readouterr().err
    assert host.calls == []
