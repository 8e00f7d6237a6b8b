# SPDX-License-Identifier: Apache-2.0
"""Datagrams back to pages: what arrives together is written to the store together."""

from collections.abc import Callable
import logging

from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import store as page_store
from nova_snowflock.memtap import wire

LOG = logging.getLogger(__name__)


class Assembler:
    """Collects page data until :meth:`flush`.

    :param store: where it goes
    :param present: called with a file and a page number once that page is resident
    """

    def __init__(
        self,
        store: page_store.PageStore,
        present: Callable[[page_store.StoredFile, int], None],
    ) -> None:
        self.malformed = 0
        self.repeated = 0
        self.last: tuple[page_store.StoredFile, int] | None = None
        """Where the page data that came last belongs: file and page."""
        self._store = store
        self._present = present
        self._file: page_store.StoredFile | None = None
        self._start = self._end = 0
        self._buffers: list[memoryview] = []
        self._parts: list[tuple[int, int, int, int]] = []

    def add(self, payload: memoryview) -> None:
        """Take the location and page data of one datagram; the buffer is needed until the flush."""
        number, fragments, index, page = wire.LOCATION.unpack_from(payload)
        data = payload[wire.LOCATION.size :]
        size = len(data)
        count = size // PAGE_SIZE if fragments == 1 else 1
        file = self._store.files.get(number)
        if (
            file is None
            or not index < fragments <= wire.Geometry.MAX_FRAGMENTS
            or not count
            or size != (count * PAGE_SIZE if fragments == 1 else -(-PAGE_SIZE // fragments))
            or page + count > file.pages
        ):
            self.malformed += 1
            return
        self.last = file, page
        if file.is_present(page, count):
            self.repeated += size
            return
        offset = page * PAGE_SIZE + index * size
        if fragments > 1 and index + 1 == fragments:
            data = data[: PAGE_SIZE - index * size]  # the rest is padding
        if offset != self._end or file is not self._file:
            self.flush()
            self._file = file
            self._start = offset
        self._end = offset + len(data)
        self._buffers.append(data)
        self._parts.append((page, count, 1 << index, (1 << fragments) - 1))

    def flush(self) -> None:
        """Write what was added, and only then count its pages as resident."""
        file = self._file
        if file is None:
            return
        if self._write(file):
            state = file.state
            for page, count, bit, complete in self._parts:
                for number in range(page, page + count):
                    fragments = state[number] | bit
                    if fragments == complete:
                        file.set_present(number, page_store.RESIDENT)
                        self._present(file, number)
                    elif fragments < page_store.ZERO:
                        state[number] = fragments
        self._file = None
        self._buffers.clear()
        self._parts.clear()

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
