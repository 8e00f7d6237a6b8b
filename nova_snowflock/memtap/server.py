# SPDX-License-Identifier: Apache-2.0
"""The memory server: one process that serves one fork image to the memtaps of its clone hosts."""

import base64
import collections
import dataclasses
import logging
import os
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from nova_snowflock import exception
from nova_snowflock.memtap import batch
from nova_snowflock.memtap import daemon
from nova_snowflock.memtap import loop as event_loop
from nova_snowflock.memtap import pacer
from nova_snowflock.memtap import source as image_source
from nova_snowflock.memtap import spec as process_spec
from nova_snowflock.memtap import udp
from nova_snowflock.memtap import wire

LOG = logging.getLogger(__name__)

DESCRIPTOR = 0
"""The number of the descriptor among the files of an image."""

# A page that went to everyone less than this many seconds ago is still on its way to whoever asks
# for it now. Memtaps repeat a request that was dropped for this reason as a repair.
_LOCKSTEP = 0.02
_MAX_MEMTAPS = 1024
_MAX_QUEUED_PAGES = 1 << 20
_DATAGRAMS_PER_TURN = 64


@dataclasses.dataclass(eq=False)
class _Memtap:
    """A receiver: the sessions between it and this server.

    :param greeting: the session of its HELLO
    :param identity: what it calls itself in every HELLO
    """

    greeting: int
    identity: int
    address: udp.Address
    sealer: wire.Sealer
    opener: wire.Opener
    confirmed: bool = False


@dataclasses.dataclass
class _Item:
    """Background work: pages for one memtap, or for all."""

    memtap: _Memtap | None
    run: wire.Run
    since: float


@dataclasses.dataclass
class Counters:
    """What a memory server has done since it started; pages and bytes."""

    requests: int = 0
    fault_requests: int = 0
    repair_requests: int = 0
    pages_multicast: int = 0
    pages_unicast: int = 0
    pages_zero: int = 0
    pages_lockstep: int = 0
    bytes_multicast: int = 0
    bytes_unicast: int = 0
    rejected: int = 0
    replayed: int = 0
    malformed: int = 0


