# SPDX-License-Identifier: Apache-2.0
"""Directories that one process at a time changes."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """Alone with a directory, which is made unless it is there. Its owner may remove it."""
    while True:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is(directory, descriptor):
                continue
            yield
            return
        finally:
            os.close(descriptor)


def _is(directory: pathlib.Path, descriptor: int) -> bool:
    """Whether it is still that one: whoever had the lock before may have removed it."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), os.stat(directory))
    return False
