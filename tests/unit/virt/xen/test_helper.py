# SPDX-License-Identifier: Apache-2.0
"""What is made of what the helper says, and of its end, by scripts in its place."""

from collections.abc import Callable, Iterator
import contextlib
import os
import pathlib
import signal
import time

import pytest

from nova_snowflock.virt.xen import helper

Program = Callable[[str], str]
READY = """echo '{"event": "ready"}'"""
SUSPENDED = """echo '{"event": "suspended"}'"""
COPIED = """echo '{"event": "copied"}'"""
FROZEN = """echo '{"event": "frozen", "dirty": 3, "stages": {"suspend": 0.1, "copy": 0.2}}'"""


@pytest.fixture
def program(tmp_path: pathlib.Path) -> Program:
    """Makes one, which also notes what it is asked in the file "asked"."""

    def make(script: str) -> str:
        path = tmp_path / "snowflock-xen"
        path.write_text(f'#!/bin/sh\necho "$1 $2" >>{tmp_path}/asked\n{script}\n')
        path.chmod(0o755)
        return str(path)

    return make


@pytest.fixture
def memory(tmp_path: pathlib.Path) -> int:
    return os.open(tmp_path / "memory", os.O_RDWR | os.O_CREAT)


def asked(directory: pathlib.Path) -> list[str]:
    return (directory / "asked").read_text().splitlines()


def test_freeze(program: Program, memory: int, tmp_path: pathlib.Path) -> None:
    note = f">>{tmp_path}/asked"
    path = program(
        f"""[ "$1 $2 $5" = "freeze 7 64" ] || exit 2
        {READY}; read word; echo $word {note}; {SUSPENDED}
        read word; echo $word {note}; sleep 0.1; echo copied {note}; {COPIED}
        read word; echo $word {note}; printf state >/dev/fd/$4; {FROZEN}"""
    )

    def tell(what: str) -> None:
        with open(tmp_path / "asked", "a") as file:
            file.write(f"{what}\n")

    @contextlib.contextmanager
    def others_stopped() -> Iterator[None]:
        tell("others stop")
        yield
        tell("others go on")

    meanwhile: list[None] = []
    freezer = helper.Freezer(path, 7, memory, 64)
    try:
        frozen = freezer.freeze(lambda: meanwhile.append(None), others_stopped())
    finally:
        freezer.close()
    assert len(meanwhile) == 1
    assert frozen == helper.Frozen(b"state", 3, {"suspend": 0.1, "copy": 0.2})
    order = ["stop", "others stop", "copy", "copied", "others go on", "resume"]
    assert asked(tmp_path) == ["freeze 7", *order]
    freezer.close()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("""echo '{"event": "error", "message": "Domain 7 does not run"}'; exit 1""", "not run"),
        ("exit 3", "ended (3)"),
        ("kill -SEGV $$", "ended (-11)"),
        ("echo nonsense", "nonsense"),
        ("""echo '{"event": "frozen"}'""", "said frozen before it was ready"),
    ],
)
def test_it_cannot_begin(program: Program, memory: int, script: str, message: str) -> None:
    with pytest.raises(helper.HelperError, match=message.replace("(", r"\(").replace(")", r"\)")):
        helper.Freezer(program(script), 7, memory, 64)


def test_there_is_no_program(memory: int) -> None:
    with pytest.raises(helper.HelperError, match="cannot be run"):
        helper.Freezer("/nowhere/snowflock-xen", 7, memory, 64)


def test_guest_is_resumed_if_it_dies(program: Program, memory: int, tmp_path: pathlib.Path) -> None:
    path = program(f"[ $1 = resume ] && exit 0; {READY}; read word; kill -KILL $$")
    freezer = helper.Freezer(path, 7, memory, 64)
    with pytest.raises(helper.HelperError, match=r"ended \(-9\)"):
        freezer.freeze(lambda: None)
    assert asked(tmp_path) == ["freeze 7", "resume 7"]


