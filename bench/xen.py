# SPDX-License-Identifier: Apache-2.0
"""Forks on Xen, on a machine that QEMU emulates: ratios alone tell of real ones."""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import statistics
import time
import uuid

from bench import figure
from devstack.xen import machine
from nova_snowflock import descriptor
from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import spec
from tests import emulation
from tests import engine
from tests.xen import dom0
from tests.xen import guest

_RUNS = 3
"""Each takes minutes."""
_PARENT = "parent"
_CLONE = "clone"
_MEMORY_MIB = 128
_READS = 200
_SAVED = "/var/lib/libvirt/saved"
_CONDITIONS = (
    f"EMULATED Xen 4.17 under QEMU's TCG: ratios only; PVH guest of {_MEMORY_MIB} MiB with 1 vCPU "
    "and 16 MiB of data, parent, memory server, memtap and clone on one machine, whose dom0 has "
    "one emulated processor"
)


@dataclasses.dataclass(frozen=True)
class _Run:
    """Seconds of one fork, and of one save and restore of the same guest.

    :param answered: from the call of fork to the clone's first answer
    :param faults: that the clone waited for in the pager, or None where Xen does not page
    :param fault: each, on average
    :param saved: how long the guest was stopped that was saved and restored
    """

    pause: float
    stages: dict[str, float]
    answered: float
    faults: int | None
    fault: float | None
    saved: float
    saved_answered: float


@figure.benchmark("xen.running.eager")
def eager() -> Iterator[figure.Figure]:
    """Where Xen does not page, as distributions build it."""
    runs = _measured(paging=False)
    yield _running("xen.running.eager", runs, "all of its memory is there before it runs")


@figure.benchmark("xen.pause", "xen.running.lazy", "xen.faults", "xen.fault")
def lazy() -> Iterator[figure.Figure]:
    """Where Xen pages."""
    reads: list[float] = []
    runs = _measured(paging=True, reads=reads)
    stages = {name: statistics.median(run.stages[name] for run in runs) for name in runs[0].stages}
    split = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in stages.items())
    yield figure.Figure(
        "xen.pause",
        "s",
        [run.pause for run in runs],
        f"{_CONDITIONS}; medians of its stages: {split}; baseline: for how long virsh save and "
        "virsh restore stop it",
        [run.saved for run in runs],
    )
    yield _running("xen.running.lazy", runs, "its memory comes as it is touched, by Xen's paging")
    faults = [(run.faults, run.fault) for run in runs if run.faults and run.fault]
    yield figure.Figure(
        "xen.faults",
        "faults",
        [count for count, _ in faults],
        f"{_CONDITIONS}; that the clone waited for, until all of its memory was there, which comes "
        "in the background, too; baseline: pages that it has",
        [_MEMORY_MIB * (1 << 20) / PAGE_SIZE] * len(faults),
    )
    yield figure.Figure(
        "xen.fault",
        "ms",
        [seconds * 1e3 for _, seconds in faults],
        f"{_CONDITIONS}; mean of a clone's, in the pager, from Xen's request to the answer; "
        f"baseline: mean of {_READS} cold pages read from memtap's file by dom0, without a clone",
        reads,
    )


def _running(name: str, runs: list[_Run], how: str) -> figure.Figure:
    return figure.Figure(
        name,
        "s",
        [run.answered for run in runs],
        f"{_CONDITIONS}; from the call of fork until the clone's workload answers; {how}; "
        "baseline: virsh save, virsh restore, until it answers",
        [run.saved_answered for run in runs],
    )


def _measured(*, paging: bool, reads: list[float] | None = None) -> list[_Run]:
    """Runs on a machine of their own.

    :param reads: gets milliseconds of a cold page's reading, one a run
    """
    with _machine(paging) as host:
        xen = engine.Engine(host, **guest.OPTIONS)
        runs = []
        for _ in range(_RUNS):
            runs.append(_run(host=host, xen=xen))
            if reads is not None:
                reads.append(_read(host=host, xen=xen))
        return runs


@contextlib.contextmanager
def _machine(paging: bool) -> Iterator[emulation.Host]:
    xen = machine.Machine()
    xen.down()
    xen.up(paging=paging)
    try:
        dom0.keep_multicast(xen)
        with dom0.attached(xen) as host:
            yield host
    finally:
        xen.down()


def _run(*, host: emulation.Host, xen: engine.Engine) -> _Run:
    image = str(uuid.uuid4())
    host.run(guest.create, _PARENT, memory_mib=_MEMORY_MIB)
    try:
        started = time.monotonic()
        forked = xen.fork(_PARENT, image)
        xen.spawn(forked, _CLONE)
        host.run(guest.ask, _CLONE, "tick")
        answered = time.monotonic() - started
        paged = host.run(_paged, image)
        host.run(guest.destroy, _CLONE)
        xen.release(image)
        saved, saved_answered = host.run(_save_and_restore)
    finally:
        host.run(guest.destroy, _PARENT, _CLONE)
        xen.release(image)
    faults, fault = paged or (None, None)
    return _Run(forked.pause, dict(forked.stages), answered, faults, fault, saved, saved_answered)


def _read(*, host: emulation.Host, xen: engine.Engine) -> float:
    image = str(uuid.uuid4())
    host.run(guest.create, _PARENT, memory_mib=_MEMORY_MIB)
    try:
        forked = xen.fork(_PARENT, image)
        return host.run(_read_cold, xen.options, forked)
    finally:
        host.run(guest.destroy, _PARENT)
        xen.release(image)


# In dom0


def _paged(image: str) -> tuple[int, float] | None:
    """How many faults a clone had, once its memory is there, and seconds of each on average."""
    logs = list(pathlib.Path(engine.RUN_PATH, image).glob("pager-*"))
    if not logs:
        return None
    [log] = logs
    deadline = time.monotonic() + 600
    while True:
        for line in log.read_text().splitlines():
            said = json.loads(line)
            if said["event"] == "populated":
                return said["faults"], said["fault_seconds"]
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.5)


def _save_and_restore() -> tuple[float, float]:
    """Seconds for which the guest was stopped, and until it has answered again."""
    connection = guest.connection()
    started = time.monotonic()
    connection.lookupByName(_PARENT).save(_SAVED)
    connection.restore(_SAVED)
    running = time.monotonic()
    guest.ask(_PARENT, "tick")
    answered = time.monotonic()
    os.unlink(_SAVED)
    return running - started, answered - started


def _read_cold(options: engine.Options, image: engine.Image) -> float:
    """Milliseconds that a page takes which nobody has read, on average."""
    known = descriptor.Descriptor.decode(image.descriptor)
    back_end = engine.back_end(options)
    back_end.present(known, image.key, population="lazy")
    try:
        file = known.file(descriptor.MEMORY_FILE)
        path = f"{spec.mount_path(f'{engine.RUN_PATH}/{image.uuid}')}/{file.name}"
        pages = random.Random(1).sample(range(file.size // PAGE_SIZE), _READS)
        fd = os.open(path, os.O_RDONLY)
        try:
            started = time.monotonic()
            for page in pages:
                os.pread(fd, PAGE_SIZE, page * PAGE_SIZE)
            return (time.monotonic() - started) / _READS * 1e3
        finally:
            os.close(fd)
    finally:
        back_end.leave(image.uuid)
