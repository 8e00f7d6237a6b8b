# SPDX-License-Identifier: Apache-2.0
"""Datagrams back to pages: what arrives together is written to the store together."""

from collections.abc import Callable
import logging

from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import wire
from nova_snowflock.memtap.client import store as page_store

LOG = logging.getLogger(__name__)


# Bytes of page data in a datagram by the number of fragments that a page is cut into.
_SIZES = [0, 0] + [-(-PAGE_SIZE // count) for count in range(2, wire.MAX_FRAGMENTS + 1)]


class Assembler:
    """Collects page data until :meth:`flush`.

    :param store: where it goes
    :param present: called with a file, a page and the number of pages from it on that are resident
    :param arrived: called with a file, a page and its content, in parts, if a page came alone, as
        an answer to a fault does; it is not in the store yet
    """

    def __init__(
        self,
        store: page_store.PageStore,
        present: Callable[[page_store.StoredFile, int, int], None],
        arrived: Callable[[page_store.StoredFile, int, list[memoryview]], None],
    ) -> None:
        self.malformed = 0
        self.repeated = 0
        self.last: tuple[page_store.StoredFile, int] | None = None
        """Where the page data that came last belongs: file and page."""
        self._store = store
        self._present = present
        self._arrived = arrived
        self._file: page_store.StoredFile | None = None
        self._start = self._end = 0
        self._buffers: list[memoryview] = []
        # What is in the buffers: pages, or fragments of pages as (page, bit, all bits).
        self._pages: list[tuple[int, int]] = []
        self._fragments: list[tuple[int, int, int]] = []

    def add(self, payload: memoryview) -> None:
        """Take the location and page data of one datagram; the buffer is needed until the flush."""
        if len(payload) < wire.LOCATION.size:
            self.malformed += 1
            return
        number, fragments, index, page = wire.LOCATION.unpack_from(payload)
        data = payload[wire.LOCATION.size :]
        file = self._store.files.get(number)
        if file is None or page >= file.pages:
            self.malformed += 1
            return
        if fragments == 1:
            self._add_pages(file, page, index, data)
            return
        size = len(data)
        if not index < fragments < len(_SIZES) or size != _SIZES[fragments]:
            self.malformed += 1
        elif file.state[page] >= page_store.ZERO:
            self.repeated += size
        else:
            if index + 1 == fragments:
                data = data[: PAGE_SIZE - index * size]  # the rest is padding
            self._append(file, page * PAGE_SIZE + index * size, data)
            self._fragments.append((page, 1 << index, (1 << fragments) - 1))

    def _add_pages(
        self, file: page_store.StoredFile, page: int, index: int, data: memoryview
    ) -> None:
        count, odd = divmod(len(data), PAGE_SIZE)
        if odd or index or not count or page + count > file.pages:
            self.malformed += 1
        elif file.is_present(page, count):
            self.repeated += len(data)
        else:
            self._append(file, page * PAGE_SIZE, data)
            self._pages.append((page, count))

    def _append(self, file: page_store.StoredFile, offset: int, data: memoryview) -> None:
        if offset != self._end or file is not self._file:
            self.flush()
            self._file = file
            self._start = offset
        self._end = offset + len(data)
        self._buffers.append(data)

    def flush(self) -> None:
        """Write what was added, and only then count its pages as resident."""
        file = self._file
        if file is None:
            return
        if self._end - self._start == PAGE_SIZE and self._start % PAGE_SIZE == 0:
            self._arrived(file, self._start // PAGE_SIZE, self._buffers)
        if self._write(file):
            self.last = file, (self._end - 1) // PAGE_SIZE
            for page, count in self._pages:
                self._complete(file, page, count)
            self._join_fragments(file)
        self._file = None
        self._buffers.clear()
        self._pages.clear()
        self._fragments.clear()

    def _join_fragments(self, file: page_store.StoredFile) -> None:
        """Pages of which the last fragment is here are complete."""
        state = file.state
        first = end = 0  # the pages from first on and before end have become complete
        for page, bit, complete in self._fragments:
            have = state[page] | bit
            if have != complete:
                state[page] = have
            elif page == end:
                end += 1
            else:
                self._complete(file, first, end - first)
                first, end = page, page + 1
        self._complete(file, first, end - first)

    def _complete(self, file: page_store.StoredFile, page: int, count: int) -> None:
        for first, pages in file.set_present(page, count, page_store.RESIDENT):
            self._present(file, first, pages)

    def _write(self, file: page_store.StoredFile) -> bool:
        store = self._store
        try:
            file.write(self._start, self._buffers)
        except OSError as error:
            # The pages stay missing, so they are asked for again and their guests wait.
            if store.error is None:
                LOG.error("The page store cannot be written, clones wait: %s", error)
            store.error = str(error)
            return False
        if store.error is not None:
            LOG.info("The page store can be written again")
            store.error = None
        return True
