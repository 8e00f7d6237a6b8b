# SPDX-License-Identifier: Apache-2.0
"""Guests to measure: booted, forked, cloned."""

from collections.abc import Iterator, Sequence
from concurrent import futures
import contextlib
import time

from tests import emulation
from tests import engine
from tests.guest import client as guest_client
from tests.guest import domain

MEMORY_MIB = 512
_TOUCH_TIMEOUT = 600.0


@contextlib.contextmanager
def engines(count: int) -> Iterator[list[engine.Engine]]:
    """nova-snowflock on ``count`` hosts, with default options."""
    with emulation.hosts(count) as hosts:
        for host in hosts:
            domain.install_kernel(host)
        yield [engine.Engine(host) for host in hosts]


@contextlib.contextmanager
def booted(
    host: emulation.Host, name: str, memory_mib: int = MEMORY_MIB, touched_mib: int = 0
) -> Iterator[guest_client.GuestClient]:
    """A guest that has booted, with ``touched_mib`` of its memory in use beside 64 MiB of data."""
    domain.boot(host, name, memory_mib)
    try:
        with domain.client(host, name) as guest:
            guest.call("tick")
            if touched_mib:
                free = guest.call("memory")["MemAvailable"] // 1024 - 64
                guest.call("touch", mib=min(touched_mib, free), timeout=_TOUCH_TIMEOUT)
            yield guest
    finally:
        domain.destroy(host, name)


@contextlib.contextmanager
def released(home: engine.Engine, others: Sequence[engine.Engine], image: str) -> Iterator[None]:
    """Nothing of the image is left on any host afterwards."""
    try:
        yield
    finally:
        for one in (*others, home):
            one.release(image)


@contextlib.contextmanager
def spawned(
    homes: Sequence[engine.Engine], image: engine.Image, count: int
) -> Iterator[list[tuple[float, float]]]:
    """``count`` clones, spread evenly, started at once.

    For each the time (:func:`time.monotonic`) at which libvirt said that it runs, and at which the
    guest answered.
    """

    def spawn(number: int) -> tuple[float, float]:
        home, name = homes[(number - 1) % len(homes)], clone_name(number)
        home.spawn(image, name, number)
        running = time.monotonic()
        with domain.client(home.host, name) as guest:
            guest.call("tick")
        return running, time.monotonic()

    numbers = range(1, count + 1)
    with futures.ThreadPoolExecutor(count) as pool:
        spawns = [pool.submit(spawn, number) for number in numbers]
    try:
        yield [done.result() for done in spawns]
    finally:
        for number, done in zip(numbers, spawns, strict=True):
            if not done.exception():
                domain.destroy(homes[(number - 1) % len(homes)].host, clone_name(number))


def clone_name(number: int) -> str:
    """Of the clone that :func:`spawned` has made as the ``number``th, from 1."""
    return f"clone{number:02}"
