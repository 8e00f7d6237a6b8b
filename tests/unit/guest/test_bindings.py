# SPDX-License-Identifier: Apache-2.0
"""The C library and the examples, compiled and run."""

import base64
from collections.abc import Callable
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import threading
from typing import Any

import pytest

from nova_snowflock import guest
from tests.unit.guest import agents

BINDINGS = pathlib.Path(guest.__file__).parent / "bindings"
DRIVER = pathlib.Path(__file__).parent / "driver.c"

STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
SANITIZERS = [
    "-g",
    "-O1",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
]

need_c = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no C compiler")
need_cpp = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
need_java = pytest.mark.skipif(shutil.which("javac") is None, reason="there is no Java")

Answer = agents.Answer


def run(*command: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, **options)


def compile_c(output: pathlib.Path, *arguments: object) -> pathlib.Path:
    made = run("gcc", "-std=c99", *STRICT, f"-I{BINDINGS}", *arguments, "-o", output)
    assert made.returncode == 0, made.stderr
    return output


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("bindings")


@pytest.fixture(scope="module", params=["plain", "sanitized"])
def driver(request: pytest.FixtureRequest, directory: pathlib.Path) -> pathlib.Path:
    flags = SANITIZERS if request.param == "sanitized" else ["-O2"]
    output = directory / f"driver-{request.param}"
    return compile_c(output, *flags, DRIVER, BINDINGS / "snowflock.c")


@pytest.fixture(scope="module")
def sanitized(directory: pathlib.Path) -> pathlib.Path:
    return compile_c(directory / "sanitized", *SANITIZERS, DRIVER, BINDINGS / "snowflock.c")


INFO = {
    "server": "s",
    "clone_id": 1,
    "fork": "f",
    "parent": None,
    "params": {"a": 'b"\\/\b\f\n\r\t\0\u00e9\u20ac\N{SNOWFLAKE}\U0001f328', "": "e"},
    "limit": 8,
    "tickets": [{"ticket": "t", "n": 2, "state": "granted", "later": [1.5e3, True, False, {}]}],
}
SHOWN = 's,f,,1,8\na=b"\\/\b\f\n\r\t\ufffd\u00e9\u20ac\N{SNOWFLAKE}\U0001f328\n=e\nt,2,granted\n'


@need_c
@pytest.mark.parametrize(
    ("arguments", "answer", "asked", "out"),
    [
        (["request_ticket", "7"], {"ticket": "t", "n": 3}, {"n": 7}, "t 3\n"),
        (["clone", "t"], {"clone_id": 0}, {"ticket": "t"}, "0\n"),
        (
            ["clone", 'q"\\', "\x01\u2744\n"],
            {"clone_id": 4},
            {"ticket": 'q"\\', "params": {"a": "\x01\u2744\n", 'b"': ""}},
            "4\n",
        ),
        (["checkpoint_parent"], {"checkpoint": "c", "clone_id": 2}, {}, "c 2 2\n"),
        (
            ["checkpoint_parent", "", "x"],
            {"checkpoint": "c", "clone_id": 0},
            {"params": {"a": "x", 'b"': ""}},
            "c 0 0\n",
        ),
        (["create_clones", "c", "t"], {}, {"checkpoint": "c", "ticket": "t"}, "0\n"),
        (["kill", "t"], {}, {"ticket": "t"}, "0\n"),
        (["release", "c"], {}, {"checkpoint": "c"}, "0\n"),
        (["info"], INFO, {}, SHOWN),
        (["info"], json.dumps({"result": INFO}, ensure_ascii=False).encode() + b"\n", {}, SHOWN),
    ],
)
def test_calls(
    host: agents.Host,
    driver: pathlib.Path,
    arguments: list[str],
    answer: Answer,
    asked: dict[str, Any],
    out: str,
) -> None:
    host.answers[arguments[0]] = answer
    done = subprocess.run([driver, *arguments], capture_output=True, timeout=60)
    assert (done.stdout.decode(), done.stderr, done.returncode) == (out, b"", 0)
    assert host.calls == [(arguments[0], asked)]


