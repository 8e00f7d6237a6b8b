# SPDX-License-Identifier: Apache-2.0
"""What clones' metadata says of their forks."""

import pytest

from nova_snowflock.virt import marks

FORK = "ffffffff-0000-4000-8000-000000000001"
PARENT = "11111111-1111-4111-8111-111111111111"


def test_clones_do_not_inherit_their_parents() -> None:
    metadata = {
        **marks.of(FORK, PARENT, {"a": "b"}),
        marks.CLONE_ID: "1",
        marks.GUEST_FORK_MAX: "5",
        "own": "x",
        "a:snowflock:b": "y",
    }
    assert marks.inherited(metadata) == {"own": "x", "a:snowflock:b": "y"}


def test_params_are_found_again() -> None:
    params = {"a": "b", "snowflock:param:c": "d", marks.REQUEST: "r", " .-_:": ""}
    metadata = marks.of(FORK, PARENT, params)
    assert metadata[marks.FORK] == FORK
    assert metadata[marks.PARENT] == PARENT
    assert marks.params({**metadata, "own": "x", "param:e": "f"}) == params


def test_params_are_no_other_marks() -> None:
    metadata = marks.of(FORK, PARENT, {"fork": "x", marks.FORK: "y", marks.GUEST_FORK_MAX: "9"})
    assert metadata[marks.FORK] == FORK
    assert marks.fork_max(metadata) == 0


def test_hooks_are_not_told_of_requests() -> None:
    params = {"a": "b", marks.REQUEST: "r"}
    assert marks.for_hooks(params) == {"a": "b"}
    assert params[marks.REQUEST] == "r"


@pytest.mark.parametrize(
    ("value", "most"),
    [
        ("0", 0),
        ("1", 1),
        ("007", 7),
        ("9" * 255, 10**255 - 1),
        ("", 0),
        ("-1", 0),
        ("+1", 0),
        (" 1", 0),
        ("1\n", 0),
        ("1_000", 0),
        ("1.0", 0),
        ("1e3", 0),
        ("many", 0),
        ("٣", 0),
        ("²", 0),
    ],
)
def test_how_many_clones(value: str, most: int) -> None:
    assert marks.fork_max({marks.GUEST_FORK_MAX: value}) == most


def test_how_many_clones_if_nobody_says() -> None:
    assert marks.fork_max({}) == 0
