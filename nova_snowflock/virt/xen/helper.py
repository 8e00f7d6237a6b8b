# SPDX-License-Identifier: Apache-2.0
"""The program ``snowflock-xen`` (native/), which does what takes Xen's own libraries.

What it is asked and says is in docs/xen.rst. Whatever becomes of it, its guest runs on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import fcntl
import json
import os
import select
import subprocess
import time
from typing import IO, Any

from nova_snowflock import exception

PROGRAM = "snowflock-xen"
SUSPEND = 60
"""Seconds that a guest may yet take to suspend after who asked it to has died."""

_PREPARE = 600.0
_FREEZE = 120.0  # native/freeze.c waits for the guest up to 60 s
_POPULATE = 600.0
_LAST_WORDS = 5.0
_LOOK_AGAIN = 0.005
_NOBODY = contextlib.nullcontext()


class HelperError(exception.SnowFlockError):
    """The program said why it failed, or ended without a word."""


class CannotPage(HelperError):
    """Xen does not page the memory of this guest, or of any."""


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What the parent was when it was stopped.

    :param state: the program's records
    :param dirty: pages that were copied while it was stopped
    :param stages: seconds of each part of the stop, in order
    """

    state: bytes
    dirty: int
    stages: Mapping[str, float]


class Freezer:
    """Copies a guest's memory while it runs, until :meth:`freeze`. To be closed."""

    def __init__(self, program: str, domain: int, memory: int, most_dirty: int) -> None:
        """Copy all of it.

        :param domain: Xen's number of the guest
        :param memory: descriptor of an empty file, which gets the guest's frames, at their places
        :param most_dirty: pages that may be copied while it is stopped
        :raises HelperError: it cannot be done
        """
        self._program = program
        self._domain = domain
        self._state = os.memfd_create("snowflock-state")
        try:
            arguments = (str(domain), str(memory), str(self._state), str(most_dirty))
            self._process = _start((program, "freeze", *arguments), (memory, self._state))
        except BaseException:
            os.close(self._state)
            raise
        try:
            _hear(self._process, "ready", _PREPARE)
        except BaseException:
            self.close()
            raise

    def freeze(
        self,
        meanwhile: Callable[[], None],
        others_stopped: contextlib.AbstractContextManager[None] = _NOBODY,
    ) -> Frozen:
        """Stop the guest, copy what it has written last, read its state, and let it run again.

        :param meanwhile: what else is to be done while it is stopped
        :param others_stopped: has nobody else write to its memory, until it is copied
        :raises HelperError: it could not be done; the guest runs
        """
        try:
            _say(self._process, "stop")
            _hear(self._process, "suspended", _FREEZE)
            with others_stopped:
                _say(self._process, "copy")
                meanwhile()
                _hear(self._process, "copied", _FREEZE)
            _say(self._process, "resume")
            said = _hear(self._process, "frozen", _FREEZE)
        except BaseException:
            self._end(SUSPEND)
            raise
        size = os.fstat(self._state).st_size
        return Frozen(os.pread(self._state, size, 0), said["dirty"], said["stages"])

    def close(self) -> None:
        """End it. Idempotent.

        :raises HelperError: the guest is not as it was
        """
        self._end(0)

    def _end(self, seconds: int) -> None:
        if self._state >= 0:
            os.close(self._state)
            self._state = -1
            if not _end(self._process):
                resume(self._program, self._domain, seconds)


def resume(program: str, domain: int, seconds: int = SUSPEND) -> None:
    """Let a guest run again that was left suspended, or asked to suspend. Idempotent.

    :param seconds: how long it may yet take to suspend
    :raises HelperError: it does not run
    """
    process = _start((program, "resume", str(domain), str(seconds)), ())
    try:
        _wait(process, _FREEZE)
    finally:
        _end(process)


def populate(program: str, domain: int, memory: int, pages: bytes) -> None:
    """Give a clone that does not run yet all of its memory.

    :param memory: descriptor of the image's memory
    :param pages: the frames that its parent had, as in its state
    :raises HelperError: it could not be done
    """
    with _listed(pages) as listed:
        arguments = (str(domain), str(memory), str(listed))
        process = _start((program, "populate", *arguments), (memory, listed))
        try:
            _hear(process, "populated", _POPULATE)
        finally:
            _end(process)


