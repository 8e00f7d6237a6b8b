# SPDX-License-Identifier: Apache-2.0
"""One at a time changes the layers of a guest's disks, and a fork need not wait for it."""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import os
import time

from nova_snowflock import exception
from nova_snowflock.memtap import lockfile

_LOOK_AGAIN = 0.05
# Less than nova-api waits for an answer ([DEFAULT]rpc_response_timeout): its user is to have the
# reason.
_PATIENCE = 20.0
_INTERRUPTED = b"interrupted\n"


class DomainLock:
    """Held. What its holder is about to do is noted in its file, for whoever comes after a kill.

    With ``kept``, also for whoever comes after this has failed.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.kept = False

    def note(self, what: str) -> None:
        """Note what is about to be done, in place of what was noted before."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, what.encode() + b"\n", 0)

    def noted(self) -> str:
        """What was noted last, by this holder or by one that was killed; empty if nothing was."""
        return os.pread(self._fd, 4096, 0).partition(b"\n")[0].decode()

    def interrupted(self) -> bool:
        """Whether a fork waits for the lock."""
        return os.pread(self._fd, 4096, 0).endswith(_INTERRUPTED)


@contextlib.contextmanager
def held(
    store_path: str, domain: str, interrupt: Callable[[], None] | None = None
) -> Iterator[DomainLock]:
    """Hold a domain's lock.

    :param domain: its UUID
    :param interrupt: called again and again while another holds it, to have that give up; None
        waits for as long as it takes
    :raises DiskError: it did not give up in time
    """
    os.makedirs(store_path, mode=0o700, exist_ok=True)
    path = os.path.join(store_path, f"{domain}.lock")
    deadline = time.monotonic() + _PATIENCE
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            if interrupt is None:
                fcntl.flock(fd, fcntl.LOCK_EX)
            else:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise exception.DiskError(
                            "another fork of it, or work on its disks, does not come to an end"
                        ) from None
                    if not DomainLock(fd).interrupted():
                        os.write(fd, _INTERRUPTED)
                    interrupt()
                    time.sleep(_LOOK_AGAIN)
                    continue
            # Whoever held it before has removed it.
            if not lockfile.is_current(fd, path):
                continue
            lock = DomainLock(fd)
            try:
                yield lock
            finally:
                if not lock.kept:
                    os.unlink(path)
            return
        finally:
            os.close(fd)
