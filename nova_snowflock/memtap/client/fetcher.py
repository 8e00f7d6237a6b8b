# SPDX-License-Identifier: Apache-2.0
"""Getting missing pages: what guests wait for, what was lost, and the rest in the background."""

from collections.abc import Callable
import dataclasses
import functools
import logging
import math
import time
from typing import Any

from nova_snowflock import endpoint
from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import loop as event_loop
from nova_snowflock.memtap import spec as process_spec
from nova_snowflock.memtap import udp
from nova_snowflock.memtap import wire
from nova_snowflock.memtap.client import assembler
from nova_snowflock.memtap.client import attachment
from nova_snowflock.memtap.client import outstanding
from nova_snowflock.memtap.client import store as page_store

LOG = logging.getLogger(__name__)

BLOCK = outstanding.BLOCK

_WINDOW = 64
"""Blocks of background pages on their way at most: 4 MiB, which a receive buffer here holds."""
_SILENCE = 0.25
"""Seconds without an answer after which a memtap greets its server anew."""
_SETTLE = 1.0
"""Seconds that the background waits at first: clones are being started, and want the processors."""
_ATTEMPTS = 6
"""Requests for the same pages without an answer after which it does so, too."""
_LISTEN = 0.01
"""Seconds that a memtap listens before it fetches in the background, to go along with others."""
_BUSY = 0.25
_YIELD = 0.125
"""While a guest has waited for a page this many seconds ago or less, the background fetches at this
part of its rate only: network and processors are the guests'."""
_SPIN = 500e-6
"""Seconds that are spent on waiting for an answer without sleeping, if it usually takes less: to be
woken up takes about as long as a server nearby takes to answer."""
_TURN = 16
"""System calls that receive in one turn; then faults have their turn."""

_OVERHEAD = wire.HEADER.size + wire.TAG_SIZE


@dataclasses.dataclass
class Counters:
    """What a fetcher has done since it started; datagrams, and bytes of page data."""

    fault_requests: int = 0
    background_requests: int = 0
    repeated_requests: int = 0
    bytes_multicast: int = 0
    bytes_unicast: int = 0
    stale: int = 0
    malformed: int = 0