def page(program: str, domain: int, memory: int, pages: bytes, log: str) -> None:
    """Have a clone's memory come when it is touched, by a process that outlives this one.

    :param log: path of a file that is to be, in which it says how it goes
    :raises CannotPage: Xen refused, and the clone is as it was
    :raises HelperError: it could not be done
    """
    # Of one of that name which has ended.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(log)
    with _listed(pages) as listed, open(log, "xb") as file:
        # As long as the process has it open.
        fcntl.flock(file, fcntl.LOCK_EX)
        arguments = (str(domain), str(memory), str(listed))
        process = _start((program, "page", *arguments), (memory, listed), file)
    try:
        with open(log, "rb") as said:
            _follow(process, said, "ready", _POPULATE)
        _say(process, "bring")
        assert process.stdin is not None
        process.stdin.close()
    except BaseException:
        _end(process)
        os.unlink(log)
        raise


def stopped(program: str) -> dict[int, str]:
    """Guests that have stopped by themselves, and are not ended: Xen's numbers of them, and why:
    'poweroff', 'reboot' or 'crash'.

    :raises HelperError: Xen does not tell
    """
    process = _start((program, "stopped"), ())
    try:
        said = _hear(process, "listed", _LAST_WORDS)
    finally:
        _end(process)
    return {int(number): reason for number, reason in said["domains"].items()}


def has_died(log: str) -> bool:
    """Whether the process that was started with this log has ended before its clone had all of its
    memory. Then the clone waits for ever."""
    try:
        with open(log, "rb") as said:
            fcntl.flock(said, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, FileNotFoundError):
        return False
    return not has_paged(log)


def has_paged(log: str) -> bool:
    """Whether a clone needs nothing any more of the process that was started with this log."""
    try:
        with open(log, "rb") as said:
            lines = said.read().splitlines()
    except FileNotFoundError:
        return True  # it could not be started
    return any(_is_last(line) for line in lines)


def _is_last(line: bytes) -> bool:
    try:
        return json.loads(line)["event"] in ("populated", "ended")
    except ValueError:
        return False  # not all of it is there yet


@contextlib.contextmanager
def _listed(pages: bytes) -> Iterator[int]:
    fd = os.memfd_create("snowflock-pages")
    try:
        os.write(fd, pages)
        yield fd
    finally:
        os.close(fd)


def _start(
    argv: Sequence[str], fds: Sequence[int], output: IO[bytes] | int = subprocess.PIPE
) -> "subprocess.Popen[bytes]":
    try:
        return subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.DEVNULL,
            pass_fds=fds,
            start_new_session=True,
        )
    except OSError as error:
        raise HelperError(f"{argv[0]} cannot be run: {error}") from error


def _say(process: "subprocess.Popen[bytes]", word: str) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(f"{word}\n".encode())
        process.stdin.flush()
    except BrokenPipeError:
        pass  # it has ended, and says why


def _hear(process: "subprocess.Popen[bytes]", event: str, seconds: float) -> dict[str, Any]:
    """What it says next, which is that event."""
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], seconds)
    if not ready:
        raise HelperError(f"{PROGRAM} did not answer within {seconds:g} s")
    return _understand(process, process.stdout.readline(), event)


def _follow(
    process: "subprocess.Popen[bytes]", said: IO[bytes], event: str, seconds: float
) -> dict[str, Any]:
    """Likewise, of what it says to a file."""
    deadline = time.monotonic() + seconds
    while True:
        ended = process.poll() is not None
        line = said.readline()
        if line or ended:
            return _understand(process, line, event)
        if time.monotonic() > deadline:
            raise HelperError(f"{PROGRAM} did not answer within {seconds:g} s")
        time.sleep(_LOOK_AGAIN)


def _understand(process: "subprocess.Popen[bytes]", line: bytes, event: str) -> dict[str, Any]:
    if not line:
        raise HelperError(f"{PROGRAM} ended ({process.wait(_FREEZE)})")
    try:
        said: dict[str, Any] = json.loads(line)
    except ValueError as error:
        raise HelperError(f"{PROGRAM} said {line!r}") from error
    if said["event"] == "error":
        raise HelperError(said["message"])
    if said["event"] == "refused":
        raise CannotPage(said["message"])
    if said["event"] != event:
        raise HelperError(f"{PROGRAM} said {said['event']} before it was {event}")
    return said


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired as error:
        raise HelperError(f"{PROGRAM} did not end within {seconds:g} s") from error
    if status:
        assert process.stdout is not None
        _understand(process, process.stdout.readline(), "done")


def _end(process: "subprocess.Popen[bytes]") -> bool:
    """Whether it has ended well. It does so by itself when nobody can ask it any more."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
    try:
        process.wait(_LAST_WORDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    return process.returncode == 0
