# SPDX-License-Identifier: Apache-2.0
"""Programs that fork the guest that they run in: what they wait for."""

from collections.abc import Iterator
from concurrent import futures
import contextlib
import os
import statistics
import time
from typing import Any

from bench import cloud
from bench import figure
from demo import job
from nova_snowflock.virt import marks
from tests.cloud import agents
from tests.cloud import family

CLONES = 6
PASSES = 6
PATIENCE = 300.0
# Enough to tell each clone when it is to exit.
_LEAD = 10.0
# Seldom: looking takes a part of the machine from what is measured.
_LOOK_AGAIN = 1.0

FORK = f"""
import os
import time
ticket = guest.request_ticket({CLONES})
print(ticket.n)
print(time.monotonic())
if guest.clone(ticket):
    print(time.monotonic())
    while not os.path.exists("/run/exit"):
        time.sleep(0.1)
    with open("/run/exit") as file:
        time.sleep(max(0, float(file.read()) - time.monotonic()))
    guest.exit(0, str(time.monotonic()).encode())
joined = guest.join(ticket)
print(time.monotonic())
for clone in joined:
    print(clone.error or clone.result.decode())
"""
"""Says when it called clone(), and in the clones when that returned; then when join() returned, and
when each clone called exit(), which is when it was told to."""

MAP = (
    job.COMMON
    + f"""
from nova_snowflock.guest import workers
data = load()
def work(number):
    return sum(share(data, number, {CLONES}) for _ in range({PASSES}))
for clones in (1, {CLONES}):
    started = time.monotonic()
    results = workers.map(work, range(1, {CLONES + 1}), clones)
    print(time.monotonic() - started)
    print(sum(results))
"""
)


@figure.benchmark(f"guest.clone.{CLONES}", f"guest.join.{CLONES}")
def clone_and_join() -> Iterator[figure.Figure]:
    """And what the owner does instead, by Nova's API."""
    clones, joins, forks, deletions = [], [], [], []
    with _parent("tiny") as parent:
        for _ in range(figure.RUNS):
            cloned, joined = _program(parent)
            clones.append(cloned)
            joins.append(joined)
            forked, deleted = _api(parent)
            forks.append(forked)
            deletions.append(deleted)
    conditions = (
        f"{CLONES} clones of a 256 MiB guest (TCG) without networks, three hosts; by the clock of "
        "the hosts, to some ms"
    )
    yield figure.Figure(
        f"guest.clone.{CLONES}",
        "s",
        clones,
        f"{conditions}; clone() called until it has returned in the last clone; baseline: fork by "
        "the API of the same server, until all are ACTIVE",
        forks,
    )
    yield figure.Figure(
        f"guest.join.{CLONES}",
        "s",
        joins,
        f"{conditions}; all exit at one time; the last exit() called until join() has returned; "
        "baseline: as many deleted by the API, until they are gone",
        deletions,
    )


@figure.benchmark(f"guest.map.speedup.{CLONES}")
def speedup() -> Iterator[figure.Figure]:
    """One clone's seconds for one of many."""
    ratios, ones, manys = [], [], []
    with _parent("small") as parent:
        for _ in range(figure.RUNS):
            one, result, many, same = agents.Program(parent, MAP).ended(PATIENCE)
            if result != same:
                raise RuntimeError(f"one clone found {result}, and {CLONES} found {same}")
            ones.append(float(one))
            manys.append(float(many))
            ratios.append(ones[-1] / manys[-1])
            _wait_until_alone(parent)
    processors = os.cpu_count() or 1
    yield figure.Figure(
        f"guest.map.speedup.{CLONES}",
        "ratio",
        ratios,
        f"workers.map over {CLONES} clones against over one, {PASSES} times the sum of 100 MB of "
        f"numbers in a 512 MiB guest (TCG): {statistics.median(manys):.2f} against "
        f"{statistics.median(ones):.2f} s, cloning and joining included; every guest also counts "
        "each 10 ms, which takes some 10 % of a processor each; the hosts are one machine "
        f"with {processors} processors, so that more than {processors} cannot be had; baseline: "
        "that",
        [float(processors)],
    )


@contextlib.contextmanager
def _parent(flavor: str) -> Iterator[str]:
    """A server whose programs may have clones; none of them outlives it."""
    allowed = {marks.GUEST_FORK_MAX: str(CLONES)}
    with cloud.up(), family.server("bench", flavor, metadata=allowed) as parent:
        agents.start(parent)
        try:
            yield parent
        finally:
            family.delete(*family.clones_known(parent))


def _wait_until_alone(parent: str) -> None:
    family.wait_until(lambda: not family.clones_known(parent), PATIENCE)


def _program(parent: str) -> tuple[float, float]:
    """Seconds that a program waits for clone(), and for join()."""
    program = agents.Program(parent, FORK)
    clones = _clones(program)
    with futures.ThreadPoolExecutor(CLONES + 1) as pool:
        ahead = dict(zip((parent, *clones), pool.map(_ahead, (parent, *clones)), strict=True))
        called = float(program.said()[1]) + ahead[parent]
        returned = max(float(program.said(clone)[2]) + ahead[clone] for clone in clones)
        moment = time.monotonic() + _LEAD
        list(pool.map(lambda clone: _exit_at(clone, moment - ahead[clone]), clones))
    if time.monotonic() > moment:
        raise RuntimeError(f"the clones were not told within {_LEAD} s when to exit")
    _, _, joined, *exits = program.ended(PATIENCE)
    exited = max(float(exit) + ahead[clone] for clone, exit in zip(clones, exits, strict=True))
    _wait_until_alone(parent)
    return returned - called, float(joined) + ahead[parent] - exited


def _clones(program: agents.Program) -> list[str]:
    """Of a program that forks, by their numbers, when it goes on in all of them."""
    deadline = time.monotonic() + PATIENCE
    known: list[Any] = []
    while True:
        servers = family.compute().servers(details=True)
        known = [one for one in servers if one.metadata.get(marks.PARENT) == program.server]
        if len(known) == CLONES and all(server.status == "ACTIVE" for server in known):
            known.sort(key=lambda server: int(server.metadata[marks.CLONE_ID]))
            clones = [str(server.id) for server in known]
            if all(len(program.said(clone)) > 2 for clone in clones):
                return clones
        if time.monotonic() > deadline:
            raise RuntimeError(f"{len(known)} clones are not as they should be: {program.said()}")
        time.sleep(_LOOK_AGAIN)


def _ahead(server: str) -> float:
    """How much the host's time.monotonic() is ahead of a guest's.

    Nobody sets this clock of a guest, and a clone's goes on from its parent's.
    """
    found: list[tuple[float, float]] = []
    with family.talk(server) as guest:
        for _ in range(5):
            asked = time.monotonic()
            told = guest.call("tick")["monotonic_ns"] / 1e9
            answered = time.monotonic()
            found.append((answered - asked, (asked + answered) / 2 - told))
    return min(found)[1]  # the quickest answer is the best


def _exit_at(clone: str, moment: float) -> None:
    with family.talk(clone) as guest:
        agents.shell(guest, f"echo {moment} >/run/exit.new; mv /run/exit.new /run/exit")


def _api(parent: str) -> tuple[float, float]:
    """Seconds of as many clones of the owner's: until they are ACTIVE, and until deleted."""
    started = time.time()
    with family.forked(parent, wait=False, count=CLONES) as made:
        clones = family.clones_of(made)
        active = cloud.when_active(clones) - started
        started = time.time()
        family.delete(*clones)
        return active, time.time() - started
