# SPDX-License-Identifier: Apache-2.0
"""Locks on files that may be removed, with or without their directory, by whoever holds them."""

from collections.abc import Iterator
import contextlib
import fcntl
import os


@contextlib.contextmanager
def held(path: str, operation: int) -> Iterator[int]:
    """Hold a lock on a file, which is made, with its directory, if it is not there.

    :param operation: as of flock(2)
    :returns: the file's descriptor
    :raises BlockingIOError: another holds it, and the operation is not to wait
    """
    while True:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        try:
            lock = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # the directory was removed meanwhile
        try:
            fcntl.flock(lock, operation)
            if is_current(lock, path):
                yield lock
                return
        finally:
            os.close(lock)


def is_current(fd: int, path: str) -> bool:
    """Whether the file was not removed since it was opened, and perhaps made anew."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