class Fetcher:
    """The receiving end of mcdist for one image.

    :param store: where pages go
    :param present: called with a file, a page and the number of pages from it on that are there
    :param arrived: as :class:`assembler.Assembler` calls it
    """

    opener_class = wire.Opener

    def __init__(
        self,
        spec: process_spec.MemtapSpec,
        servers: list[endpoint.Address],
        group: endpoint.Address | None,
        store: page_store.PageStore,
        loop: event_loop.Loop,
        present: Callable[[page_store.StoredFile, int, int], None],
        arrived: Callable[[page_store.StoredFile, int, list[memoryview]], None],
    ) -> None:
        self.counters = Counters()
        self.state = "attaching"
        self.population = spec.population
        self._spec = spec
        self._store = store
        self._loop = loop
        self._present = present
        self._buffer = memoryview(bytearray(udp.RECEIVE_SIZE))
        self._plain = memoryview(bytearray(udp.RECEIVE_SIZE))
        self._assembler = assembler.Assembler(store, self._pages_present, arrived)
        self._outstanding = outstanding.Outstanding()
        self._around = max(1, spec.read_around // PAGE_SIZE)
        self._now = self._quiet = time.monotonic()
        self._lost = 0
        # Sockets with more to read. What is there must not be asked for.
        self._backlog: set[udp.UdpSocket] = set()
        self._faulted = -math.inf
        self._wake = self._spin_end = 0.0
        self._next_fill = math.inf
        # The background goes on here: position in the list of files, and page.
        self._cursor: tuple[int, int] | None = None
        self._sockets = [udp.UdpSocket((spec.address, 0), spec.interface)]
        if group:
            self._sockets.append(udp.UdpSocket(group, spec.interface))
        for sock in self._sockets:
            loop.add(sock.fileno(), functools.partial(self._receive, sock))
        self._attachment = attachment.Attachment(
            spec.key, servers, self._sockets[0].send, self.opener_class
        )

    def want(self, file: page_store.StoredFile, page: int, count: int) -> None:
        """Ask for those of these pages that are missing, and then for what is around them.

        A guest waits for them, but not for the others.
        """
        self._faulted = now = time.monotonic()
        if not self._outstanding:
            self._quiet = now
        end = page + count
        first = page - page % self._around
        after = min(first + self._around, file.pages)
        runs = self._want(file, page, end, now)
        if first < page:
            runs += self._want(file, first, page, now)
        if end < after:
            runs += self._want(file, end, after, now)
        if runs:
            self.counters.fault_requests += 1
            self._attachment.request(wire.FAULT, runs, now)
        if self._outstanding.due < self._wake:
            self._wake = self._outstanding.due
        if self._outstanding.fault_timeout.mean < _SPIN:
            self._spin_end = now + _SPIN

    def _want(self, file: page_store.StoredFile, page: int, end: int, now: float) -> list[wire.Run]:
        """Note a request for the missing pages before ``end`` that are not on their way."""
        runs: list[wire.Run] = []
        while page < end:
            block = page // BLOCK
            after = min(end, (block + 1) * BLOCK)
            bits = file.missing_bits(page, after) << page % BLOCK
            bits &= ~self._outstanding.on_its_way(file, block)
            if bits:
                self._outstanding.add(file, block, bits, now, background=False)
                runs += outstanding.runs(file, block, bits)
            page = after
        return runs

    def work(self) -> float | None:
        """Greet, retry, fetch in the background; for :meth:`Loop.run`."""
        now = time.monotonic()
        if now < self._spin_end and self._outstanding:
            return 0.0
        if now < self._wake:
            return None if self._wake == math.inf else self._wake - now
        if self.state == "detached":
            self._wake = math.inf
        elif not self._store.missing:
            self._detach()
        else:
            self._retry(now)
            if self._attachment.attached:
                self._fill(now)
                self._attachment.keep_alive(now)
                self._wake = min(
                    self._outstanding.due, self._next_fill, self._attachment.keep_alive_due
                )
            else:
                self._wake = self._attachment.greet(now)
            self._watch(now)
        return None if self._wake == math.inf else max(0.0, self._wake - now)

    def detach(self, population: str = "background") -> None:
        """Fetch whatever is missing, at least as that policy does, and then let go of the server.

        :raises ValueError: there is no such policy
        """
        if process_spec.eagerness(population) > process_spec.eagerness(self.population):
            self.population = population
            self._next_fill = self._wake = 0.0

    def status(self) -> dict[str, Any]:
        """The counters."""
        rejected, replayed = self._attachment.refused()
        return {
            "server": endpoint.format(self._attachment.server),
            "rejected": rejected,
            "replayed": replayed,
            "bytes_repeated": self._assembler.repeated,
            "fault_timeout": self._outstanding.fault_timeout.value,
            "outstanding": len(self._outstanding),
            **dataclasses.asdict(self.counters),
            "malformed": self.counters.malformed + self._assembler.malformed,
        }

    def close(self) -> None:
        """Let go of the server and the sockets."""
        if self._sockets:
            self._attachment.leave()
        for sock in self._sockets:
            self._loop.remove(sock.fileno())
            sock.close()
        self._sockets.clear()

    def _detach(self) -> None:
        LOG.info("Image %s: all pages are here; the server is let go", self._spec.image)
        self.state = "detached"
        self.close()

    # Requests

    def _retry(self, now: float) -> None:
        if now < self._outstanding.due or not self._attachment.attached:
            return
        overdue = self._outstanding.overdue(now)
        silence = max(_SILENCE, 3 * self._outstanding.fault_timeout.value)
        # A server that has forgotten this memtap may still be heard, as it sends to others.
        in_vain = any(request.attempts > _ATTEMPTS for request in overdue)
        if overdue and (now - self._quiet > silence or (in_vain and not self._store.error)):
            self._attachment.lose(now)
            return
        for request in overdue:
            if self._quiet < request.sent:  # else something came, and this was only lost
                self._outstanding.timeout(request).back_off()
            self._repeat(request, now)

    def _repeat(self, request: outstanding.Request, now: float) -> None:
        self.counters.repeated_requests += 1
        self._outstanding.renew(request, now)
        priority = wire.REPAIR | wire.FAULT if request.fault else wire.REPAIR
        runs = outstanding.runs(request.file, request.block, request.wanted)
        self._attachment.request(priority, runs, now)

    def _watch(self, now: float) -> None:
        """Tell once if guests wait in vain."""
        waiting = len(self._outstanding) or not self._attachment.attached
        if self.state == "stalled" or not waiting or now - self._quiet < self._spec.stall_after:
            return
        self.state = "stalled"
        LOG.warning(
            "Image %s: no memory server has answered for %.0f s, the last one tried is %s; "
            "clones that need missing pages wait",
            self._spec.image,
            now - self._quiet,
            endpoint.format(self._attachment.server),
        )

    def _heard(self, now: float) -> None:
        if self.state != "attached":
            LOG.info(
                "Image %s: %s answers", self._spec.image, endpoint.format(self._attachment.server)
            )
            self.state = "attached"
        self._quiet = now

    def _welcome(self, session: int, datagram: memoryview) -> None:
        try:
            if not self._attachment.welcome(session, datagram):
                return
        except ValueError:
            self.counters.malformed += 1
            return
        now = self._now
        self._heard(now)
        for file in self._store.files.values():
            file.forget_fragments()  # this server may cut pages in another way
        for request in self._outstanding:
            request.attempts = 1
            self._repeat(request, now)
        if self.population == "eager":
            self._next_fill = now + _LISTEN
        elif self.population == "background":
            self._next_fill = now + _SETTLE
        self._wake = 0.0

    # Background

    def _fill(self, now: float) -> None:
        if now < self._next_fill or self._backlog:
            return
        if self._cursor is None:
            self._cursor = self._join()
        runs: list[wire.Run] = []
        pages = 0
        most = 1 if self.population == "background" else wire.MAX_RUNS
        if not self._outstanding:
            self._quiet = now
        while len(runs) < most and self._outstanding.background < _WINDOW:
            request = self._request_next(now)
            if request is None:
                break
            for run in outstanding.runs(request.file, request.block, request.wanted):
                pages += run.pages
                last = runs[-1] if runs else None
                if last and last.file == run.file and last.page + last.pages == run.page:
                    runs[-1] = wire.Run(run.file, last.page, last.pages + run.pages)
                else:
                    runs.append(run)
        if runs:
            self.counters.background_requests += 1
            self._attachment.request(wire.BACKGROUND, runs, now)
        if self.population == "eager":
            self._next_fill = math.inf  # until something arrives
        elif runs:
            rate = self._spec.background_rate
            if now - self._faulted < _BUSY:
                rate *= _YIELD
            self._next_fill = now + pages * PAGE_SIZE / rate
        else:
            self._next_fill = now + _LISTEN

    def _join(self) -> tuple[int, int]:
        """Begin where the others are now, and do last what they have already had."""
        if self._assembler.last is None:
            return 0, 0
        file, page = self._assembler.last
        return list(self._store.files.values()).index(file), page

    def _request_next(self, now: float) -> outstanding.Request | None:
        """A request for the next block of which nothing has been asked for."""
        files = list(self._store.files.values())
        assert self._cursor is not None
        position, page = self._cursor
        for _ in range(len(files) + 1):
            file = files[position]
            while (page := file.find_missing(page)) < file.pages:
                block = page // BLOCK
                page = (block + 1) * BLOCK
                if not self._outstanding.has(file, block):
                    self._cursor = (position, page)
                    bits = file.missing_bits(block * BLOCK, min(page, file.pages))
                    return self._outstanding.add(file, block, bits, now, background=True)
            position, page = (position + 1) % len(files), 0
        return None

    # What arrives

    def _receive(self, sock: udp.UdpSocket) -> None:
        for _ in range(_TURN):
            received = sock.receive_into(self._buffer)
            if received is None:
                break
            self._handle(received[0], received[1])
            if not self._sockets:
                return
        else:
            if sock.has_more():
                self._backlog.add(sock)
                return
        if self._backlog:
            self._backlog.discard(sock)
            self._wake = 0.0

    def _handle(self, size: int, segment: int) -> None:
        self._now = now = time.monotonic()
        buffer, plain = self._buffer, self._plain
        openers = self._attachment.openers
        if not size:
            self.counters.malformed += 1
        for start in range(0, size, segment):
            end = min(start + segment, size)
            header = wire.parse_header(buffer, start, end)
            if header is None:
                self.counters.malformed += 1
                continue
            kind, session, sequence = header
            opener = openers.get(session)
            if opener is not None:
                body = start + wire.HEADER.size
                payload = plain[start : end - _OVERHEAD]
                if opener.open_into(sequence, buffer[start:body], buffer[body:end], payload):
                    self._quiet = now
                    self._take(kind, payload, opener)
            elif kind == wire.WELCOME and not self._attachment.attached:
                self._assembler.flush()
                self._welcome(session, buffer[start:end])
                openers = self._attachment.openers
            else:
                self.counters.stale += 1
        self._assembler.flush()
        if self._attachment.lost > self._lost and self._assembler.last:
            self._lost = self._attachment.lost
            for request in self._outstanding.stranded(*self._assembler.last):
                self._repeat(request, now)
        if self.state == "stalled" and self._quiet == now:
            self._heard(now)

    def _take(self, kind: int, payload: memoryview, opener: wire.Opener) -> None:
        if kind == wire.DATA:
            self._assembler.add(payload)
            if opener is self._attachment.unicast:
                self.counters.bytes_unicast += len(payload)
            else:
                self.counters.bytes_multicast += len(payload)
        elif kind == wire.ZERO:
            self._take_zeros(payload)
        elif kind != wire.WELCOME:
            self.counters.malformed += 1

    def _take_zeros(self, payload: memoryview) -> None:
        try:
            runs = wire.decode_runs(bytes(payload))
        except ValueError:
            self.counters.malformed += 1
            return
        for run in runs:
            file = self._store.files.get(run.file)
            if file is None or run.page + run.pages > file.pages:
                self.counters.malformed += 1
                continue
            for page, pages in file.set_present(run.page, run.pages, page_store.ZERO):
                self._pages_present(file, page, pages)

    def _pages_present(self, file: page_store.StoredFile, page: int, count: int) -> None:
        done = self._outstanding.arrived(file, page, count, self._now)
        if done and self.population == "eager":
            self._next_fill = self._wake = 0.0
        if not file.missing:
            self._wake = 0.0
        self._present(file, page, count)
