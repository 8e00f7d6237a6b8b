# SPDX-License-Identifier: Apache-2.0
"""What a memory server sends to whom, and when: to one memtap or to all, at once or in turn."""

import array
import collections
from collections.abc import Iterable, Mapping
import dataclasses
import itertools
import math
import time

from nova_snowflock import endpoint
from nova_snowflock.memtap import udp
from nova_snowflock.memtap import wire
from nova_snowflock.memtap.server import batch
from nova_snowflock.memtap.server import pacer
from nova_snowflock.memtap.server import registry
from nova_snowflock.memtap.server import source as image_source

LOCKSTEP = 0.02
"""Seconds. What went to all less than this ago is on its way to whoever asks for it only now; if it
was lost, it is asked for again, as a repair."""

_MAX_QUEUED_PAGES = 1 << 20
_NOT = b"\1" + bytes(255)


@dataclasses.dataclass
class Counters:
    """What was sent; pages and bytes."""

    pages_multicast: int = 0
    pages_unicast: int = 0
    pages_zero: int = 0
    pages_lockstep: int = 0
    bytes_multicast: int = 0
    bytes_unicast: int = 0


@dataclasses.dataclass
class _Item:
    """Background work: pages for one memtap, or for all unless they went to all since then."""

    memtap: registry.Memtap | None
    run: wire.Run
    since: float


class Distributor:
    """Sends pages of the image's files.

    :param sources: the files by number; whoever adds one calls :meth:`add`
    :param everyone: the session of what is sent to ``group``; None if all is unicast
    """

    def __init__(
        self,
        sock: udp.UdpSocket,
        mtu: int,
        rate_limit: float | None,
        sources: Mapping[int, image_source.ImageSource],
        everyone: wire.Sealer,
        group: endpoint.Address | None,
    ) -> None:
        self.counters = Counters()
        self.queued_pages = 0
        self._socket = sock
        self._sources = sources
        self._everyone = everyone
        self._group = group
        self._geometry = wire.geometry(mtu)
        self._batch = batch.Batch(self._geometry)
        self.pacer = pacer.Pacer(rate_limit)
        self._queue: collections.deque[_Item] = collections.deque()
        # For each page, when it went to all last, and whether it is queued to do so.
        self._sent: dict[int, array.array[float]] = {}
        self._queued: dict[int, bytearray] = {}

    def add(self, number: int) -> None:
        """A file has been added to the sources."""
        pages = self._sources[number].pages
        self._sent[number] = array.array("d", (-math.inf,)) * pages
        self._queued[number] = bytearray(pages)

    def send(self, memtap: registry.Memtap | None, run: wire.Run, now: float) -> None:
        """Send pages that a guest waits for: to one memtap, or to all.

        :raises SourceLost: as the source does
        """
        self._send(_Item(memtap, run, now - LOCKSTEP))

    def repair(self, memtap: registry.Memtap, run: wire.Run, now: float) -> None:
        """Send pages again to the one that has lost them, unless they are still to be sent to all.

        At once: a repair that waits in the queue is asked for again and sent several times.

        :raises SourceLost: as the source does
        """
        for part in _runs_where(run, self._queued[run.file][_place(run)].translate(_NOT)):
            self._send(_Item(memtap, part, now))

    def enqueue(self, memtap: registry.Memtap | None, run: wire.Run, now: float) -> None:
        """Have pages sent in the background."""
        # What is queued for all need not be for one.
        for part in _runs_where(run, self._queued[run.file][_place(run)].translate(_NOT)):
            if self.queued_pages + part.pages > _MAX_QUEUED_PAGES:
                return  # they will be asked for again
            self.queued_pages += part.pages
            if memtap is None:
                self._queued[part.file][_place(part)] = b"\1" * part.pages
            self._append(_Item(memtap, part, now - LOCKSTEP))

    def _append(self, item: _Item) -> None:
        if self._queue:
            last = self._queue[-1]
            run = last.run
            adjacent = run.page + run.pages == item.run.page and run.file == item.run.file
            if adjacent and last.memtap is item.memtap:
                last.run = wire.Run(run.file, run.page, run.pages + item.run.pages)
                return
        self._queue.append(item)

    def work(self, now: float) -> float | None:
        """Send some of what is queued; for :meth:`Loop.run`.

        :raises SourceLost: as the source does
        """
        if not self._queue:
            self.pacer.idle(now)
            return None
        delay = self.pacer.delay(now)
        if delay:
            return delay
        item = self._queue[0]
        run = wire.Run(item.run.file, item.run.page, min(item.run.pages, self._geometry.batch))
        if run == item.run:
            self._queue.popleft()
        else:
            rest = item.run.pages - run.pages
            item.run = wire.Run(run.file, run.page + run.pages, rest)
        self.queued_pages -= run.pages
        if item.memtap is None:
            self._queued[run.file][_place(run)] = bytes(run.pages)
        self._send(_Item(item.memtap, run, item.since))
        return 0

    def forget(self, memtap: registry.Memtap) -> None:
        """The memtap has left."""
        self.pacer.forget(memtap)
        for item in [item for item in self._queue if item.memtap is memtap]:
            self._queue.remove(item)
            self.queued_pages -= item.run.pages

    def _send(self, item: _Item) -> None:
        run = item.run
        if item.memtap is None:
            since = item.since
            runs = _runs_where(run, [sent < since for sent in self._sent[run.file][_place(run)]])
            self.counters.pages_lockstep += run.pages - sum(part.pages for part in runs)
        else:
            runs = [run]
        step = self._geometry.batch
        for part in runs:
            for start in range(0, part.pages, step):
                count = min(step, part.pages - start)
                self._send_batch(item.memtap, wire.Run(run.file, part.page + start, count))

    def _send_batch(self, memtap: registry.Memtap | None, run: wire.Run) -> None:
        sealer = memtap.sealer if memtap else self._everyone
        address = memtap.address if memtap else self._group
        assert address is not None
        datagrams, zeros = self._batch.seal(self._sources[run.file], run, sealer)
        size = len(datagrams)
        count = -(-size // self._geometry.datagram)
        if size:
            self._socket.send_segments(datagrams, self._geometry.datagram, address)
        zero_pages = 0
        for start in range(0, len(zeros), wire.MAX_RUNS):
            part = zeros[start : start + wire.MAX_RUNS]
            notice = sealer.seal(wire.ZERO, wire.encode_runs(part))
            self._socket.send(notice, address)
            size += len(notice)
            count += 1
            zero_pages += sum(zero.pages for zero in part)
        now = time.monotonic()
        self.pacer.sent(size, count, now, memtap)
        counters = self.counters
        counters.pages_zero += zero_pages
        if memtap:
            counters.pages_unicast += run.pages - zero_pages
            counters.bytes_unicast += size
        else:
            self._sent[run.file][_place(run)] = array.array("d", (now,)) * run.pages
            counters.pages_multicast += run.pages - zero_pages
            counters.bytes_multicast += size


def _place(run: wire.Run) -> slice:
    return slice(run.page, run.page + run.pages)


def _runs_where(run: wire.Run, chosen: Iterable[int]) -> list[wire.Run]:
    """The parts of a run for which ``chosen``, a flag a page, is true."""
    runs = []
    page = run.page
    for flag, group in itertools.groupby(chosen):
        count = sum(1 for _ in group)
        if flag:
            runs.append(wire.Run(run.file, page, count))
        page += count
    return runs
