# SPDX-License-Identifier: Apache-2.0
"""What a fork image and its clones cost in bytes."""

from collections.abc import Iterator
import re
import statistics
import time
import uuid

from bench import figure
from bench import guests
from tests import engine

CLONES = 8
IDLE = 5.0
"""Seconds for which clones do nothing but count before they are looked at."""
_PARENT = "parent"


@figure.benchmark("engine.descriptor", "engine.unique_memory.idle", "engine.unique_memory.qemu")
def memory() -> Iterator[figure.Figure]:
    sizes: list[float] = []
    descriptors: list[float] = []
    # A clone's or the parent's: KiB of guest memory, and of everything else in its QEMU.
    clones: list[tuple[float, float]] = []
    parents: list[tuple[float, float]] = []
    with (
        guests.engines(2) as (home, other),
        guests.booted(home.host, _PARENT),
    ):
        for _ in range(figure.RUNS):
            parents.append(home.host.run(_private, [_PARENT]))
            identity = str(uuid.uuid4())
            with guests.released(home, [other], identity):
                image = home.fork(_PARENT, identity)
                descriptors.append(len(image.descriptor))
                sizes.append(parents[-1][0] * 1024)
                with guests.spawned([other], image, CLONES):
                    time.sleep(IDLE)
                    names = [guests.clone_name(number) for number in range(1, CLONES + 1)]
                    clones.append(other.host.run(_private, names))
    guest = f"guest of {guests.MEMORY_MIB} MiB with 1 vCPU (TCG)"
    yield figure.Figure(
        "engine.descriptor",
        "bytes",
        descriptors,
        f"{guest}, encoded; baseline: the guest memory that is in use",
        sizes,
    )
    for index, (name, what) in enumerate(
        (("idle", "guest memory"), ("qemu", "anonymous memory of QEMU beside the guest's"))
    ):
        yield figure.Figure(
            f"engine.unique_memory.{name}",
            "KiB",
            [mean[index] for mean in clones],
            f"{what} that a clone shares with nobody (smaps, Anonymous), mean of {CLONES} clones "
            f"on one host {IDLE:.0f} s after they have started, {guest} that counts 100 times a "
            "second; baseline: its parent's",
            [mean[index] for mean in parents],
        )


# On a host


def _private(names: list[str]) -> tuple[float, float]:
    """KiB, in the mean of these domains: of guest memory, and of the rest of QEMU."""
    both = [_anonymous(engine.qemu_pid(name)) for name in names]
    return statistics.mean(guest for guest, _ in both), statistics.mean(rest for _, rest in both)


def _anonymous(pid: int) -> tuple[int, int]:
    guest = rest = 0
    is_guest = False
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as smaps:
        for line in smaps:
            if place := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                size = int(place[2], 16) - int(place[1], 16)
                is_guest = size == guests.MEMORY_MIB << 20
            elif line.startswith("Anonymous:"):
                kib = int(line.split()[1])
                guest += kib if is_guest else 0
                rest += 0 if is_guest else kib
    return guest, rest
