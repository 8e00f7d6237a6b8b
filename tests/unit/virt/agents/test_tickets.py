# SPDX-License-Identifier: Apache-2.0
"""Tickets outlive the service, and stay in their directory."""

import os
import pathlib
import time
import uuid

from hypothesis import given
from hypothesis import strategies
import pytest

from nova_snowflock.virt.agents import tickets as agents_tickets

SERVER = "11111111-1111-4111-8111-111111111111"
FORK = "ffffffff-0000-4000-8000-000000000001"


def ticket(**more: object) -> agents_tickets.Ticket:
    given = {"id": str(uuid.uuid4()), "server": SERVER, "n": 2, "granted_to": "r", **more}
    return agents_tickets.Ticket(**given)  # type: ignore[arg-type]


@pytest.fixture
def known(tmp_path: pathlib.Path) -> agents_tickets.Tickets:
    return agents_tickets.Tickets(str(tmp_path / "tickets"))


def files(tmp_path: pathlib.Path) -> list[str]:
    return sorted(os.listdir(tmp_path / "tickets"))


def test_ticket_is_found_again(known: agents_tickets.Tickets, tmp_path: pathlib.Path) -> None:
    kept = ticket(
        state=agents_tickets.JOINED,
        used_by=["\ud800\0\n"],
        fork=FORK,
        first=3,
        clones={"3": "a", "4": "b"},
        exits={"3": 0},
        joined_by="j",
        joined_at=1.5,
        outcome=[{"clone_id": 3, "status": 0, "error": None}],
    )
    known.put(kept)
    later = agents_tickets.Tickets(str(tmp_path / "tickets"))
    assert later.get(kept.id) == kept
    assert list(later) == [kept]


def test_change_replaces_what_was_known(
    known: agents_tickets.Tickets, tmp_path: pathlib.Path
) -> None:
    kept = ticket()
    known.put(kept)
    kept.state = agents_tickets.CLONED
    known.put(kept)
    assert known.get(kept.id).state == "cloned"
    assert files(tmp_path) == [f"{kept.id}.json"]


def test_of_a_server(known: agents_tickets.Tickets) -> None:
    kept, joined, other = ticket(), ticket(state=agents_tickets.JOINED), ticket(server=FORK)
    for one in (kept, joined, other):
        known.put(one)
    assert known.of(SERVER) == [kept]
    assert known.of(FORK) == [other]


@pytest.mark.parametrize(
    ("fork", "clone_id", "is_it"),
    [(FORK, 2, False), (FORK, 3, True), (FORK, 4, True), (FORK, 5, False), (SERVER, 3, False)],
)
def test_find(known: agents_tickets.Tickets, fork: str, clone_id: int, is_it: bool) -> None:
    kept = ticket(fork=FORK, first=3)
    for one in (ticket(), ticket(fork=FORK, first=5), kept):
        known.put(one)
    assert list(kept.clone_ids) == [3, 4]
    found = known.find(fork, clone_id)
    assert (found is not None and found.id == kept.id) == is_it


