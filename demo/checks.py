# SPDX-License-Identifier: Apache-2.0
"""What must be true of a fork, seen from inside the guests.

A history is what a guest tells of its count: [tick, CLOCK_MONOTONIC in ns], oldest first. The
nanoseconds make every tick unlike any other guest's, so the last one that a parent and its clone
have in common is the instant of the fork.
"""

from collections.abc import Iterable, Mapping, Sequence
import itertools
from typing import TypeAlias

History: TypeAlias = Sequence[tuple[int, int]]


class CheckFailed(Exception):
    """The reason is the message."""


def check(condition: bool, reason: str) -> None:
    if not condition:
        raise CheckFailed(reason)


def count_is_unbroken(guest: str, history: History) -> float:
    """No tick is missing or out of order. Returns the longest time between two, in seconds."""
    for (tick, moment), (next_tick, next_moment) in itertools.pairwise(history):
        check(next_tick == tick + 1, f"{guest} went from tick {tick} to {next_tick}")
        check(next_moment > moment, f"the time of {guest} went backwards at tick {next_tick}")
    return max(later[1] - earlier[1] for earlier, later in itertools.pairwise(history)) / 1e9


def clone_continues(name: str, history: History, parent: History) -> int:
    """It counted as its parent up to an instant, and on its own from then on: that tick."""
    count_is_unbroken(name, history)
    moments = dict(parent)
    shared = [tick for tick, moment in history if moments.get(tick) == moment]
    check(bool(shared), f"{name} has no tick in common with its parent")
    for tick, moment in history:
        if parent[0][0] <= tick <= shared[-1]:
            check(moments[tick] == moment, f"tick {tick} of {name} is not its parent's")
    check(history[-1][0] > shared[-1], f"{name} has not counted on after tick {shared[-1]}")
    return shared[-1]


def one_instant(instants: Mapping[str, int], before: int, after: int) -> int:
    """All clones began at one tick of their parent, which it reached during the fork."""
    found = set(instants.values())
    check(len(found) == 1, f"the clones began at different ticks: {dict(instants)}")
    (instant,) = found
    check(
        before <= instant <= after,
        f"the clones began at tick {instant}, but the fork was between {before} and {after}",
    )
    return instant


def digests_are(wanted: Mapping[str, str], found: Mapping[str, str]) -> None:
    """Every guest's data is what it must be."""
    for name, digest in wanted.items():
        check(
            found[name] == digest,
            f"the data of {name} has the digest {found[name][:16]}, not {digest[:16]}",
        )


def all_differ(digests: Iterable[str]) -> None:
    """No two guests hold the same data."""
    digests = list(digests)
    check(len(set(digests)) == len(digests), "guests that wrote different data hold the same")
