# SPDX-License-Identifier: Apache-2.0
"""Pages read, sealed and cut into datagrams for one system call (UDP segmentation offload)."""

from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import wire
from nova_snowflock.memtap.server import source as image_source

_ZEROS = bytes(65536)


class Batch:
    """Buffers for one send, made once and used for every send.

    Pages are read straight into the slots from which they are sealed, and sealed straight into the
    buffer that is sent: nothing is copied in between.
    """

    def __init__(self, geometry: wire.Geometry) -> None:
        self.geometry = geometry
        self._slot = wire.LOCATION.size + geometry.payload
        self._plain = bytearray(self._slot * geometry.segments)
        self._view = memoryview(bytearray(geometry.datagram * geometry.segments))
        plain = memoryview(self._plain)
        slots = range(0, len(plain), self._slot)
        self._slots = [plain[start : start + self._slot] for start in slots]
        self._headers = []
        self._bodies = []
        for start in range(0, len(self._view), geometry.datagram):
            body = start + wire.HEADER.size
            self._headers.append(self._view[start:body])
            self._bodies.append(self._view[body : start + geometry.datagram])
        # The last fragment of a page carries a few bytes of padding, which stay zero.
        last = PAGE_SIZE * geometry.pages - geometry.payload * (geometry.fragments - 1)
        self._buffers = [
            slot[wire.LOCATION.size :][
                : last if (index + 1) % geometry.fragments == 0 else geometry.payload
            ]
            for index, slot in enumerate(self._slots)
        ]

    def seal(
        self, source: image_source.ImageSource, run: wire.Run, sealer: wire.Sealer
    ) -> tuple[memoryview, list[wire.Run]]:
        """Read a run of at most ``geometry.batch`` pages and seal what is not zero.

        :returns: the datagrams, all ``geometry.datagram`` bytes long but for the last, which may be
            shorter; and the pages that turned out to be zero and are not among them
        :raises SourceLost: as the source does
        """
        geometry = self.geometry
        fragments = geometry.fragments
        units = -(-run.pages // geometry.pages)
        cut = (units * geometry.pages - run.pages) * PAGE_SIZE
        buffers = self._buffers[: units * fragments]
        if cut:
            buffers[-1] = buffers[-1][:-cut]
        source.read(run.page, buffers)

        zeros: list[wire.Run] = []
        used = 0
        for unit in range(units):
            page = run.page + unit * geometry.pages
            if self._is_zero(unit):
                pages = min(geometry.pages, run.page + run.pages - page)
                zeros.append(wire.Run(run.file, page, pages))
                continue
            for fragment in range(fragments):
                slot = unit * fragments + fragment
                wire.LOCATION.pack_into(
                    self._plain, slot * self._slot, run.file, fragments, fragment, page
                )
                plain, body = self._slots[slot], self._bodies[used]
                if cut and unit == units - 1:
                    plain, body = plain[:-cut], body[:-cut]
                sealer.seal_into(wire.DATA, plain, self._headers[used], body)
                used += 1
        size = used * geometry.datagram
        if cut and not (zeros and zeros[-1].page + zeros[-1].pages == run.page + run.pages):
            size -= cut
        return self._view[:size], zeros

    def _is_zero(self, unit: int) -> bool:
        fragments = self.geometry.fragments
        return all(
            self._plain.startswith(
                _ZEROS[: len(self._buffers[slot])], slot * self._slot + wire.LOCATION.size
            )
            for slot in range(unit * fragments, (unit + 1) * fragments)
        )
