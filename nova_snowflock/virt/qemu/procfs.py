# SPDX-License-Identifier: Apache-2.0
"""Processes as proc(5) shows them, and what keeps one from being mistaken for another."""

from collections.abc import Iterator
import contextlib
import dataclasses
import errno
import os
import select
import signal
from typing import NamedTuple

from nova_snowflock import exception

_KILL_TIMEOUT = 30.0


class Mapping(NamedTuple):
    """A mapping of a process: addresses from ``start`` to before ``end``.

    :param mode: such as ``r-xp``; the last letter is ``p`` if it is private
    :param inode: 0 if there is no file
    :param path: of the file, a name in brackets, or empty
    """

    start: int
    end: int
    mode: str
    inode: int
    path: str


def maps(pid: int) -> list[Mapping]:
    """The mappings of a process, by address.

    :raises OSError: it is gone, or may not be traced
    """
    found = []
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            place, mode, _, _, inode, *path = line.rstrip("\n").split(maxsplit=5)
            start, _, end = place.partition("-")
            found.append(Mapping(int(start, 16), int(end, 16), mode, int(inode), "".join(path)))
    return found


def status(pid: int | str) -> dict[str, str]:
    """The fields of a process's status; ``self`` is this one.

    :raises OSError: it is gone
    """
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}


@dataclasses.dataclass(frozen=True)
class Process:
    """A process, told from a later one that has its pid.

    :param start_time: clock ticks since boot (field 22 of /proc/PID/stat)
    """

    pid: int
    start_time: int

    @classmethod
    def find(cls, pid: int) -> "Process":
        """The process that has this pid now.

        :raises ProcessLookupError: there is none
        """
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                stat = file.read()
        except FileNotFoundError as error:
            raise ProcessLookupError(errno.ESRCH, f"No process {pid}") from error
        # The name, field 2, may hold anything, even a parenthesis.
        return cls(pid, int(stat[stat.rindex(b")") + 2 :].split()[19]))

    def alive(self) -> bool:
        """Whether it exists and has not exited."""
        with self._open() as pidfd:
            return pidfd is not None and not _exited(pidfd)

    def kill(self) -> None:
        """End it and wait until its memory is free. Does nothing if it is gone already.

        :raises SnowFlockError: it does not end
        """
        with self._open() as pidfd:
            if pidfd is None:
                return
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not _exited(pidfd, _KILL_TIMEOUT):
                raise exception.SnowFlockError(
                    f"Process {self.pid} does not end {_KILL_TIMEOUT:.0f} s after SIGKILL"
                )
            # It is ours to reap if QEMU was our child, not if init or another process started it.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)

    @contextlib.contextmanager
    def _open(self) -> Iterator[int | None]:
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            yield None
            return
        try:
            # Only now: from here on the pid cannot change hands unseen.
            yield pidfd if Process.find(self.pid) == self else None
        except ProcessLookupError:
            yield None
        finally:
            os.close(pidfd)


def _exited(pidfd: int, timeout: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))
