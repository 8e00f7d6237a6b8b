# SPDX-License-Identifier: Apache-2.0
"""The memory server: one process that serves one fork image to the memtaps of its clone hosts."""

import base64
import dataclasses
import logging
import os
import time
from typing import Any

from nova_snowflock import descriptor
from nova_snowflock import endpoint
from nova_snowflock import exception
from nova_snowflock.memtap import control
from nova_snowflock.memtap import daemon
from nova_snowflock.memtap import loop as event_loop
from nova_snowflock.memtap import spec as process_spec
from nova_snowflock.memtap import udp
from nova_snowflock.memtap import wire
from nova_snowflock.memtap.server import distributor
from nova_snowflock.memtap.server import registry
from nova_snowflock.memtap.server import source as image_source

LOG = logging.getLogger(__name__)

_DATAGRAMS_PER_TURN = 64
_SWEEP_EVERY = 10.0
_SPIN = 500e-6
"""Seconds that are spent on waiting for the next fault without sleeping, while they come about that
fast: to be woken up takes longer than to answer."""


@dataclasses.dataclass
class Counters:
    """What has come in, in datagrams."""

    requests: int = 0
    fault_requests: int = 0
    repair_requests: int = 0
    malformed: int = 0
    unserved: int = 0


class MemoryServer:
    """Answers requests for pages of the image's files."""

    def __init__(self, spec: process_spec.ServerSpec, loop: event_loop.Loop) -> None:
        """Take the address.

        :raises OSError: it is not to be had
        :raises ValueError: an address of the spec is not one
        """
        self._spec = spec
        self._loop = loop
        self._counters = Counters()
        self._lost: str | None = None
        self._serving = False
        self._next_sweep = 0.0
        self._faulted = self._spin_end = 0.0
        self._buffer = memoryview(bytearray(udp.RECEIVE_SIZE))
        self._sources: dict[int, image_source.ImageSource] = {}
        self._multicast = spec.group is not None
        session = wire.new_session()
        self._everyone = wire.Sealer(session, wire.session_key(spec.key, "multicast", session))
        self._socket = udp.UdpSocket(
            endpoint.parse(spec.address), spec.interface, spec.multicast_ttl
        )
        self._distributor = distributor.Distributor(
            self._socket,
            spec.mtu,
            spec.rate_limit,
            self._sources,
            self._everyone,
            endpoint.parse(spec.group) if spec.group else None,
        )
        self._registry = registry.Registry(spec.key, self._distributor.forget)
        loop.add(self._socket.fileno(), self._receive)

    # Control commands

    def commands(self) -> dict[str, control.Command]:
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
        ``ranges`` [[address, bytes], ...] and two descriptors (/proc/PID/mem, /proc/PID/pagemap)
        and perhaps ``below``, the page map (base64) of the file that they are a mapping of,
        kind "file" one descriptor and perhaps a ``patch`` {"offset", "data" (base64)}.

        :raises ControlError: the files are published already, or the descriptors do not fit
        :raises SourceLost: a process has ended
        """
        if self._sources:
            raise exception.ControlError("the files of this image are published already")
        sources: dict[int, image_source.ImageSource] = {}
        files = []
        try:
            for entry in arguments["files"]:
                source = sources[int(entry["number"])] = _open_source(entry, fds)
                files.append(
                    {
                        "number": entry["number"],
                        "name": entry["name"],
                        "size": source.size,
                        "content": source.page_map.count(),
                        "page_map": base64.b64encode(source.page_map.encode()).decode(),
                    }
                )
        except BaseException as error:
            for source in sources.values():
                source.close()
            if isinstance(error, (KeyError, TypeError)):
                raise exception.ControlError(f"a file is not described right: {error!r}") from error
            raise
        for number, source in sources.items():
            self._add(number, source)
        return {
            "files": files,
            "servers": [endpoint.format(self._socket.address)],
            "group": self._spec.group,
        }

    def serve(self, arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Serve the ``descriptor`` (base64) as file 0, and answer requests from now on."""
        if not self._sources or self._serving:
            raise exception.ControlError("an image is served once, after its files are published")
        self._add(
            descriptor.DESCRIPTOR_FILE, image_source.Blob(base64.b64decode(arguments["descriptor"]))
        )
        self._serving = True
        return {}

    def status(self, arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """State, memtaps and counters; docs/control.rst says what each is."""
        rejected, replayed = self._registry.refused()
        return {
            "image": self._spec.image,
            "pid": os.getpid(),
            "state": "lost" if self._lost else "serving" if self._serving else "prepared",
            "reason": self._lost,
            "servers": [endpoint.format(self._socket.address)],
            "memtaps": [endpoint.format(memtap.address) for memtap in self._registry.receivers()],
            "rate": self._distributor.pacer.rate,
            "queued_pages": self._distributor.queued_pages,
            "rejected": rejected,
            "replayed": replayed,
            "send_errors": self._socket.errors,
            **dataclasses.asdict(self._counters),
            **dataclasses.asdict(self._distributor.counters),
        }

    def stop(self, arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """End the process."""
        self._loop.stop()
        return {}

    def _add(self, number: int, source: image_source.ImageSource) -> None:
        self._sources[number] = source
        self._distributor.add(number)

    # Datagrams

    def _receive(self) -> None:
        now = time.monotonic()
        for _ in range(_DATAGRAMS_PER_TURN):
            received = self._socket.receive_into(self._buffer)
            if received is None:
                return
            size, segment, address = received
            if not size:
                self._counters.malformed += 1
            for start in range(0, size, segment):
                self._handle(self._buffer[start : min(start + segment, size)], address, now)

    def _handle(self, datagram: memoryview, address: endpoint.Address, now: float) -> None:
        header = wire.parse_header(datagram, 0, len(datagram))
        if header is None:
            self._counters.malformed += 1
            return
        kind, session, _ = header
        try:
            if not self._serving or self._lost:
                self._counters.unserved += 1
            elif kind == wire.HELLO:
                self._welcome(self._registry.greet(session, datagram, address, now))
            elif kind in (wire.REQUEST, wire.BYE):
                opened = self._registry.open(session, datagram, address, now)
                if opened is not None:
                    self._take(*opened, kind, now)
            else:
                self._counters.malformed += 1
        except ValueError as error:
            LOG.debug("Image %s: a datagram is malformed: %s", self._spec.image, error)
            self._counters.malformed += 1

    def _welcome(self, memtap: registry.Memtap | None) -> None:
        if memtap is not None:
            everyone = self._everyone.session if self._multicast else 0
            welcome = memtap.sealer.seal(wire.WELCOME, wire.encode_session(everyone))
            self._socket.send(welcome, memtap.address)

    def _take(self, memtap: registry.Memtap, payload: bytes, kind: int, now: float) -> None:
        if kind == wire.BYE:
            self._registry.drop(memtap)
            return
        received, _, priority, runs = wire.decode_request(payload)
        self._counters.requests += 1
        alone = not self._multicast or self._registry.confirmed == 1
        repair = priority & wire.REPAIR
        if repair:
            self._counters.repair_requests += 1
        if priority & wire.FAULT:
            self._counters.fault_requests += 1
            if now - self._faulted < 2 * _SPIN:
                self._spin_end = now + _SPIN
            self._faulted = now
        target = memtap if alone or repair else None
        for run in runs:
            source = self._sources.get(run.file)
            if source is None or not run.pages or run.page + run.pages > source.pages:
                self._counters.malformed += 1
            elif not priority & wire.FAULT and not repair:
                self._distributor.enqueue(target, run, now)
            else:
                try:
                    if priority & wire.FAULT:
                        self._distributor.send(target, run, now)
                    else:
                        self._distributor.repair(memtap, run, now)
                except exception.SourceLost as error:
                    self._lose(error)
        self._distributor.pacer.report(memtap, received, now)

    # Background work

    def work(self) -> float | None:
        """Background work, for the loop."""
        now = time.monotonic()
        if now >= self._next_sweep:
            self._next_sweep = now + _SWEEP_EVERY
            self._registry.drop_silent(now)
        if self._lost:
            return None
        try:
            delay = self._distributor.work(now)
            if now < self._spin_end:
                # Whoever was just answered may have been woken up on this very processor.
                os.sched_yield()
                return 0.0
            return delay
        except exception.SourceLost as error:
            self._lose(error)
            return None

    def _lose(self, error: exception.SourceLost) -> None:
        LOG.error("Image %s can no longer be served: %s", self._spec.image, error)
        self._lost = str(error)


def _open_source(entry: dict[str, Any], fds: list[int]) -> image_source.ImageSource:
    """The source of a file, which owns the descriptors that it takes out of ``fds``."""
    if entry["kind"] == "process" and len(fds) >= 2:
        ranges = [(int(address), int(length)) for address, length in entry["ranges"]]
        below = base64.b64decode(entry["below"], validate=True) if "below" in entry else None
        return image_source.ProcessMemory(fds.pop(0), fds.pop(0), ranges, below)
    if entry["kind"] == "file" and fds:
        patch = entry.get("patch", {"offset": 0, "data": ""})
        data = base64.b64decode(patch["data"], validate=True)
        return image_source.SparseFile(fds.pop(0), (int(patch["offset"]), data))
    raise exception.ControlError(
        f"file {entry['number']} is of an unknown kind or without its descriptors"
    )


def main() -> int:
    """Entry point of the memory server; :mod:`nova_snowflock.memtap.process` starts it."""
    return daemon.run(process_spec.ServerSpec, _set_up)


def _set_up(spec: process_spec.ServerSpec, loop: event_loop.Loop) -> daemon.Process:
    server = MemoryServer(spec, loop)
    return daemon.Process(server.commands(), server.work)


if __name__ == "__main__":
    raise SystemExit(main())
