# SPDX-License-Identifier: Apache-2.0
"""memtap: one process that presents one fork image to all its clones on a host."""

import dataclasses
import errno
import logging
import os
import signal
import stat
import sys
import time
from typing import Any

from nova_snowflock import descriptor
from nova_snowflock import endpoint
from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import control
from nova_snowflock.memtap import daemon
from nova_snowflock.memtap import loop as event_loop
from nova_snowflock.memtap import pagemap
from nova_snowflock.memtap import spec as process_spec
from nova_snowflock.memtap.client import fetcher as page_fetcher
from nova_snowflock.memtap.client import fuse
from nova_snowflock.memtap.client import histogram
from nova_snowflock.memtap.client import store as page_store

LOG = logging.getLogger(__name__)

DESCRIPTOR = "descriptor"
"""Name of file 0 in the mount."""

_LOOK_AGAIN = 0.5


@dataclasses.dataclass(slots=True, eq=False)
class _Waiting:
    """A read that waits for pages.

    :param size: bytes that the file has of what was asked for
    :param missing: how many pages it still waits for
    """

    read: fuse.Read
    file: page_store.StoredFile
    size: int
    missing: int
    started: float
    answered: bool = False

    @property
    def is_page(self) -> bool:
        """Whether it is for one page and nothing else; a direct read may begin anywhere."""
        return self.size == PAGE_SIZE and not self.read.offset % PAGE_SIZE


