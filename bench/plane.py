# SPDX-License-Identifier: Apache-2.0
"""A data plane without virtual machines: a real memory server and real memtaps on emulated hosts.

What the memory server serves is memory of its host's agent process, read just as that of a frozen
QEMU. Most of these functions run on a host, called by :meth:`tests.emulation.Host.run`.
"""

import base64
from collections.abc import Iterator, Sequence
import contextlib
import ctypes
import dataclasses
import functools
import mmap
import os
import shutil
import signal
import time
from typing import Any
import uuid
import zlib

from nova_snowflock import descriptor
from nova_snowflock.memtap import control
from nova_snowflock.memtap import process
from nova_snowflock.memtap import spec
from tests import emulation
from tests.system import lossy

RUN = "/run/bench"
STORE = "/var/lib/nova-snowflock"
GROUP = "239.255.0.1:5710"
_FILL_TIMEOUT = 60.0
_POLL = 0.05


@dataclasses.dataclass(frozen=True)
class Image:
    """What a memtap needs to present the image."""

    uuid: str
    key: bytes
    descriptor: bytes

    @property
    def directory(self) -> str:
        return os.path.join(RUN, self.uuid)


@contextlib.contextmanager
def served(host: emulation.Host, size: int, mtu: int, group: str | None) -> Iterator[Image]:
    """An image of ``size`` bytes of random content, served on ``host``."""
    identity, key = str(uuid.uuid4()), os.urandom(32)
    # It is on the same host as a memtap may be, in a directory of its own.
    directory = os.path.join(RUN, f"{identity}.server")
    try:
        encoded = host.run(_serve, directory, identity, key, host.address, size, mtu, group)
        yield Image(identity, key, encoded)
    finally:
        host.run(_end, process.stop_memory_server, directory)


@contextlib.contextmanager
def presented(
    image: Image, hosts: Sequence[emulation.Host], population: str, **options: Any
) -> Iterator[None]:
    """memtaps of the image on all these hosts, started at the same time."""
    try:
        starts = [
            host.submit(_present, image, host.address, population, **options) for host in hosts
        ]
        for start in starts:
            start.result()
        yield
    finally:
        for host in hosts:
            host.run(_end, process.stop_memtap, image.directory)


@contextlib.contextmanager
def held(host: emulation.Host, image: Image) -> Iterator[None]:
    """The memory server stands still, so that memtaps that start meanwhile all begin afterwards."""
    host.run(_signal, image, signal.SIGSTOP)
    try:
        yield
    finally:
        host.run(_signal, image, signal.SIGCONT)


def fill(server: emulation.Host, image: Image, hosts: Sequence[emulation.Host]) -> float:
    """Let memtaps that are held begin; the seconds until the last has everything."""
    server.run(_signal, image, signal.SIGCONT)
    started = time.monotonic()
    for host in hosts:
        host.run(_wait, image)
    return time.monotonic() - started


def status(host: emulation.Host, image: Image) -> dict[str, Any]:
    """The status of the image's memtap on a host."""
    return host.run(_status, image.directory, "memtap")


def sent(host: emulation.Host, image: Image) -> int:
    """Bytes of datagrams that the memory server on a host has sent."""
    counters = host.run(_status, f"{image.directory}.server", "server")
    return int(counters["bytes_multicast"] + counters["bytes_unicast"])


def verify(image: Image, server: emulation.Host, hosts: Sequence[emulation.Host]) -> None:
    """Compare what hosts present with what is served."""
    expected = server.run(_served_checksum)
    for host in hosts:
        if host.run(_checksum, image) != expected:
            raise ValueError(f"{host.name} presents other content than {server.name} serves")


# On a host


_CHUNK = 1 << 20


@functools.lru_cache(maxsize=1)
def _memory(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for _ in range(0, size, _CHUNK):
        memory.write(os.urandom(_CHUNK))
    _served_checksum.cache_clear()
    return memory


_last_size = 0


def _serve(
    directory: str, image: str, key: bytes, address: str, size: int, mtu: int, group: str | None
) -> bytes:
    global _last_size
    _last_size = size
    base = ctypes.addressof(ctypes.c_char.from_buffer(_memory(size)))
    os.makedirs(RUN, mode=0o711, exist_ok=True)
    server = process.start_memory_server(
        spec.ServerSpec(
            image=image,
            key=key,
            run_directory=directory,
            address=f"{address}:0",
            group=group,
            interface="eth0",
            mtu=mtu,
        )
    )
    entry = {"number": 1, "name": "memory", "kind": "process", "ranges": [[base, size]]}
    with open("/proc/self/mem", "rb") as memory, open("/proc/self/pagemap", "rb") as pagemap:
        published = server.call("publish", (memory.fileno(), pagemap.fileno()), files=[entry])
    page_map = base64.b64decode(published["files"][0]["page_map"])
    encoded = descriptor.Descriptor(
        image=image,
        hypervisor="none",
        hypervisor_version="0",
        machine_type="none",
        cpu="none",
        vcpus=1,
        ram_blocks=(descriptor.RamBlock("memory", size),),
        files=(descriptor.File(1, "memory", size, page_map),),
        servers=tuple(published["servers"]),
        group=published["group"],
        created="2026-01-01T00:00:00+00:00",
        domain="none",
        device_state=b"none",
    ).encode()
    server.call("serve", descriptor=base64.b64encode(encoded).decode())
    return encoded


def _present(
    image: Image, address: str, population: str, loss: float = 0.0, **options: Any
) -> None:
    os.makedirs(RUN, mode=0o711, exist_ok=True)
    memtap = spec.MemtapSpec(
        image=image.uuid,
        key=image.key,
        run_directory=image.directory,
        store_directory=STORE,
        descriptor=image.descriptor,
        address=address,
        interface="eth0",
        population=population,
        **options,
    )
    if loss:
        lossy.start(memtap, loss)
    else:
        process.start_memtap(memtap)


def _end(stop: Any, directory: str) -> None:
    stop(directory)
    shutil.rmtree(directory, ignore_errors=True)


def _client(directory: str, role: str) -> control.ControlClient:
    return control.ControlClient(os.path.join(directory, f"{role}.sock"))


def _status(directory: str, role: str) -> dict[str, Any]:
    return _client(directory, role).status()


def _signal(image: Image, number: int) -> None:
    os.kill(_client(f"{image.directory}.server", "server").peer(), number)


def _wait(image: Image) -> None:
    deadline = time.monotonic() + _FILL_TIMEOUT
    while _status(image.directory, "memtap")["pages"]["missing"]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"pages are still missing after {_FILL_TIMEOUT:.0f} s")
        time.sleep(_POLL)


@functools.lru_cache(maxsize=1)
def _served_checksum() -> int:
    return zlib.crc32(_memory(_last_size))


def _checksum(image: Image) -> int:
    checksum = 0
    with open(os.path.join(image.directory, "mount/memory"), "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            checksum = zlib.crc32(block, checksum)
    return checksum