def test_what_is_to_be_done_meanwhile_fails(
    program: Program, memory: int, tmp_path: pathlib.Path
) -> None:
    """The program resumes the guest, as nobody can ask it any more to go on."""

    def fail() -> None:
        raise ZeroDivisionError

    path = program(
        f"{READY}; read word; {SUSPENDED}; read word; read word || echo left >>{tmp_path}/asked"
    )
    freezer = helper.Freezer(path, 7, memory, 64)
    with pytest.raises(ZeroDivisionError):
        freezer.freeze(fail)
    assert asked(tmp_path) == ["freeze 7", "left"]


def test_guest_that_is_not_resumed(program: Program, memory: int) -> None:
    path = program(
        f"""[ $1 = resume ] && {{ echo '{{"event": "error", "message": "No"}}'; exit 1; }}
        {READY}; read word; exit 1"""
    )
    freezer = helper.Freezer(path, 7, memory, 64)
    with pytest.raises(helper.HelperError, match="No"):
        freezer.freeze(lambda: None)


def test_what_was_prepared_in_vain_ends(
    program: Program, memory: int, tmp_path: pathlib.Path
) -> None:
    path = program(f"[ $1 = resume ] && exit 0; {READY}; exec sleep 1000")
    freezer = helper.Freezer(path, 7, memory, 64)
    began = time.monotonic()
    freezer.close()
    assert time.monotonic() - began < 60
    # It was killed, and cannot have put things right itself.
    assert asked(tmp_path) == ["freeze 7", "resume 7"]


def test_populate(program: Program, memory: int) -> None:
    path = program("""[ "$(head -c 4 /dev/fd/$4)" = abcd ] && echo '{"event": "populated"}'""")
    helper.populate(path, 7, memory, b"abcd")
    with pytest.raises(helper.HelperError):
        helper.populate(path, 7, memory, b"efgh")


def test_page(program: Program, memory: int, tmp_path: pathlib.Path) -> None:
    log = str(tmp_path / "log")
    path = program(
        f"""{READY}; read word; [ "$word" = bring ] && read more
        until [ -e {tmp_path}/go ]; do sleep 0.02; done; echo '{{"event": "populated"}}'"""
    )
    helper.page(path, 7, memory, b"", log)
    assert not helper.has_paged(log)
    (tmp_path / "go").touch()
    wait_for(lambda: helper.has_paged(log))


def test_pager_that_dies(program: Program, memory: int, tmp_path: pathlib.Path) -> None:
    log, end, pid = str(tmp_path / "log"), tmp_path / "end", tmp_path / "pid"
    path = program(
        f"""echo '{{"event": "ready"}}'; read word; echo $$ >{pid}
        until [ -e {end} ]; do sleep 0.02; done; echo '{{"event": "populated"}}'"""
    )
    for dies in (True, False):
        helper.page(path, 7, memory, b"", log)
        assert not helper.has_died(log)
        wait_for(lambda: pid.exists() and bool(pid.read_text()))
        if dies:
            os.kill(int(pid.read_text()), signal.SIGKILL)
            wait_for(lambda: helper.has_died(log))
        else:
            end.touch()
            wait_for(lambda: helper.has_paged(log))
            assert not helper.has_died(log)
        pid.unlink()
    assert not helper.has_died(f"{log}-of-another")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("""echo '{"event": "refused", "message": "No paging"}'; exit 1""", helper.CannotPage),
        ("""echo '{"event": "error", "message": "No memory"}'; exit 1""", helper.HelperError),
        ("exit 1", helper.HelperError),
    ],
)
def test_it_cannot_page(
    program: Program,
    memory: int,
    tmp_path: pathlib.Path,
    script: str,
    error: type[helper.HelperError],
) -> None:
    log = tmp_path / "log"
    with pytest.raises(error):
        helper.page(program(script), 7, memory, b"", str(log))
    assert not log.exists()
