# SPDX-License-Identifier: Apache-2.0
"""The page store: what a clone host has of an image's files, and which pages those are."""

from collections.abc import Iterable, Sequence
import dataclasses
import os
import re

from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import pagemap

ZERO = 0x40
"""State of a page that is known to be zero; the store has a hole there."""
RESIDENT = 0x80
"""State of a page that is in the store."""
# A missing page has one of the bits below ZERO for each fragment of it that is in the store.


_MISSING = re.compile(rb"[\x00-\x3f]")
_CONTENT = re.compile(rb"[^\x40]", re.DOTALL)
_FROM_CONTENT = bytes.maketrans(b"\0\1", bytes((ZERO, 0)))
_WHOLE = bytes(ZERO) + bytes(range(ZERO, 256))


class StoredFile:
    """One file: a sparse file without a name, and the state of every page.

    The state is one byte a page, below :data:`ZERO` while the page is missing.
    """

    def __init__(self, number: int, name: str, size: int, directory: str) -> None:
        self.number = number
        self.name = name
        self.size = size
        self.pages = -(-size // PAGE_SIZE)
        self.state = bytearray(self.pages)
        self.missing = self.pages
        self.zero = 0
        # It holds guest memory: nobody finds it by a name, and nothing is left when it is closed.
        self._fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, self.pages * PAGE_SIZE)

    @property
    def resident(self) -> int:
        return self.pages - self.zero - self.missing

    def apply(self, page_map: pagemap.PageMap) -> None:
        """Note which pages are zero; before any is written."""
        self.state[:] = page_map.content.translate(_FROM_CONTENT)
        self.missing = page_map.count()
        self.zero = self.pages - self.missing

    def set_present(self, page: int, count: int, state: int) -> list[tuple[int, int]]:
        """Pages have become :data:`ZERO` or :data:`RESIDENT`.

        :returns: (page, count) of those that were missing
        """
        if not count:
            return []
        states = self.state[page : page + count]
        if max(states) < ZERO:
            new = [(page, count)]
        else:
            new = [(page + i, 1) for i, known in enumerate(states) if known < ZERO]
        for first, pages in new:
            self.state[first : first + pages] = bytes((state,)) * pages
            self.missing -= pages
            if state == ZERO:
                self.zero += pages
        return new

    def is_present(self, page: int, count: int) -> bool:
        """Whether all of these pages are resident or zero."""
        if count == 1:
            return self.state[page] >= ZERO
        return min(self.state[page : page + count]) >= ZERO

    def missing_bits(self, page: int, end: int) -> int:
        """A bit for each missing page from ``page``, which has the lowest, to before ``end``."""
        bits = 0
        for number, state in enumerate(self.state[page:end]):
            if state < ZERO:
                bits |= 1 << number
        return bits

    def find_missing(self, page: int) -> int:
        """The first missing page from ``page`` on; the number of pages if there is none."""
        found = _MISSING.search(self.state, page)
        return found.start() if found else self.pages

    def find_content(self, page: int) -> int:
        """The first page from ``page`` on not known to be zero; the number of pages if none is."""
        found = _CONTENT.search(self.state, page)
        return found.start() if found else self.pages

    def find_zero(self, page: int) -> int:
        """The first page from ``page`` on known to be zero; the number of pages if none is."""
        found = self.state.find(ZERO, page)
        return self.pages if found < 0 else found

    def forget_fragments(self) -> None:
        """Ask for whole pages again: the sender now cuts them in another way."""
        self.state[:] = self.state.translate(_WHOLE)

    def write(self, offset: int, buffers: Sequence[memoryview]) -> None:
        """Store bytes; does not change any state.

        :raises OSError: there is no room for them
        """
        wanted = sum(map(len, buffers))
        written = os.pwritev(self._fd, buffers, offset)
        if written != wanted:
            # The next write at this place says why.
            os.pwrite(self._fd, b"\0", offset + written)
            raise OSError(f"{written} of {wanted} bytes were written")

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` from present pages; zero pages read as zeros."""
        if os.preadv(self._fd, (buffer,), offset) != len(buffer):
            raise OSError(f"the page store of file {self.number} was cut short")

    def close(self) -> None:
        os.close(self._fd)


@dataclasses.dataclass
class PageStore:
    """The files of one image by number."""

    files: dict[int, StoredFile]
    error: str | None = None
    """Why the last write failed; None if it did not."""

    @property
    def missing(self) -> int:
        """Missing pages of all files."""
        return sum(file.missing for file in self.files.values())

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def total(files: Iterable[StoredFile]) -> dict[str, int]:
    """Pages by state over files, for the status."""
    files = list(files)
    return {
        "resident": sum(file.resident for file in files),
        "zero": sum(file.zero for file in files),
        "missing": sum(file.missing for file in files),
    }
