# SPDX-License-Identifier: Apache-2.0
"""How fast a clone works, against its parent."""

from collections.abc import Iterator
import time
import uuid

from bench import figure
from bench import guests
from tests import engine
from tests.guest import client as guest_client
from tests.guest import domain

PASSES = 10
_PARENT = "parent"
_CLONE = "clone"
_FILL_TIMEOUT = 120.0
_JOB = (
    f"a job that copies 64 MiB {PASSES} times and sums up the copy, by the guest's clock, guest of "
    f"{guests.MEMORY_MIB} MiB with 1 vCPU (TCG) on another host than its parent, the other idle"
)


@figure.benchmark("engine.overhead.populated")
def populated() -> Iterator[figure.Figure]:
    """In a clone that has all its pages."""
    ratios: list[float] = []
    baseline: list[float] = []
    with (
        guests.engines(2) as (home, other),
        guests.booted(home.host, _PARENT) as parent,
    ):
        _job(parent)
        identity = str(uuid.uuid4())
        with guests.released(home, [other], identity):
            other.spawn(home.fork(_PARENT, identity), _CLONE, population="eager")
            try:
                _wait_until_filled(other, identity)
                with domain.client(other.host, _CLONE) as clone:
                    _job(clone)
                    for _ in range(2 * figure.RUNS):
                        before, cloned, after = _job(parent), _job(clone), _job(parent)
                        ratios.append(2 * cloned / (before + after))
                        baseline.append(after / before)
            finally:
                domain.destroy(other.host, _CLONE)
    yield figure.Figure(
        "engine.overhead.populated",
        "ratio",
        ratios,
        f"{_JOB}; clone has fetched all of its memory and done the job once; each time between two "
        "of the parent's; baseline: those two against each other",
        baseline,
    )


@figure.benchmark("engine.overhead.cold")
def cold() -> Iterator[figure.Figure]:
    """In a clone that has just started."""
    ratios: list[float] = []
    baseline: list[float] = []
    with (
        guests.engines(2) as (home, other),
        guests.booted(home.host, _PARENT) as parent,
    ):
        _job(parent)
        for _ in range(figure.RUNS):
            identity = str(uuid.uuid4())
            with guests.released(home, [other], identity):
                before = _job(parent)
                other.spawn(home.fork(_PARENT, identity), _CLONE)
                try:
                    with domain.client(other.host, _CLONE) as clone:
                        cloned = _job(clone)
                finally:
                    domain.destroy(other.host, _CLONE)
                after = _job(parent)
            ratios.append(2 * cloned / (before + after))
            baseline.append(after / before)
    yield figure.Figure(
        "engine.overhead.cold",
        "ratio",
        ratios,
        f"{_JOB}; clone does it as soon as it runs, population 'background', MTU 1500; parent "
        "before and after; baseline: these two against each other",
        baseline,
    )


def _job(guest: guest_client.GuestClient) -> float:
    """Seconds, by the guest's clock."""
    return float(guest.call("job", passes=PASSES)["seconds"])


def _wait_until_filled(home: engine.Engine, image: str) -> None:
    deadline = time.monotonic() + _FILL_TIMEOUT
    while home.memtap(image)["pages"]["missing"]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"pages are still missing after {_FILL_TIMEOUT:.0f} s")
        time.sleep(0.1)
