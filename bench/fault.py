# SPDX-License-Identifier: Apache-2.0
"""Page faults on memory that is on another host."""

from collections.abc import Iterator
import mmap
import os
import random
import statistics
import time

from bench import figure
from bench import network
from bench import plane
from tests import emulation

MIB = 1 << 20
PAGE = 4096
FAULTS = 2000
SEQUENTIAL = 64 * MIB
_JUMBO = 9000


@figure.benchmark("engine.fault.remote_4k.p50", "engine.fault.remote_4k.p99")
def remote_4k() -> Iterator[figure.Figure]:
    """One page a fault, over a network that carries it in one datagram."""
    yield from _remote_4k(_JUMBO, "")


@figure.benchmark("engine.fault.remote_4k.p50.mtu1500", "engine.fault.remote_4k.p99.mtu1500")
def remote_4k_mtu1500() -> Iterator[figure.Figure]:
    """One page a fault, over a network on which a page takes several datagrams."""
    yield from _remote_4k(1500, ".mtu1500")


def _remote_4k(mtu: int, suffix: str) -> Iterator[figure.Figure]:
    size = 64 * MIB
    pages = list(range(size // PAGE))
    random.Random(1).shuffle(pages)
    faults: list[list[float]] = []
    trips: list[list[float]] = []
    with (
        emulation.hosts(2, mtu=mtu) as (server, client),
        plane.served(server, size, mtu, None) as image,
        plane.presented(image, [client], "lazy", read_around=PAGE),
    ):
        for run in range(figure.RUNS):
            chosen = pages[run * FAULTS : (run + 1) * FAULTS]
            trips.append(network.round_trips(server, client, FAULTS))
            faults.append(client.run(_touch, image, chosen))
        plane.verify(image, server, [client])
    conditions = (
        f"MTU {mtu}, 2 hosts, {FAULTS} random cold pages a run, touched by one thread through a "
        "private mapping, one page a fault; baseline: a UDP round trip of 60 bytes and 4 KiB back "
        "between the same hosts, plain Python sockets"
    )
    for percentile in (50, 99):
        yield figure.Figure(
            f"engine.fault.remote_4k.p{percentile}{suffix}",
            "us",
            [_percentile(times, percentile) * 1e6 for times in faults],
            conditions,
            [_percentile(times, percentile) * 1e6 for times in trips],
        )


@figure.benchmark("engine.fault.sequential")
def sequential() -> Iterator[figure.Figure]:
    """Every page in turn, with read-around."""
    rates = []
    baseline = []
    with (
        emulation.hosts(2, mtu=_JUMBO) as (server, client),
        plane.served(server, figure.RUNS * SEQUENTIAL, _JUMBO, None) as image,
        plane.presented(image, [client], "lazy"),
    ):
        for run in range(figure.RUNS):
            baseline.append(SEQUENTIAL / 1e6 / network.bulk(server, [client], SEQUENTIAL))
            seconds = client.run(_scan, image, run * SEQUENTIAL, SEQUENTIAL)
            rates.append(SEQUENTIAL / 1e6 / seconds)
        plane.verify(image, server, [client])
    yield figure.Figure(
        "engine.fault.sequential",
        "MB/s",
        rates,
        f"MTU {_JUMBO}, 2 hosts, {SEQUENTIAL // MIB} MiB cold a run, a byte of every page touched "
        "in turn by one thread through a private mapping, read-around 64 KiB; baseline: one TCP "
        "stream between the same hosts, not encrypted",
        baseline,
    )


def _percentile(times: list[float], percentile: int) -> float:
    return statistics.quantiles(times, n=100)[percentile - 1]


# On a host


def _map(image: plane.Image) -> mmap.mmap:
    # As QEMU does it: opened for writing, mapped privately.
    fd = os.open(os.path.join(image.directory, "mount/memory"), os.O_RDWR)
    try:
        return mmap.mmap(fd, 0, mmap.MAP_PRIVATE)
    finally:
        os.close(fd)


def _touch(image: plane.Image, pages: list[int]) -> list[float]:
    """Seconds of one fault on each of these pages."""
    times = []
    with _map(image) as memory:
        memory.madvise(mmap.MADV_RANDOM)
        for page in pages:
            offset = page * PAGE
            started = time.perf_counter()
            memory[offset]
            times.append(time.perf_counter() - started)
    return times


def _scan(image: plane.Image, start: int, size: int) -> float:
    """Seconds it takes to touch every page from ``start`` on."""
    with _map(image) as memory:
        started = time.perf_counter()
        memory[start : start + size : PAGE]
        return time.perf_counter() - started