@pytest.mark.parametrize(
    "identity",
    [
        "",
        "..",
        "../tickets",
        "../../etc/passwd",
        "/etc/passwd",
        "x" * 36,
        "\0" * 36,
        "\ud800",
        "x" * (1 << 16),
        FORK.upper(),
        f"{{{FORK}}}",
        f"urn:uuid:{FORK}",
        FORK.replace("-", ""),
        f"{FORK}\n",
        f"{FORK}.json",
    ],
)
def test_names_stay_in_the_directory(
    known: agents_tickets.Tickets, tmp_path: pathlib.Path, identity: str
) -> None:
    (tmp_path / "passwd").write_text("{}")
    with pytest.raises(agents_tickets.NoTicket) as caught:
        known.get(identity)
    assert len(str(caught.value)) < 300
    for function in (
        known.remove,
        known.put,
        lambda one: known.write_result(one, 1, 0, b"x"),
        lambda one: known.read_result(one, 1, 0, 1),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            function(ticket(id=identity))
    assert files(tmp_path) == []
    assert sorted(os.listdir(tmp_path)) == ["passwd", "tickets"]


@given(strategies.text())
def test_no_such_ticket(tmp_path_factory: pytest.TempPathFactory, identity: str) -> None:
    known = agents_tickets.Tickets(str(tmp_path_factory.getbasetemp() / "none"))
    with pytest.raises(agents_tickets.NoTicket):
        known.get(identity)


@pytest.mark.parametrize("text", ["", "{", "[]x"])
def test_files_that_are_none(
    known: agents_tickets.Tickets, tmp_path: pathlib.Path, text: str
) -> None:
    kept = ticket()
    known.put(kept)
    (tmp_path / "tickets" / f"{FORK}.json").write_text(text)
    (tmp_path / "tickets" / "junk.json").write_text(text)
    assert list(known) == [kept]


def test_drafts_are_removed(known: agents_tickets.Tickets, tmp_path: pathlib.Path) -> None:
    (tmp_path / "tickets" / f"{FORK}.json.new").write_text("{")
    agents_tickets.Tickets(str(tmp_path / "tickets"))
    assert files(tmp_path) == []


def test_result(known: agents_tickets.Tickets) -> None:
    kept = ticket()
    assert known.read_result(kept, 1, 0, 10) == b""
    for offset, data in ((0, b"abc"), (3, b"def"), (3, b"DEF"), (6, b"")):
        known.write_result(kept, 1, offset, data)
    assert known.read_result(kept, 1, 0, 100) == b"abcDEF"
    assert known.read_result(kept, 1, 4, 1) == b"E"
    assert known.read_result(kept, 1, 6, 1) == b""
    assert known.read_result(kept, 2, 0, 100) == b""
    # It ends with what was said last.
    known.write_result(kept, 1, 1, b"x")
    assert known.read_result(kept, 1, 0, 100) == b"ax"
    known.write_result(kept, 1, 0, b"")
    assert known.read_result(kept, 1, 0, 100) == b""


def test_result_with_a_gap(known: agents_tickets.Tickets) -> None:
    kept = ticket()
    known.write_result(kept, 1, 0, b"abc")
    with pytest.raises(ValueError, match="3 bytes"):
        known.write_result(kept, 1, 4, b"x")
    assert known.read_result(kept, 1, 0, 100) == b"abc"


def test_removed_with_its_results(known: agents_tickets.Tickets, tmp_path: pathlib.Path) -> None:
    kept, other = ticket(), ticket()
    for one in (kept, other):
        known.put(one)
        for clone_id in (1, 12):
            known.write_result(one, clone_id, 0, b"x")
    known.remove(kept)
    known.remove(kept)
    assert files(tmp_path) == sorted(
        [f"{other.id}.json", f"{other.id}.result.1", f"{other.id}.result.12"]
    )


def test_removal_that_is_cut_short(
    known: agents_tickets.Tickets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left can be removed again."""
    kept = ticket()
    known.put(kept)
    known.write_result(kept, 1, 0, b"x")

    def fail(path: str) -> None:
        raise PermissionError(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail)
        with pytest.raises(PermissionError):
            known.remove(kept)
    assert known.get(kept.id) == kept


def test_sweep(known: agents_tickets.Tickets) -> None:
    now = time.time()
    kept = [ticket(), ticket(joined_at=now), ticket(state=agents_tickets.CLONED)]
    old = ticket(joined_at=now - 1000)
    for one in (*kept, old):
        known.put(one)
    known.sweep(500)
    assert sorted(one.id for one in known) == sorted(one.id for one in kept)


def test_nobody_else_reads_them(known: agents_tickets.Tickets, tmp_path: pathlib.Path) -> None:
    kept = ticket()
    known.put(kept)
    known.write_result(kept, 1, 0, b"x")
    assert (tmp_path / "tickets").stat().st_mode & 0o777 == 0o700
    for name in files(tmp_path):
        assert (tmp_path / "tickets" / name).stat().st_mode & 0o777 == 0o600