class MemoryServer:
    """Answers requests for pages of the image's files."""

    def __init__(self, spec: process_spec.ServerSpec, loop: event_loop.Loop) -> None:
        self.counters = Counters()
        self.lost: str | None = None
        self._spec = spec
        self._loop = loop
        self._group = udp.parse(spec.group) if spec.group else None
        self._geometry = wire.geometry(spec.mtu)
        self._batch = batch.Batch(self._geometry)
        self._pacer = pacer.Pacer(self._geometry.datagram, spec.rate_limit)
        self._sources: dict[int, image_source.ImageSource] = {}
        # For each page, when it went to everyone last, and whether it is queued to do so.
        self._sent: dict[int, npt.NDArray[np.float64]] = {}
        self._queued: dict[int, npt.NDArray[np.bool_]] = {}
        self._serving = False
        self._memtaps: collections.OrderedDict[int, _Memtap] = collections.OrderedDict()
        self._openers: dict[int, _Memtap] = {}
        self._confirmed = 0
        self._everyone = wire.Sealer(
            session := wire.new_session(), wire.session_key(spec.key, "multicast", session)
        )
        self._queue: collections.deque[_Item] = collections.deque()
        self._queued_pages = 0
        self._buffer = memoryview(bytearray(udp.RECEIVE_SIZE))
        self._socket = udp.UdpSocket(udp.parse(spec.address), spec.interface)
        loop.add(self._socket.fileno(), self._receive)

    # Control commands

    def commands(self) -> dict[str, Any]:
        """What the control socket offers, by name."""
        return {
            "publish": self.publish,
            "serve": self.serve,
            "status": self.status,
            "stop": self.stop,
        }

    def publish(self, arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Open the image's files and tell which of their pages have content.

        Arguments: ``files``, a list of {"number", "name", "kind"}; kind "process" takes
        ``ranges`` [[address, bytes], ...] and two descriptors (/proc/PID/mem, /proc/PID/pagemap),
        kind "file" one descriptor.

        :raises ControlError: the files are published already, or the descriptors do not fit
        """
        try:
            if self._sources:
                raise exception.ControlError("the files of this image are published already")
            files = []
            for entry in arguments["files"]:
                source = _open_source(entry, fds)
                self._add_source(entry["number"], source)
                encoded = source.page_map.encode()
                files.append(
                    {
                        "number": entry["number"],
                        "name": entry["name"],
                        "size": source.size,
                        "content": source.page_map.count(),
                        "page_map": base64.b64encode(encoded).decode(),
                    }
                )
        except (KeyError, TypeError) as error:
            raise exception.ControlError(f"the files are not described right: {error!r}") from error
        finally:
            for fd in fds:
                os.close(fd)
        return {
            "files": files,
            "servers": [udp.unparse(self._socket.address)],
            "group": self._spec.group,
        }

    def serve(self, arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Serve the ``descriptor`` (base64) as file 0, and answer requests from now on."""
        if not self._sources or self._serving:
            raise exception.ControlError("an image is served once, after its files are published")
        self._add_source(DESCRIPTOR, image_source.Blob(base64.b64decode(arguments["descriptor"])))
        self._serving = True
        return {}

    def status(self, arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """State, memtaps and counters."""
        state = "lost" if self.lost else "serving" if self._serving else "prepared"
        return {
            "image": self._spec.image,
            "pid": os.getpid(),
            "state": state,
            "reason": self.lost,
            "servers": [udp.unparse(self._socket.address)],
            "memtaps": [udp.unparse(memtap.address) for memtap in self._receivers()],
            "rate": self._pacer.rate,
            "queued_pages": self._queued_pages,
            **dataclasses.asdict(self.counters),
        }

    def stop(self, arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """End the process."""
        self._loop.stop()
        return {}

    def _add_source(self, number: int, source: image_source.ImageSource) -> None:
        self._sources[number] = source
        self._sent[number] = np.full(source.pages, -np.inf)
        self._queued[number] = np.zeros(source.pages, np.bool_)

    # Datagrams in

    def _receive(self) -> None:
        for _ in range(_DATAGRAMS_PER_TURN):
            received = self._socket.receive_into(self._buffer)
            if received is None:
                return
            size, segment, address = received
            if not size:
                self.counters.malformed += 1
            for start in range(0, size, segment):
                self._handle(self._buffer[start : min(start + segment, size)], address)

    def _handle(self, datagram: memoryview, address: udp.Address) -> None:
        if len(datagram) < wire.HEADER.size + wire.TAG_SIZE:
            self.counters.malformed += 1
            return
        magic, version, kind, session, _ = wire.HEADER.unpack_from(datagram)
        if magic != wire.MAGIC or version != wire.VERSION:
            self.counters.malformed += 1
            return
        if not self._serving:
            return
        if kind == wire.HELLO:
            self._hello(datagram, session, address)
            return
        memtap = self._openers.get(session)
        if memtap is None or kind not in (wire.REQUEST, wire.BYE):
            self.counters.rejected += 1
            return
        replayed, rejected = memtap.opener.replayed, memtap.opener.rejected
        payload = memtap.opener.open(datagram)
        if payload is None:
            self.counters.replayed += memtap.opener.replayed - replayed
            self.counters.rejected += memtap.opener.rejected - rejected
            return
        if not memtap.confirmed:
            self._confirm(memtap)
        # Only a genuine datagram moves a memtap to another address.
        memtap.address = address
        if kind == wire.BYE:
            self._drop(memtap)
            return
        try:
            request = wire.decode_request(payload)
        except ValueError:
            self.counters.malformed += 1
            return
        self._request(memtap, request)

    def _hello(self, datagram: memoryview, session: int, address: udp.Address) -> None:
        opener = wire.Opener(session, wire.session_key(self._spec.key, "hello", session))
        payload = opener.open(datagram)
        if payload is None:
            self.counters.rejected += 1
            return
        try:
            identity = wire.decode_session(payload)
        except ValueError:
            self.counters.malformed += 1
            return
        memtap = self._memtaps.get(session)
        if memtap is None:
            memtap = self._admit(session, identity, address)
        elif memtap.address != address:
            self.counters.replayed += 1
            return
        everyone = self._everyone.session if self._group else 0
        welcome = memtap.sealer.seal(wire.WELCOME, wire.encode_session(everyone))
        self._socket.send(welcome, address)

    def _admit(self, session: int, identity: int, address: udp.Address) -> _Memtap:
        if len(self._memtaps) >= _MAX_MEMTAPS:
            # A recorded HELLO can be replayed, but what it makes is never confirmed and goes first.
            memtaps = self._memtaps.values()
            strangers = (memtap for memtap in memtaps if not memtap.confirmed)
            self._drop(next(strangers, next(iter(memtaps))))
        ours = wire.new_session()
        sealer = wire.Sealer(ours, wire.session_key(self._spec.key, "answer", session, ours))
        opener = wire.Opener(ours, wire.session_key(self._spec.key, "request", session, ours))
        memtap = _Memtap(session, identity, address, sealer, opener)
        self._memtaps[session] = memtap
        self._openers[ours] = memtap
        return memtap

    def _confirm(self, memtap: _Memtap) -> None:
        """It is no replay; if it has greeted before, that is over."""
        memtap.confirmed = True
        self._confirmed += 1
        for other in list(self._memtaps.values()):
            if other is not memtap and other.identity == memtap.identity:
                self._drop(other)

    def _drop(self, memtap: _Memtap) -> None:
        self._confirmed -= memtap.confirmed
        del self._memtaps[memtap.greeting]
        del self._openers[memtap.opener.session]
        self._pacer.forget(memtap.opener.session)

    def _receivers(self) -> list[_Memtap]:
        return [memtap for memtap in self._memtaps.values() if memtap.confirmed]

    # Requests

    def _request(self, memtap: _Memtap, request: wire.Request) -> None:
        self.counters.requests += 1
        now = time.monotonic()
        self._pacer.report(memtap.opener.session, request.received, request.expected, now)
        repair = request.priority & wire.REPAIR
        self.counters.repair_requests += repair != 0
        alone = self._group is None or self._confirmed == 1
        target = memtap if alone or repair else None
        for run in request.runs:
            source = self._sources.get(run.file)
            if source is None or not run.pages or run.page + run.pages > source.pages:
                self.counters.malformed += 1
            elif request.priority & wire.FAULT:
                self.counters.fault_requests += 1
                self._send(target, run, now - _LOCKSTEP)
            elif alone:
                self._enqueue(_Item(target, run, now))
            else:
                # What is queued for everyone is queued for this memtap too, even for a repair.
                queued = self._queued[run.file][run.page : run.page + run.pages]
                for part in _runs_where(run, ~queued):
                    if target is None:
                        self._queued[run.file][part.page : part.page + part.pages] = True
                    self._enqueue(_Item(target, part, now - _LOCKSTEP))

    def _enqueue(self, item: _Item) -> None:
        if self._queued_pages + item.run.pages > _MAX_QUEUED_PAGES:
            return  # will be asked for again
        self._queued_pages += item.run.pages
        if self._queue:
            last = self._queue[-1]
            run = last.run
            adjacent = run.page + run.pages == item.run.page and run.file == item.run.file
            if adjacent and last.memtap is item.memtap:
                last.run = wire.Run(run.file, run.page, run.pages + item.run.pages)
                return
        self._queue.append(item)

    def work(self) -> float | None:
        """Send some background pages; say when to go on, for :meth:`Loop.run`."""
        now = time.monotonic()
        if not self._queue:
            self._pacer.idle(now)
            return None
        delay = self._pacer.delay(now)
        if delay:
            return delay
        item = self._queue[0]
        run = wire.Run(item.run.file, item.run.page, min(item.run.pages, self._geometry.batch))
        if run == item.run:
            self._queue.popleft()
        else:
            rest = item.run.pages - run.pages
            item.run = wire.Run(run.file, run.page + run.pages, rest)
        self._queued_pages -= run.pages
        if item.memtap is None:
            self._queued[run.file][run.page : run.page + run.pages] = False
        self._send(item.memtap, run, item.since)
        return 0

    def _send(self, memtap: _Memtap | None, run: wire.Run, since: float) -> None:
        """Send pages to one memtap; or to all, unless they went to all since then."""
        if memtap is None:
            due = self._sent[run.file][run.page : run.page + run.pages] < since
            for part in _runs_where(run, due):
                self._send_run(part, None)
                run = wire.Run(run.file, run.page, run.pages - part.pages)
            self.counters.pages_lockstep += run.pages
        else:
            self._send_run(run, memtap)

    def _send_run(self, run: wire.Run, memtap: _Memtap | None) -> None:
        step = self._geometry.batch
        for start in range(0, run.pages, step):
            part = wire.Run(run.file, run.page + start, min(step, run.pages - start))
            self._send_batch(part, memtap)

    def _send_batch(self, run: wire.Run, memtap: _Memtap | None) -> None:
        if self.lost:
            return
        sealer = memtap.sealer if memtap else self._everyone
        address = memtap.address if memtap else self._group
        assert address is not None
        try:
            datagrams, zeros = self._batch.seal(self._sources[run.file], run, sealer)
        except exception.SourceLost as error:
            LOG.error("Image %s can no longer be served: %s", self._spec.image, error)
            self.lost = str(error)
            return
        if datagrams:
            self._socket.send_segments(datagrams, self._geometry.datagram, address)
        size = len(datagrams)
        for start in range(0, len(zeros), wire.MAX_RUNS):
            payload = wire.encode_runs(zeros[start : start + wire.MAX_RUNS])
            notice = sealer.seal(wire.ZERO, payload)
            self._socket.send(notice, address)
            size += len(notice)
        now = time.monotonic()
        self._pacer.sent(size, now)
        zero_pages = sum(zero.pages for zero in zeros)
        counters = self.counters
        counters.pages_zero += zero_pages
        if memtap:
            counters.pages_unicast += run.pages - zero_pages
            counters.bytes_unicast += size
        else:
            self._sent[run.file][run.page : run.page + run.pages] = now
            counters.pages_multicast += run.pages - zero_pages
            counters.bytes_multicast += size


def _runs_where(run: wire.Run, chosen: npt.NDArray[np.bool_]) -> list[wire.Run]:
    """The parts of a run of which ``chosen``, a flag a page, is true."""
    if chosen.all():
        return [run]
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
    return [
        wire.Run(run.file, run.page + int(start), int(end - start))
        for start, end in edges.reshape(-1, 2)
    ]


def _open_source(entry: dict[str, Any], fds: list[int]) -> image_source.ImageSource:
    if entry["kind"] == "process":
        ranges = [(int(address), int(length)) for address, length in entry["ranges"]]
        if len(fds) < 2:
            raise exception.ControlError("a process needs two descriptors")
        return image_source.ProcessMemory(fds.pop(0), fds.pop(0), ranges)
    if entry["kind"] == "file" and fds:
        return image_source.SparseFile(fds.pop(0))
    raise exception.ControlError(f"file {entry['number']} has no source")


def main() -> int:
    """Entry point of the memory server; :mod:`nova_snowflock.memtap.process` starts it."""
    return daemon.run(process_spec.ServerSpec, _set_up)


def _set_up(spec: process_spec.ServerSpec, loop: event_loop.Loop) -> daemon.Process:
    server = MemoryServer(spec, loop)
    return daemon.Process(server.commands(), server.work)


if __name__ == "__main__":
    raise SystemExit(main())
