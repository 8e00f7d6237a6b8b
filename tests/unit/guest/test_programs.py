# SPDX-License-Identifier: Apache-2.0
"""The programs' socket."""

from __future__ import annotations

import base64
from collections.abc import Iterator
import grp
import json
import os
import pathlib
import socket
import stat
from typing import Any

import pytest

from nova_snowflock.guest import programs
from nova_snowflock.guest import protocol
from tests.unit.guest import host as hosts


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "snowflock" / "guest.sock"


@pytest.fixture
def host(path: pathlib.Path) -> Iterator[hosts.Host]:
    host = hosts.Host()
    programs.ProgramServer(host.agent, str(path)).start()
    host.meet()
    yield host
    host.close()


class Program:
    """A program that asks."""

    def __init__(self, path: pathlib.Path) -> None:
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.connection.settimeout(hosts.TIMEOUT)
        self.connection.connect(str(path))
        self._file = self.connection.makefile("rb")

    def ask(self, call: str, **arguments: Any) -> None:
        line = json.dumps({"call": call, "arguments": arguments})
        self.connection.sendall(line.encode() + b"\n")

    def reply(self) -> dict[str, Any]:
        reply: dict[str, Any] = json.loads(self._file.readline())
        return reply

    def close(self) -> None:
        self._file.close()
        self.connection.close()


@pytest.fixture
def program(host: hosts.Host, path: pathlib.Path) -> Iterator[Program]:
    program = Program(path)
    yield program
    program.close()


def test_one_after_another(host: hosts.Host, program: Program) -> None:
    for number in range(3):
        program.ask("request_ticket", n=number)
        request = host.hear("request")
        assert (request["call"], request["arguments"]) == ("request_ticket", {"n": number})
        host.say({"type": "answer", "id": request["id"], "result": {"ticket": f"t{number}"}})
        assert program.reply() == {"result": {"ticket": f"t{number}"}}
    program.ask("kill", ticket="t1")
    error = {"kind": "invalid", "message": "It has been used."}
    host.say({"type": "answer", "id": host.hear("request")["id"], "error": error})
    assert program.reply() == {"error": error}


def test_several_lines_at_once(host: hosts.Host, program: Program) -> None:
    program.connection.sendall(b'{"call":"a"}\n{"call":"b","arguments":{}}\n{"call"')
    for name in "ab":
        request = host.hear("request")
        assert (request["call"], request["arguments"]) == (name, {})
        host.say({"type": "answer", "id": request["id"], "result": {}})
        assert program.reply() == {"result": {}}
    program.connection.sendall(b':"c"}\n')
    assert host.hear("request")["call"] == "c"


def test_join_and_put(host: hosts.Host, program: Program) -> None:
    data = os.urandom(32 << 10)
    piece = base64.b64encode(data).decode()
    program.ask("put", offset=0, data=piece)
    request = host.hear("request")
    assert request["arguments"] == {"offset": 0, "data": piece}
    host.say({"type": "answer", "id": request["id"], "result": {}})
    assert program.reply() == {"result": {}}
    program.ask("join", ticket="t")
    identity = host.hear("request")["id"]
    for n in range(8):
        offset = n * len(data)
        part = {"clone_id": 1, "offset": offset, "data": piece}
        host.say({"type": "part", "id": identity, **part})
    clones = [{"clone_id": 1, "status": 0, "error": None, "size": 8 * len(data)}]
    host.say({"type": "answer", "id": identity, "result": {"clones": clones}})
    (clone,) = program.reply()["result"]["clones"]
    assert base64.b64decode(clone["result"]) == data * 8


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"not json",
        b"\xff",
        b"[]",
        b"{}",
        b'{"call":5}',
        b'{"call":"info","arguments":[]}',
        b'{"call":"info","arguments":null}',
        b"[" * 20000,
        b'{"call":"info","arguments":{"x":"' + b"x" * protocol.MAX_LINE + b'"}}',
        b"x" * 1_000_000,
    ],
)
def test_what_is_no_request(host: hosts.Host, program: Program, line: bytes) -> None:
    program.connection.sendall(line + b"\n")
    assert program.reply()["error"]["kind"] == "invalid"
    program.ask("info")
    assert host.hear("request")["call"] == "info"


def test_a_program_that_ends_is_forgotten(host: hosts.Host, path: pathlib.Path) -> None:
    program = Program(path)
    program.ask("join", ticket="t")
    request = host.hear("request")
    program.close()
    hosts.until(lambda: len(host.agent._pending) == 0)
    host.say({"type": "answer", "id": request["id"], "result": {}})
    host.disconnect()
    host.meet()
    host.silent()


def test_a_program_that_says_no_more_is_answered(host: hosts.Host, program: Program) -> None:
    program.ask("info")
    program.connection.shutdown(socket.SHUT_WR)
    request = host.hear("request")
    host.say({"type": "answer", "id": request["id"], "result": {"limit": 0}})
    assert program.reply() == {"result": {"limit": 0}}


def test_a_program_in_a_clone(host: hosts.Host, program: Program) -> None:
    program.ask("clone", ticket="t")
    request = host.hear("request")
    host.replace()
    host.say(hosts.you_are_a_clone(request=request["id"]))
    assert program.reply() == {"result": {"clone_id": 3}}


def test_many_programs(host: hosts.Host, path: pathlib.Path) -> None:
    waiting = [Program(path) for _ in range(40)]
    for number, program in enumerate(waiting):
        program.ask("info", n=number)
    for _ in waiting:
        request = host.hear("request")
        result = {"n": request["arguments"]["n"]}
        host.say({"type": "answer", "id": request["id"], "result": result})
    for number, program in enumerate(waiting):
        assert program.reply() == {"result": {"n": number}}
        program.close()


def test_too_many_programs(
    host: hosts.Host, path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "_CONNECTIONS", 2)
    path = path.with_name("other.sock")
    programs.ProgramServer(host.agent, str(path)).start()
    first, second, third = (Program(path) for _ in range(3))
    assert third.reply()["error"]["kind"] == "busy"
    first.close()
    second.ask("info")
    host.hear("request")

    def is_served() -> bool:
        again = Program(path)
        again.ask("info")
        again.connection.settimeout(0.05)
        try:
            again.reply()
        except TimeoutError:
            return True
        finally:
            again.close()
        return False

    hosts.until(is_served)
    second.close()
    third.close()


def test_who_may_ask(host: hosts.Host, path: pathlib.Path) -> None:
    assert stat.S_ISSOCK(path.stat().st_mode)
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_the_group(host: hosts.Host, path: pathlib.Path) -> None:
    group = next(group for group in grp.getgrall() if group.gr_gid not in (0, os.getgid()))
    assert path.exists()  # as an earlier agent leaves it
    programs.ProgramServer(host.agent, str(path), group.gr_name)
    assert path.stat().st_gid == group.gr_gid
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
