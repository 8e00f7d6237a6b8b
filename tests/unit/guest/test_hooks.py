# SPDX-License-Identifier: Apache-2.0
"""Hooks: which are run, what they are told, and what is said of those that fail."""

from __future__ import annotations

from collections.abc import Callable
import json
import os
import pathlib
import signal
import threading
import time

import pytest

from nova_snowflock.guest import hooks

TOLD = hooks.context(
    "clone", server="s", fork="f", parent="p", clone_id=3, params={"role-name": "worker", "n": "1"}
)

Add = Callable[..., pathlib.Path]


@pytest.fixture
def directory(tmp_path: pathlib.Path) -> pathlib.Path:
    directory = tmp_path / "clone.d"
    directory.mkdir(mode=0o755)
    return directory


@pytest.fixture
def add(directory: pathlib.Path) -> Add:
    def add(name: str, script: str, mode: int = 0o755) -> pathlib.Path:
        path = directory / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(mode)
        return path

    return add


def run(directory: pathlib.Path, seconds: float = 30) -> list[str]:
    return hooks.run(str(directory), TOLD, seconds)


def test_no_directory(tmp_path: pathlib.Path) -> None:
    assert run(tmp_path / "none") == []


def test_order(directory: pathlib.Path, add: Add, tmp_path: pathlib.Path) -> None:
    for name in ("20-second", "10-first", "30-third"):
        add(name, f"echo {name} >>{tmp_path}/log")
    add("README", f"echo no >>{tmp_path}/log", 0o644)
    add(".hidden", f"echo no >>{tmp_path}/log")
    (directory / "directory").mkdir()
    assert run(directory) == []
    assert (tmp_path / "log").read_text() == "10-first\n20-second\n30-third\n"


def test_what_they_are_told(
    directory: pathlib.Path, add: Add, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As who runs the tests may have.
    monkeypatch.delenv("SNOWFLOCK_CACHE", raising=False)
    monkeypatch.delenv("SNOWFLOCK_XEN", raising=False)
    add("hook", f"cat >{tmp_path}/json; env | grep ^SNOWFLOCK | sort >{tmp_path}/env; pwd >&2")
    assert run(directory) == []
    assert json.loads((tmp_path / "json").read_text()) == TOLD
    assert (tmp_path / "env").read_text().splitlines() == [
        "SNOWFLOCK_CLONE_ID=3",
        "SNOWFLOCK_ERROR=",
        "SNOWFLOCK_EVENT=clone",
        "SNOWFLOCK_FORK=f",
        "SNOWFLOCK_PARAM_N=1",
        "SNOWFLOCK_PARAM_ROLE_NAME=worker",
        "SNOWFLOCK_PARENT=p",
        "SNOWFLOCK_SERVER=s",
    ]


def test_much_is_told_to_one_that_does_not_listen(directory: pathlib.Path, add: Add) -> None:
    add("hook", "exit 0")
    told = {**TOLD, "params": {f"n{number}": "x" * 1000 for number in range(100)}}
    assert hooks.run(str(directory), told, 30) == []


def test_failures(directory: pathlib.Path, add: Add, tmp_path: pathlib.Path) -> None:
    add("1", "echo first >&2; echo the disk is full >&2; exit 3")
    add("2", "kill -TERM $$")
    add("3", f"touch {tmp_path}/third")
    (directory / "4").write_text("#!/no/such/program\n")
    (directory / "4").chmod(0o755)
    first, second, fourth = run(directory)
    assert first == "The hook 1 exit status 3: the disk is full."
    assert second == "The hook 2 signal 15."
    assert fourth.startswith("The hook 4 could not be run: ")
    assert (tmp_path / "third").exists()


def test_much_is_complained(directory: pathlib.Path, add: Add) -> None:
    add("hook", "head -c 300000 /dev/zero | tr '\\0' x >&2; echo >&2; echo last >&2; exit 1")
    assert run(directory) == ["The hook hook exit status 1: last."]


def test_a_parameter_that_cannot_be_told(directory: pathlib.Path, add: Add) -> None:
    add("hook", "exit 0")
    (problem,) = hooks.run(str(directory), {**TOLD, "params": {"a": "\0"}}, 30)
    assert "could not be run" in problem


def test_too_slow(directory: pathlib.Path, add: Add, tmp_path: pathlib.Path) -> None:
    add("1", f"sleep 1000 & echo $! >{tmp_path}/child; wait")
    add("2", f"touch {tmp_path}/second")
    started = time.monotonic()
    assert run(directory, 0.5) == [
        "The hook 1 was too slow, and was killed.",
        "The hook 2 was not run: no time was left.",
    ]
    assert 0.4 < time.monotonic() - started < 10
    assert not (tmp_path / "second").exists()
    assert_ends(int((tmp_path / "child").read_text()))


def assert_ends(pid: int) -> None:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.01)
    pytest.fail(f"process {pid} runs on")


def test_what_it_leaves_in_the_background(
    directory: pathlib.Path, add: Add, tmp_path: pathlib.Path
) -> None:
    add("hook", f"sleep 1000 & echo $! >{tmp_path}/child")
    started = time.monotonic()
    assert run(directory) == []
    assert time.monotonic() - started < 10
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_abandoned(directory: pathlib.Path, add: Add, tmp_path: pathlib.Path) -> None:
    add("1", f"echo $$ >{tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; sleep 1000")
    add("2", f"touch {tmp_path}/second")
    abandoned = threading.Event()
    found: list[list[str]] = []
    thread = threading.Thread(
        target=lambda: found.append(hooks.run(str(directory), TOLD, 1000, abandoned.is_set))
    )
    thread.start()
    deadline = time.monotonic() + 10
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    pid = int((tmp_path / "pid").read_text())
    abandoned.set()
    thread.join(10)
    assert found == [[]]
    assert not (tmp_path / "second").exists()
    assert_ends(pid)


@pytest.mark.skipif(os.getuid() != 0, reason="it is root that has to mind")
def test_what_others_could_have_written(
    directory: pathlib.Path, add: Add, tmp_path: pathlib.Path
) -> None:
    add("1", f"touch {tmp_path}/run", 0o775)
    add("2", f"touch {tmp_path}/run", 0o757)
    os.chown(add("3", f"touch {tmp_path}/run"), 1234, 0)
    assert run(directory) == [
        "The hook 1 was not run: it may be written by others than root.",
        "The hook 2 was not run: it may be written by others than root.",
        "The hook 3 was not run: it belongs to user 1234, not root.",
    ]
    add("4", f"touch {tmp_path}/run")
    directory.chmod(0o777)
    (problem,) = run(directory)
    assert "may be written by others" in problem
    assert not (tmp_path / "run").exists()
    directory.chmod(0o755)
    assert len(run(directory)) == 3
    assert (tmp_path / "run").exists()
