# SPDX-License-Identifier: Apache-2.0
"""Copies of sparse files, as fast as the file system can make them."""

import errno
import os

# Of copy_file_range(2), where a file system or a kernel does not have it for these files.
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EXDEV)
_AT_ONCE = 1 << 20


def copy(source: str, target: str) -> int:
    """Copy a file that nobody writes to meanwhile. Its holes stay holes.

    It may be written by others past the page cache (O_DIRECT): the kernel keeps that coherent.

    :param target: is made, for its owner only
    :returns: bytes that are data
    :raises OSError: it cannot be made, and nothing of it is left
    """
    read_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        write_fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            return _copy(read_fd, write_fd)
        except BaseException:
            os.unlink(target)
            raise
        finally:
            os.close(write_fd)
    finally:
        os.close(read_fd)


def _copy(source: int, target: int) -> int:
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    copied = end = 0
    while end < size:
        try:
            start = os.lseek(source, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                break
            raise
        end = os.lseek(source, start, os.SEEK_HOLE)
        copied += end - start
        while start < end:
            start += _copy_some(source, target, start, end - start)
    return copied


def _copy_some(source: int, target: int, offset: int, length: int) -> int:
    """Copy at least one byte; how many."""
    try:
        copied = os.copy_file_range(source, target, length, offset, offset)
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
        copied = 0
    # Kernels from 5.3 to 5.18 say 0 of files that they could not copy.
    if not copied:
        copied = os.pwrite(target, os.pread(source, min(length, _AT_ONCE), offset), offset)
    if not copied:
        raise OSError(errno.EIO, "The file became shorter while it was copied")
    return copied