@need_c
@pytest.mark.parametrize("size", [0, 1, 2, 3, 32 << 10, (32 << 10) + 1, 200_000])
def test_exit(host: agents.Host, driver: pathlib.Path, size: int) -> None:
    """The host stops what has exited, and it does not go on before."""
    host.role = 3
    done = run(driver, "exit", 9, size)
    assert done.returncode == -signal.SIGKILL
    assert host.statuses == {3: 9}
    assert host.results.get(3, b"") == bytes(i * i % 251 for i in range(size))
    assert host.connections == 1


@need_c
def test_exit_that_is_refused(host: agents.Host, driver: pathlib.Path) -> None:
    assert run(driver, "exit", 0, 3, check=True).stdout == "-1 this is no clone\n"
    host.limit = 40_000
    assert run(driver, "exit", 0, 50_000, check=True).stdout == "-1 the result is too large\n"
    assert [call for call, _ in host.calls] == ["put", "exit", "put", "put"]


def checksum(data: bytes) -> int:
    total = 0
    for byte in data:
        total = (total * 31 + byte) % 1000003
    return total


@need_c
def test_join(host: agents.Host, driver: pathlib.Path) -> None:
    results = [b"", b"1", b"22", b"333", os.urandom(1 << 20)]
    host.answers["join"] = {
        "clones": [
            {
                "clone_id": number,
                "status": None if number == 1 else number,
                "error": "it is gone" if number == 1 else None,
                "size": len(result),
                "result": base64.b64encode(result).decode(),
            }
            for number, result in reversed([*enumerate(results, 1)])
        ]
    }
    lines = run(driver, "join", "t", check=True).stdout.splitlines()
    assert lines[0] == "1 -1 it is gone 0 0"
    assert lines[1:] == [
        f"{number} {number} - {len(result)} {checksum(result)}"
        for number, result in enumerate(results[1:], 2)
    ]
    host.answers["join"] = {"clones": []}
    assert run(driver, "join", "t", check=True).stdout == ""


@need_c
@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("refused", -1),
        ("invalid", -2),
        ("failed", -3),
        ("busy", -4),
        ("forked", -5),
        ("offline", -6),
        ("of a later version", -8),
        (None, -8),
    ],
)
@pytest.mark.parametrize("call", ["request_ticket", "clone", "checkpoint_parent", "join", "info"])
def test_errors(
    host: agents.Host, driver: pathlib.Path, call: str, kind: str | None, status: int
) -> None:
    host.answers[call] = agents.Refusal(kind, "a sentence, %s")
    assert run(driver, call, "1", check=True).stdout == f"{status} a sentence, %s\n"


@need_c
def test_errors_of_any_length(host: agents.Host, driver: pathlib.Path) -> None:
    host.answers["info"] = agents.Refusal("busy", "x" * 100_000)
    shown = run(driver, "info", check=True).stdout
    assert shown.startswith("-4 xxx")
    assert 400 < len(shown) < 600


