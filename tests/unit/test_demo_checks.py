# SPDX-License-Identifier: Apache-2.0
"""The demo's checks can fail."""

import pytest

from demo import checks

PARENT = [(tick, tick * 1000) for tick in range(1, 21)]
# Forked at tick 10: as the parent up to it, then by a clock of its own.
CLONE = [(tick, tick * 1000 + (7 if tick > 10 else 0)) for tick in range(5, 15)]


def test_fork() -> None:
    assert checks.count_is_unbroken("parent", PARENT) == 1e-6
    assert checks.clone_continues("clone", CLONE, PARENT) == 10
    assert checks.one_instant({"clone1": 10, "clone2": 10}, 8, 12) == 10
    checks.digests_are({"clone1": "a"}, {"clone1": "a", "clone2": "b"})
    checks.all_differ(["a", "b"])


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        ([*PARENT[:5], *PARENT[6:]], "from tick 5 to 7"),
        ([*PARENT[:5], PARENT[4], *PARENT[5:]], "from tick 5 to 5"),
        ([*PARENT[:5], (6, 4000), *PARENT[6:]], "went backwards at tick 6"),
    ],
)
def test_broken_count(history: checks.History, reason: str) -> None:
    with pytest.raises(checks.CheckFailed, match=reason):
        checks.count_is_unbroken("parent", history)


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        (CLONE[6:], "no tick in common"),
        (CLONE[:6], "has not counted on"),
        ([*CLONE[:2], (7, 7003), *CLONE[3:]], "tick 7 of clone is not its parent's"),
        ([*CLONE[:3], *CLONE[4:]], "from tick 7 to 9"),
    ],
)
def test_clone_that_does_not_continue(history: checks.History, reason: str) -> None:
    with pytest.raises(checks.CheckFailed, match=reason):
        checks.clone_continues("clone", history, PARENT)


def test_other_failures() -> None:
    with pytest.raises(checks.CheckFailed, match="different ticks"):
        checks.one_instant({"clone1": 10, "clone2": 11}, 8, 12)
    with pytest.raises(checks.CheckFailed, match="between 11 and 12"):
        checks.one_instant({"clone1": 10}, 11, 12)
    with pytest.raises(checks.CheckFailed, match="data of clone1"):
        checks.digests_are({"clone1": "a"}, {"clone1": "b"})
    with pytest.raises(checks.CheckFailed, match="hold the same"):
        checks.all_differ(["a", "b", "a"])
