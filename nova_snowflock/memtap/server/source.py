# SPDX-License-Identifier: Apache-2.0
"""Where a memory server reads the files of a fork image from."""

import abc
import bisect
from collections.abc import Sequence
import errno
import os
import sys

from nova_snowflock import exception
from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import pagemap

# Linux Documentation/admin-guide/mm/pagemap.rst: a page is there if it is in memory (bit 63) or
# swapped out (bit 62). What is neither was never written, or was given back by the guest.
_PAGEMAP_ENTRY = 8
_PAGEMAP_HIGHEST = 7 if sys.byteorder == "little" else 0
_PAGEMAP_POPULATED = bytes(0x40) + b"\1" * 0xC0
_PAGEMAP_PAGES_AT_ONCE = 1 << 18


class ImageSource(abc.ABC):
    """One file of a fork image: its size, its page map, and its pages."""

    size: int
    """Bytes in the file; the last page may be cut short."""

    page_map: pagemap.PageMap

    @property
    def pages(self) -> int:
        return -(-self.size // PAGE_SIZE)

    @abc.abstractmethod
    def read(self, page: int, buffers: Sequence[memoryview]) -> None:
        """Fill ``buffers``, one after another, with the bytes from ``page`` on.

        Together the buffers hold whole pages of this file; bytes after its end are zero.

        :raises SourceLost: the file's content is gone for good (the frozen process has ended)
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Give the descriptors back."""


class Blob(ImageSource):
    """A file held in memory, such as the descriptor."""

    def __init__(self, data: bytes) -> None:
        self.size = len(data)
        self.page_map = pagemap.PageMap(b"\1" * self.pages)
        self._data = memoryview(data.ljust(self.pages * PAGE_SIZE, b"\0"))

    def read(self, page: int, buffers: Sequence[memoryview]) -> None:
        start = page * PAGE_SIZE
        for buffer in buffers:
            buffer[:] = self._data[start : start + len(buffer)]
            start += len(buffer)

    def close(self) -> None:
        pass


class SparseFile(ImageSource):
    """A plain file; its holes are zero pages."""

    def __init__(self, fd: int, patch: tuple[int, bytes] = (0, b"")) -> None:
        """
        :param fd: readable descriptor of a regular file, owned by this object from now on
        :param patch: offset, and what is served from there instead of what the file has
        """
        self._fd = fd
        self._patch_start, self._patch = patch
        self._patch_end = self._patch_start + len(self._patch)
        self.size = os.fstat(fd).st_size
        try:
            if not 0 <= self._patch_start <= self._patch_end <= self.size:
                raise ValueError(f"a patch up to byte {self._patch_end} is beyond the file's end")
            self.page_map = pagemap.PageMap(self._find_data())
        except BaseException:
            os.close(fd)
            raise

    def _find_data(self) -> bytes:
        content = bytearray(self.pages)
        if self._patch:
            first, after = self._patch_start // PAGE_SIZE, -(-self._patch_end // PAGE_SIZE)
            content[first:after] = b"\1" * (after - first)
        end = 0
        while end < self.size:
            try:
                start = os.lseek(self._fd, end, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole is left
                    break
                raise
            end = os.lseek(self._fd, start, os.SEEK_HOLE)
            first, after = start // PAGE_SIZE, -(-end // PAGE_SIZE)
            content[first:after] = b"\1" * (after - first)
        return bytes(content)

    def read(self, page: int, buffers: Sequence[memoryview]) -> None:
        wanted = sum(map(len, buffers))
        start = page * PAGE_SIZE
        try:
            got = os.preadv(self._fd, buffers, start)
        except OSError as error:
            raise exception.SourceLost(
                f"a file of the fork image cannot be read: {error}"
            ) from error
        if got != wanted:
            if start + got < self.size:
                raise exception.SourceLost(
                    "a file of the fork image was cut short under its server"
                )
            for buffer in buffers:
                filled = min(got, len(buffer))
                buffer[filled:] = bytes(len(buffer) - filled)
                got -= filled
        if start < self._patch_end:
            self._apply_patch(start, buffers)

    def _apply_patch(self, start: int, buffers: Sequence[memoryview]) -> None:
        for buffer in buffers:
            end = start + len(buffer)
            first, after = max(start, self._patch_start), min(end, self._patch_end)
            if first < after:
                buffer[first - start : after - start] = self._patch[
                    first - self._patch_start : after - self._patch_start
                ]
            start = end

    def close(self) -> None:
        os.close(self._fd)


class ProcessMemory(ImageSource):
    """Address ranges of a frozen process, one after another, as one file."""

    def __init__(
        self,
        memory_fd: int,
        pagemap_fd: int,
        ranges: Sequence[tuple[int, int]],
        below: bytes | None = None,
    ) -> None:
        """The descriptors are owned by this object from now on.

        :param memory_fd: /proc/PID/mem, opened by someone who may trace the process
        :param pagemap_fd: /proc/PID/pagemap, likewise; it is read here and closed
        :param ranges: (address, bytes) of each range; both are multiples of the page size
        :param below: the encoded page map of a file that these are a private mapping of, in which
            a page that the process does not have is that of the file
        """
        self._fd = memory_fd
        self._addresses = [address for address, _ in ranges]
        self._starts = [0]
        for _, length in ranges:
            self._starts.append(self._starts[-1] + length)
        self.size = self._starts.pop()
        try:
            if not ranges or any(value % PAGE_SIZE for pair in ranges for value in pair):
                raise ValueError(f"the ranges {ranges} are not made of whole pages")
            populated = [_populated(pagemap_fd, *pair) for pair in ranges]
            self.page_map = pagemap.PageMap(b"".join(populated))
            if below is not None:
                self.page_map |= pagemap.PageMap.decode(below, self.pages)
        except BaseException:
            os.close(memory_fd)
            raise
        finally:
            os.close(pagemap_fd)

    def read(self, page: int, buffers: Sequence[memoryview]) -> None:
        offset = page * PAGE_SIZE
        # Nearly every guest has one range, and a run that crosses two is read buffer by buffer.
        if len(self._starts) == 1:
            self._read(self._addresses[0] + offset, buffers, sum(map(len, buffers)))
            return
        for buffer in buffers:
            done = 0
            while done < len(buffer):
                index = bisect.bisect_right(self._starts, offset) - 1
                end = self._starts[index + 1] if index + 1 < len(self._starts) else self.size
                part = buffer[done : done + end - offset]
                address = self._addresses[index] + offset - self._starts[index]
                self._read(address, (part,), len(part))
                done += len(part)
                offset += len(part)

    def _read(self, address: int, buffers: Sequence[memoryview], wanted: int) -> None:
        try:
            got = os.preadv(self._fd, buffers, address)
        except OSError as error:
            raise exception.SourceLost(f"the frozen memory cannot be read: {error}") from error
        if got != wanted:
            raise exception.SourceLost("the process that holds the frozen memory has ended")

    def close(self) -> None:
        os.close(self._fd)


def _populated(pagemap_fd: int, address: int, length: int) -> bytes:
    """One byte a page, as in a page map."""
    end = (address + length) // PAGE_SIZE
    parts = []
    for page in range(address // PAGE_SIZE, end, _PAGEMAP_PAGES_AT_ONCE):
        count = min(_PAGEMAP_PAGES_AT_ONCE, end - page)
        entries = os.pread(pagemap_fd, count * _PAGEMAP_ENTRY, page * _PAGEMAP_ENTRY)
        if len(entries) != count * _PAGEMAP_ENTRY:
            raise exception.SourceLost("the process that holds the frozen memory has ended")
        parts.append(entries[_PAGEMAP_HIGHEST::_PAGEMAP_ENTRY].translate(_PAGEMAP_POPULATED))
    return b"".join(parts)