class Memtap:
    """Answers the kernel's reads from the page store, and fills the store from the network."""

    fetcher_class = page_fetcher.Fetcher

    def __init__(
        self, spec: process_spec.MemtapSpec, loop: event_loop.Loop, connection: int
    ) -> None:
        """Serve the mount, and start fetching.

        :param connection: what :func:`fuse.mount` returned
        :raises InvalidDescriptor: the spec's descriptor is not one
        :raises OSError: the store or a socket is refused
        """
        self.faults = 0
        self.latency = histogram.Histogram()
        self._spec = spec
        self._loop = loop
        # Reads whose threads got a signal, by their unique numbers.
        self._signalled: dict[int, _Waiting] = {}
        # Reads by the page they wait for: key is the file's number and the page.
        self._waiting: dict[tuple[int, int], list[_Waiting]] = {}
        self._refused: set[tuple[int, int]] = set()
        self._answer = memoryview(bytearray(fuse.MAX_READ))
        image = descriptor.Descriptor.decode(spec.descriptor)
        self._store = page_store.PageStore(_store_files(spec, image))
        group = endpoint.parse(image.group) if image.group else None
        servers = [endpoint.parse(server) for server in image.servers]
        self._fetcher = self.fetcher_class(
            spec, servers, group, self._store, loop, self._pages_present, self._page_arrived
        )
        self._connection = fuse.Connection(
            connection,
            [
                fuse.File(file.number, file.name, file.size, _permissions(file.number))
                for file in self._store.files.values()
            ],
            spec.owner,
            spec.read_around,
            self._read,
            self._interrupted,
            self._seek,
        )
        loop.add(self._connection.fd, self._serve_kernel)

    # Reads

    def _serve_kernel(self) -> None:
        self._connection.receive()
        if self._connection.unmounted:
            LOG.info("Image %s was unmounted", self._spec.image)
            self._loop.stop()

    def _read(self, read: fuse.Read) -> None:
        file = self._store.files[read.file]
        size = max(0, min(read.size, file.size - read.offset))
        page = read.offset // PAGE_SIZE
        count = (read.offset + size - 1) // PAGE_SIZE - page + 1
        if size == 0 or file.is_present(page, count):
            self._reply(read, file, size)
        elif read.writable and size > self._spec.read_around and self._is_first(read):
            self._connection.refuse(read.unique, errno.EAGAIN)
        else:
            self._wait(_Waiting(read, file, size, 0, time.monotonic()), page, count)

    def _is_first(self, read: fuse.Read) -> bool:
        """Whether this is no repetition of a refused read.

        QEMU calls for huge pages in its memory, and there the kernel reads 4 MiB ahead of a fault
        whatever it was told (mm/filemap.c, do_sync_mmap_readahead). Refused, it reads the page of
        the fault alone, and memtap fetches what is around it. A kernel that has made one folio of
        it all asks for it again, and would take a second refusal for an error.
        """
        place = read.file, read.offset
        if place in self._refused:
            self._refused.remove(place)
            return False
        self._refused.add(place)
        return True

    def _wait(self, waiting: _Waiting, page: int, count: int) -> None:
        self.faults += 1
        file = waiting.file
        for wanted in range(page, page + count):
            if file.state[wanted] < page_store.ZERO:
                waiting.missing += 1
                self._waiting.setdefault((file.number, wanted), []).append(waiting)
        self._fetcher.want(file, page, count)

    def _reply(self, read: fuse.Read, file: page_store.StoredFile, size: int) -> None:
        data = self._answer[:size]
        try:
            file.read_into(data, read.offset)
        except OSError as error:
            LOG.error("Image %s: the page store cannot be read: %s", self._spec.image, error)
            self._connection.refuse(read.unique, errno.EIO)
        else:
            self._connection.answer(read.unique, data)

    def _page_arrived(self, file: page_store.StoredFile, page: int, data: list[memoryview]) -> None:
        """Answer who waits for just this page before it is written to the store."""
        for waiting in self._waiting.get((file.number, page), ()):
            if waiting.is_page and not waiting.answered:
                self._connection.answer(waiting.read.unique, *data)
                self.latency.add(time.monotonic() - waiting.started)
                waiting.answered = True

    def _pages_present(self, file: page_store.StoredFile, page: int, count: int) -> None:
        if not self._waiting:
            return
        for number in range(page, page + count):
            for waiting in self._waiting.pop((file.number, number), ()):
                waiting.missing -= 1
                if not waiting.missing and not waiting.answered:
                    self._reply(waiting.read, file, waiting.size)
                    self.latency.add(time.monotonic() - waiting.started)

    def _seek(self, number: int, offset: int, hole: bool) -> int | None:
        file = self._store.files[number]
        if offset >= file.size:
            return None
        page = offset // PAGE_SIZE
        found = file.find_zero(page) if hole else file.find_content(page)
        if found == file.pages:
            return file.size if hole else None
        return max(offset, found * PAGE_SIZE)

    def _interrupted(self, unique: int) -> None:
        for reads in self._waiting.values():
            for waiting in reads:
                if waiting.read.unique == unique:
                    self._signalled[unique] = waiting
        self._release_killed()

    def _release_killed(self) -> None:
        """Let threads that were killed go; those with another signal wait on.

        The kernel tells of a thread's first signal only, and no kill gets a thread out of a read
        that memtap has taken. So those that got one are looked at until their pages are here.
        """
        for unique, waiting in list(self._signalled.items()):
            if not waiting.missing:
                del self._signalled[unique]
            elif _is_killed(waiting.read.thread):
                del self._signalled[unique]
                for reads in self._waiting.values():
                    if waiting in reads:
                        reads.remove(waiting)
                self._connection.refuse(unique, errno.EINTR)

    def work(self) -> float | None:
        """Background work, for the loop."""
        delay = self._fetcher.work()
        if not self._signalled:
            return delay
        self._release_killed()
        return _LOOK_AGAIN if delay is None else min(delay, _LOOK_AGAIN)

    # Control

    def commands(self) -> dict[str, control.Command]:
        """What the control socket offers, by name."""
        return {"status": self.status, "detach": self.detach, "stop": self.stop}

    def status(self, arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """State, pages and counters; docs/control.rst says what each is."""
        number = descriptor.DESCRIPTOR_FILE
        image_files = [file for file in self._store.files.values() if file.number != number]
        return {
            "image": self._spec.image,
            "pid": os.getpid(),
            "state": "store-full" if self._store.error else self._fetcher.state,
            "reason": self._store.error,
            "population": self._fetcher.population,
            "pages": page_store.total(image_files),
            "files": {
                file.name: {"size": file.size, **page_store.total([file])} for file in image_files
            },
            "faults": self.faults,
            "waiting": len({id(read) for reads in self._waiting.values() for read in reads}),
            "fault_latency": self.latency.as_dict(),
            **self._fetcher.status(),
        }

    def detach(self, arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """Fetch whatever is missing; the server is let go after the last page."""
        self._fetcher.detach(arguments.get("population", "background"))
        return {"state": self._fetcher.state, "missing": self._store.missing}

    def stop(self, arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        """End the process. Clones that still run lose what they have not touched."""
        self._loop.stop()
        return {}

    def close(self) -> None:
        """Let go of the server, the kernel and the store."""
        self._fetcher.close()
        self._connection.close()
        self._store.close()


def _permissions(number: int) -> int:
    if number >= descriptor.FIRST_LAYER:
        return stat.S_IRUSR | stat.S_IRGRP
    # QEMU opens its memory for writing even if it maps it privately. With the set-user-ID bit,
    # which nothing else comes of here, the kernel asks for leave to clear it before write(2)
    # touches a page that the clones share, and is refused.
    return stat.S_ISUID | stat.S_IRUSR | stat.S_IWUSR


def _store_files(
    spec: process_spec.MemtapSpec, image: descriptor.Descriptor
) -> dict[int, page_store.StoredFile]:
    """Every file of the image, with its zero pages known; the descriptor is there already."""
    number = descriptor.DESCRIPTOR_FILE
    first = page_store.StoredFile(number, DESCRIPTOR, len(spec.descriptor), spec.store_directory)
    first.write(0, [memoryview(spec.descriptor)])
    first.set_present(0, first.pages, page_store.RESIDENT)
    files = {number: first}
    for entry in image.files:
        file = page_store.StoredFile(entry.number, entry.name, entry.size, spec.store_directory)
        file.apply(pagemap.PageMap.decode(entry.page_map, entry.pages))
        files[entry.number] = file
    return files


def _is_killed(thread: int) -> bool:
    """Whether SIGKILL is pending for a thread (proc_pid_status(5), SigPnd)."""
    try:
        with open(f"/proc/{thread}/status", encoding="ascii", errors="replace") as status:
            pending = next(line for line in status if line.startswith("SigPnd:"))
    except OSError:
        return False  # it waits, so it is there; its /proc is hidden from us
    return bool(int(pending.split()[1], 16) >> (signal.SIGKILL - 1) & 1)


def main(memtap_class: type[Memtap] = Memtap) -> int:
    """Entry point of memtap; :mod:`nova_snowflock.memtap.process` starts it.

    Its argument is the descriptor of its mount, which it has from there.
    """
    connection = int(sys.argv[1])

    def set_up(spec: process_spec.MemtapSpec, loop: event_loop.Loop) -> daemon.Process:
        memtap = memtap_class(spec, loop, connection)
        return daemon.Process(memtap.commands(), memtap.work, memtap.close)

    return daemon.run(process_spec.MemtapSpec, set_up)


if __name__ == "__main__":
    raise SystemExit(main())