@need_c
def test_no_agent(
    driver: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (str(tmp_path / "nothing"), "/" + "x" * 200):
        monkeypatch.setenv("SNOWFLOCK_SOCKET", path)
        for arguments in (["info"], ["clone", "t"], ["exit", "0", "1"]):
            shown = run(driver, *arguments, check=True).stdout
            assert shown.startswith("-7 ")
            assert path in shown
    monkeypatch.delenv("SNOWFLOCK_SOCKET")
    shown = run(driver, "info", check=True).stdout
    assert shown.startswith("-7 no agent listens on /run/snowflock/guest.sock: ")


@need_c
def test_an_agent_that_breaks_off(host: agents.Host, driver: pathlib.Path) -> None:
    host.answers["info"] = b""
    assert run(driver, "info", check=True).stdout == "-7 the agent broke off\n"


@need_c
def test_an_agent_that_does_not_listen(
    driver: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Has too many connections, say: it tells, and closes, maybe before it is asked."""
    path = tmp_path / "guest.sock"
    monkeypatch.setenv("SNOWFLOCK_SOCKET", str(path))
    times = 500

    def refuse(listener: socket.socket) -> None:
        for _ in range(times):
            with listener.accept()[0] as connection:
                connection.sendall(b'{"error": {"kind": "busy", "message": "too many"}}\n')

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        threading.Thread(target=refuse, args=[listener], daemon=True).start()
        shown = run(driver, "info", "", times, check=True).stdout
    assert shown == "-4 too many\n" * times


@need_c
def test_requests_that_are_too_long(host: agents.Host, driver: pathlib.Path) -> None:
    shown = run(driver, "clone", "t", "x" * (64 << 10), check=True).stdout
    assert shown.startswith("-2 a message of ")
    assert host.calls == []


GOOD = json.dumps({"result": INFO}).encode()
JOINED = json.dumps(
    {
        "result": {
            "clones": [
                {"clone_id": 1, "status": None, "error": "gone", "result": ""},
                {"clone_id": 2, "status": 0, "error": None, "result": "AAECAw=="},
            ]
        }
    }
).encode()


def sequence(lines: list[bytes]) -> Callable[[dict[str, Any]], Any]:
    rest = iter(lines)
    return lambda arguments: next(rest)


@need_c
@pytest.mark.parametrize(("call", "good"), [("info", GOOD), ("join", JOINED)])
def test_halves_of_answers(
    host: agents.Host, sanitized: pathlib.Path, call: str, good: bytes
) -> None:
    """All are refused; the sanitizers watch."""
    lines = [good[:size] + b"\n" for size in range(len(good))]
    host.answers[call] = sequence(lines)
    shown = run(sanitized, call, "t", len(lines), check=True).stdout
    refused = "-8 the agent's answer has neither a result nor an error\n"
    assert shown == refused * len(lines)


@need_c
@pytest.mark.parametrize(("call", "good"), [("info", GOOD), ("join", JOINED)])
def test_damaged_answers(
    host: agents.Host, sanitized: pathlib.Path, call: str, good: bytes
) -> None:
    """With one byte replaced by another that means something: whatever it is, it is survived."""
    lines = [
        good[:place] + bytes([byte]) + good[place + 1 :] + b"\n"
        for place in range(0, len(good))
        for byte in b'"\\{}[]:,0-\x00\xff'
    ]
    host.answers[call] = sequence(lines)
    done = run(sanitized, call, "t", len(lines), errors="replace")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(host.calls) == len(lines)
    assert done.stdout.count("-8 ") > len(lines) / 2


@need_c
@pytest.mark.parametrize(
    "value",
    [
        "",
        "1 2",
        "01",
        "+1",
        "1.",
        ".5",
        "1e",
        "-",
        "nul",
        "truex",
        "'a'",
        '"a',
        '"\\x"',
        '"\\u12"',
        '"\\u12g4"',
        '"\t"',
        "[1,]",
        "[,1]",
        '{"a"}',
        '{"a":}',
        '{"a":1,}',
        "{1:1}",
        "[" * 100_000,
        "[" * 40 + "]" * 40,
        "1" * 100,
    ],
)
def test_what_is_no_json(host: agents.Host, sanitized: pathlib.Path, value: str) -> None:
    line = '{"result": {"ticket": "t", "n": 1, "x": %s}}\n'
    host.answers["request_ticket"] = (line % value).encode()
    shown = run(sanitized, "request_ticket", "1", check=True).stdout
    assert shown.startswith("-8 the agent's answer has neither")
    host.answers["request_ticket"] = (line % '[-0.5E+2, "\\ud83c\\u2744"]').encode()
    assert run(sanitized, "request_ticket", "1", check=True).stdout == "t 1\n"


@need_c
@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("request_ticket", {}),
        ("request_ticket", {"ticket": "t", "n": "1"}),
        ("request_ticket", {"ticket": "t", "n": 1.5}),
        ("request_ticket", {"ticket": "t", "n": 1e300}),
        ("request_ticket", {"ticket": "t" * 128, "n": 1}),
        ("request_ticket", {"ticket": None, "n": 1}),
        ("clone", {"clone_id": -1}),
        ("checkpoint_parent", {"checkpoint": "c", "clone_id": -1}),
        ("join", {}),
        ("join", {"clones": {}}),
        ("join", {"clones": [1]}),
        ("join", {"clones": [{"clone_id": 1, "status": 0, "error": None, "result": "A"}]}),
        ("join", {"clones": [{"clone_id": 1, "status": 0, "error": None, "result": "===="}]}),
        ("join", {"clones": [{"clone_id": 1, "status": 0, "error": None, "result": "AA*A"}]}),
        ("join", {"clones": [{"clone_id": 1, "status": 0, "error": None, "result": None}]}),
        ("join", {"clones": [{"clone_id": 1, "status": "0", "error": None, "result": ""}]}),
        ("join", {"clones": [{"clone_id": 1, "status": 0, "result": ""}]}),
        ("info", {**INFO, "params": [1]}),
        ("info", {**INFO, "params": {"a": 1}}),
        ("info", {**INFO, "tickets": [{"ticket": "t", "n": 1, "state": "x" * 16}]}),
        ("info", {**INFO, "server": None}),
    ],
)
def test_results_that_make_no_sense(
    host: agents.Host, sanitized: pathlib.Path, call: str, result: dict[str, Any]
) -> None:
    host.answers[call] = result
    shown = run(sanitized, call, "1", check=True).stdout
    assert shown == f"-8 the agent's answer to {call} makes no sense\n"


def check_example(host: agents.Host, *command: object) -> None:
    """It is run for each machine that there would be: the clones, and then their parent."""
    host.granted = 3
    for host.role in (1, 2, 3):
        clone = run(*command, "5")
        assert clone.returncode == -signal.SIGKILL, clone.stderr
    assert host.statuses == {1: 0, 2: 0, 3: 0}
    assert sum(map(int, host.results.values())) == 9592
    assert len(set(host.results.values())) == 3
    host.role = 0
    parent = run(*command, "5")
    assert (parent.stdout, parent.stderr) == ("9592 prime numbers, counted by 3 clones\n", "")
    assert parent.returncode == 0
    assert {call for call, _ in host.calls} == {"request_ticket", "clone", "put", "exit", "join"}
    assert host.calls[0] == ("request_ticket", {"n": 5})
    lost = {"clone_id": 2, "status": None, "error": "it is g\u00f6ne", "size": 0, "result": ""}
    host.answers["join"] = {"clones": [lost]}
    parent = run(*command, "5")
    assert parent.returncode == 1
    assert "clone 2: it is g" in parent.stderr
    host.answers["clone"] = agents.Refusal("refused", 'not "allowed"')
    parent = run(*command, "5")
    assert parent.returncode == 1
    assert 'not "allowed"' in parent.stderr


@need_c
def test_c_example(host: agents.Host, directory: pathlib.Path) -> None:
    sources = [BINDINGS / "example.c", BINDINGS / "snowflock.c"]
    check_example(host, compile_c(directory / "example", *SANITIZERS, *sources))


@need_c
@need_cpp
def test_cpp_example(host: agents.Host, directory: pathlib.Path) -> None:
    library = compile_c(directory / "snowflock.o", *SANITIZERS, "-c", BINDINGS / "snowflock.c")
    output = directory / "example-cpp"
    source = BINDINGS / "example.cpp"
    made = run("g++", "-std=c++17", *STRICT, *SANITIZERS, source, library, "-o", output)
    assert made.returncode == 0, made.stderr
    check_example(host, output)


@need_java
def test_java_example(host: agents.Host, directory: pathlib.Path) -> None:
    made = run("javac", "-Xlint:all,-serial", "-Werror", "-d", directory, BINDINGS / "Example.java")
    assert made.returncode == 0, made.stderr
    check_example(host, "java", "-cp", directory, "Example")
