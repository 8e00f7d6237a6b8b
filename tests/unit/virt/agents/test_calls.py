# SPDX-License-Identifier: Apache-2.0
"""What programs in guests get, and what they do not; and that nothing is done twice."""

import base64
from collections.abc import Iterator
import contextlib
import os
import pathlib
import threading
from typing import Any
import uuid

import pytest

from nova_snowflock import exception
from nova_snowflock.guest import protocol
from nova_snowflock.virt import marks
from nova_snowflock.virt import rpc
from nova_snowflock.virt.agents import calls as guest_calls
from nova_snowflock.virt.agents import cloud as agents_cloud
from nova_snowflock.virt.agents import tickets as agents_tickets
from tests.unit.virt.agents.world import TIMEOUT
from tests.unit.virt.agents.world import Asked
from tests.unit.virt.agents.world import World

DOWN = exception.HostUnavailable("nobody answers")


@pytest.fixture
def world(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setattr(guest_calls, "_LOOK_AGAIN", 0.001)
    world = World(tmp_path)
    yield world
    for option in ("max_clones", "guest_result_max"):  # set for all that have the group
        world.conf.clear_override(option, group="snowflock")


@pytest.fixture
def parent(world: World) -> str:
    return world.add()


def refused(kind: str, text: str = "") -> Any:
    """The error that a program is told."""

    def is_it(error: guest_calls.CallError) -> bool:
        return error.kind == kind and text in str(error)

    return pytest.RaisesExc(guest_calls.CallError, check=is_it)


def encoded(data: bytes) -> str:
    return base64.b64encode(data).decode()


# Arguments


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ("nonsense", {}),
        ("answer", {}),
        ("_get", {}),
        ("__class__", {}),
        ("request_ticket", {}),
        ("request_ticket", {"n": 0}),
        ("request_ticket", {"n": -1}),
        ("request_ticket", {"n": True}),
        ("request_ticket", {"n": 1.0}),
        ("request_ticket", {"n": float("inf")}),
        ("request_ticket", {"n": float("nan")}),
        ("request_ticket", {"n": 10**4000}),
        ("request_ticket", {"n": "1"}),
        ("request_ticket", {"n": 1, "more": 1}),
        ("clone", {"ticket": "../../../etc/passwd"}),
        ("clone", {"ticket": "x" * 60000}),
        ("clone", {"ticket": None}),
        ("clone", {"ticket": str(uuid.uuid4()) + "\n"}),
        ("clone", {"ticket": str(uuid.uuid4()).upper()}),
        ("clone", {"ticket": str(uuid.uuid4()), "params": {"snowflock:request": "1"}}),
        ("clone", {"ticket": str(uuid.uuid4()), "params": {"a\n": "1"}}),
        ("clone", {"ticket": str(uuid.uuid4()), "params": {"a\0": "1"}}),
        ("clone", {"ticket": str(uuid.uuid4()), "params": {"\ud800": "1"}}),
        ("clone", {"ticket": str(uuid.uuid4()), "params": {"a": 1}}),
        ("clone", {"ticket": str(uuid.uuid4()), "params": {"a": "x" * 256}}),
        ("clone", {"ticket": str(uuid.uuid4()), "params": {str(n): "" for n in range(64)}}),
        ("put", {"offset": 0.0, "data": ""}),
        ("put", {"offset": -1, "data": ""}),
        ("put", {"offset": 0, "data": "A" * 43696}),
        ("put", {"offset": 0, "data": None}),
        ("exit", {"status": 256}),
        ("exit", {"status": -1}),
        ("exit", {"status": 0.0}),
        ("exit", {"status": None}),
        ("join", {"ticket": ["a"]}),
        ("kill", {"ticket": "\ud800"}),
        ("info", {"\0": None}),
    ],
)
def test_what_is_no_call(world: World, parent: str, call: str, arguments: dict[str, Any]) -> None:
    with refused("invalid") as caught:
        world.ask(parent, call, **arguments)
    assert len(str(caught.value)) < 300
    assert list(world.tickets) == []
    assert world.cloud.asked == []


def test_arguments_that_are_nested_deep(world: World, parent: str) -> None:
    nested: Any = []
    for _ in range(500):
        nested = [nested]
    with refused("invalid"):
        world.ask(parent, "request_ticket", n=nested)


# Tickets


def test_ticket(world: World, parent: str) -> None:
    granted = world.ask(parent, "request_ticket", n=3)
    assert granted["n"] == 3
    kept = world.tickets.get(granted["ticket"])
    assert (kept.server, kept.n, kept.state) == (parent, 3, "granted")


@pytest.mark.parametrize("limit", [None, "", "0", "-1", "many", "٣", "1.5"])
def test_owner_has_not_allowed_it(world: World, limit: str | None) -> None:
    asker = world.add(limit)
    with refused("refused", "owner has not allowed it"):
        world.ticket(asker)
    assert world.ask(asker, "info")["limit"] == 0


def test_locked(world: World) -> None:
    with refused("refused", "locked"):
        world.ticket(world.add(locked=True))


def test_locked_meanwhile(world: World, parent: str) -> None:
    ticket = world.ticket(parent)
    world.servers[parent].locked = True
    with refused("refused", "locked"):
        world.ask(parent, "clone", ticket=ticket)
    assert world.cloud.forks() == []


def test_cloud_that_has_no_user_for_it(world: World, parent: str) -> None:
    world.cloud.is_configured = False
    with refused("refused", "This cloud"):
        world.ticket(parent)


def test_no_more_than_is_left(world: World, parent: str) -> None:
    assert world.ask(parent, "request_ticket", n=3)["n"] == 3
    assert world.ask(parent, "request_ticket", n=3)["n"] == 1
    with refused("refused", "may have 4 clones"):
        world.ticket(parent)
    # It is no matter of others.
    assert world.ask(world.add(), "request_ticket", n=9)["n"] == 4


def test_killed_ticket_makes_room(world: World, parent: str) -> None:
    ticket = world.ticket(parent, 4)
    assert world.ask(parent, "kill", ticket=ticket) == {}
    assert world.ask(parent, "request_ticket", n=4)["n"] == 4
    assert world.cloud.deleted == []


@pytest.mark.parametrize(
    ("limits", "n"),
    [
        ({"maxTotalInstances": 10, "totalInstancesUsed": 8}, 2),
        ({"maxTotalCores": 10, "totalCoresUsed": 5}, 2),
        ({"maxTotalRAMSize": 4096, "totalRAMUsed": 2100}, 3),
        ({"maxTotalInstances": -1}, 4),
    ],
)
def test_no_more_than_the_quota(world: World, parent: str, limits: dict[str, int], n: int) -> None:
    world.cloud.room.update(limits)
    assert world.ask(parent, "request_ticket", n=4)["n"] == n


def test_quota_without_room(world: World, parent: str) -> None:
    world.cloud.room["totalInstancesUsed"] = 101
    with refused("refused", "quota"):
        world.ticket(parent)


def test_no_more_than_a_fork_may_make(world: World) -> None:
    world.conf.set_override("max_clones", 2, group="snowflock")
    assert world.ask(world.add("9"), "request_ticket", n=9)["n"] == 2


def test_tickets_are_files_so_there_are_only_so_many(world: World) -> None:
    asker = world.add("9" * 255)
    for _ in range(100):
        world.ticket(asker)
    with refused("refused", "100 tickets"):
        world.ticket(asker)
    assert len(world.ask(asker, "info")["tickets"]) == 100


def test_ticket_is_granted_once(world: World, parent: str) -> None:
    granted = world.ask(parent, "request_ticket", "a", n=2)
    world.restart()
    assert world.ask(parent, "request_ticket", "a", n=2) == granted
    assert len(list(world.tickets)) == 1
    other = world.add()
    assert world.ask(other, "request_ticket", "a", n=2)["ticket"] != granted["ticket"]


@pytest.mark.parametrize("call", ["clone", "join", "kill", "create_clones"])
def test_tickets_of_others(world: World, parent: str, call: str) -> None:
    stranger = world.add()
    ticket, _ = world.cloned(parent)
    more = {}
    if call == "create_clones":
        more["checkpoint"] = world.ask(stranger, "checkpoint_parent")["checkpoint"]
    asked = len(world.cloud.asked)
    with refused("invalid", f"There is no ticket {ticket}"):
        world.ask(stranger, call, ticket=ticket, **more)
    assert len(world.cloud.asked) == asked
    assert world.cloud.deleted == []
    assert world.tickets.get(ticket).state == "cloned"


# Clones


def test_clone(world: World, parent: str) -> None:
    ticket = world.ticket(parent, 2)
    assert world.ask(parent, "clone", "r", ticket=ticket, params={"a": "b"}) == {"clone_id": 0}
    [options] = world.cloud.forks()
    assert options == {"count": 2, "params": {"a": "b", marks.REQUEST: "r"}, "keep": 300}
    kept = world.tickets.get(ticket)
    assert (kept.state, kept.used_by, list(kept.clones)) == ("cloned", ["r"], ["1", "2"])
    assert set(kept.clones.values()) < set(world.servers)


def test_ticket_is_used_once(world: World, parent: str) -> None:
    ticket, _ = world.cloned(parent)
    with refused("invalid", "has been used"):
        world.ask(parent, "clone", ticket=ticket)
    assert len(world.cloud.forks()) == 1


def test_ticket_in_use(world: World, parent: str) -> None:
    """Two programs at a time: one of them gets the clones."""
    ticket = world.ticket(parent)
    begun, go_on = threading.Event(), threading.Event()

    def before() -> None:
        begun.set()
        assert go_on.wait(TIMEOUT)

    world.cloud.before = before
    first = Asked(world.ask, parent, "clone", ticket=ticket)
    assert begun.wait(TIMEOUT)
    for call in ("clone", "kill"):
        with refused("busy"):
            world.ask(parent, call, ticket=ticket)
    with refused("invalid", "has no clones"):
        world.ask(parent, "join", ticket=ticket)
    go_on.set()
    assert first.result() == {"clone_id": 0}
    assert len(world.cloud.forks()) == 1
    assert world.tickets.get(ticket).state == "cloned"


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (agents_cloud.Refusal(403, "quota"), "refused"),
        (agents_cloud.Refusal(400, "bad"), "refused"),
        (agents_cloud.Refusal(409, "conflict"), "failed"),
    ],
)
def test_ticket_may_be_used_again(world: World, parent: str, error: Exception, kind: str) -> None:
    ticket = world.ticket(parent)
    world.cloud.refusal = error
    with refused(kind):
        world.ask(parent, "clone", ticket=ticket)
    kept = world.tickets.get(ticket)
    assert (kept.state, kept.used_by) == ("granted", [])
    world.cloud.refusal = None
    assert world.ask(parent, "clone", ticket=ticket) == {"clone_id": 0}


def test_answer_that_got_lost(world: World, parent: str) -> None:
    """There is one fork, whether it was made for who asked first or for who asked again."""
    ticket = world.ticket(parent)
    world.cloud.refusal = DOWN
    for request in ("first", "second"):
        with refused("failed"):
            world.ask(parent, "clone", request=request, ticket=ticket)
    assert world.tickets.get(ticket).state == "cloning"
    world.cloud.refusal = None
    made = world.cloud.fork(parent, count=1, params={marks.REQUEST: "first"})
    assert world.ask(parent, "clone", request="third", ticket=ticket) == {"clone_id": 0}
    assert list(world.cloud.clones) == [made["id"]]
    assert world.tickets.get(ticket).fork == made["id"]
    with refused("invalid", "has been used"):
        world.ask(parent, "clone", request="fourth", ticket=ticket)


def test_hosts_are_not_named(world: World, parent: str) -> None:
    ticket = world.ticket(parent)
    world.cloud.refusal = exception.HostUnavailable("The host secret does not answer")
    with pytest.raises(guest_calls.CallError) as caught:
        world.ask(parent, "clone", ticket=ticket)
    assert "secret" not in str(caught.value)


def stop_short(world: World, ticket: str) -> None:
    """Have the service have ended before it heard of the clones that were made."""
    kept = world.tickets.get(ticket)
    kept.state, kept.used_by, kept.clones = "cloning", ["r"], {}
    if kept.first == 1:
        kept.fork = None
    world.tickets.put(kept)
    world.restart()


def test_restart_meanwhile(world: World, parent: str) -> None:
    ticket = world.ticket(parent, 2)
    world.ask(parent, "clone", "r", ticket=ticket)
    before = world.tickets.get(ticket)
    stop_short(world, ticket)
    assert world.ask(parent, "clone", "r", ticket=ticket) == {"clone_id": 0}
    assert len(world.cloud.forks()) == 1
    assert world.tickets.get(ticket) == before
    # And once more, when it is done.
    assert world.ask(parent, "clone", "r", ticket=ticket) == {"clone_id": 0}
    assert len(world.cloud.forks()) == 1


def test_restart_before_anything_was_made(world: World, parent: str) -> None:
    ticket = world.ticket(parent)
    stop_short(world, ticket)
    unconfirmed = world.record(parent, params={marks.REQUEST: "r"})
    unconfirmed.confirmed = False
    world.forks.put(unconfirmed)
    assert world.ask(parent, "clone", "r", ticket=ticket) == {"clone_id": 0}
    assert len(world.cloud.forks()) == 1
    assert world.tickets.get(ticket).fork != unconfirmed.id


def test_forks_for_requests_of_others(world: World, parent: str) -> None:
    """Who knows a request's ID cannot have its fork taken for another's."""
    stranger = world.add()
    world.ask(stranger, "clone", "r", ticket=world.ticket(stranger))
    strange = world.ask(stranger, "checkpoint_parent", "s")["checkpoint"]
    ticket = world.ticket(parent)
    world.ask(parent, "clone", "r", ticket=ticket)
    assert world.forks.get(str(world.tickets.get(ticket).fork)).parent == parent
    assert world.ask(parent, "checkpoint_parent", "s")["checkpoint"] != strange


def test_server_is_deleted_meanwhile(world: World, parent: str) -> None:
    ticket = world.ticket(parent)

    def deleted() -> None:
        world.calls.forget(parent)
        raise agents_cloud.Refusal(404, "gone")

    world.cloud.before = deleted
    with refused("failed"):
        world.ask(parent, "clone", ticket=ticket)
    assert list(world.tickets) == []


def test_forgotten_with_a_server(world: World, parent: str) -> None:
    ticket, [clone] = world.cloned(parent)
    world.ask(clone, "put", offset=0, data=encoded(b"result"))
    other = world.ticket(world.add())
    world.calls.forget(parent)
    assert [kept.id for kept in world.tickets] == [other]
    assert os.listdir(world.directory / "snowflock" / "tickets") == [f"{other}.json"]
    with refused("invalid"):
        world.ask(clone, "exit", status=0)
    with refused("invalid"):
        world.ask(parent, "join", ticket=ticket)


# Results


def test_round_trip(world: World, parent: str) -> None:
    ticket, clones = world.cloned(parent, 2)
    joined = Asked(world.ask, parent, "join", ticket=ticket)
    large = os.urandom(protocol.MAX_PIECE * 2 + 5)
    for offset in range(0, len(large), protocol.MAX_PIECE):
        piece = encoded(large[offset : offset + protocol.MAX_PIECE])
        assert world.ask(clones[0], "put", offset=offset, data=piece) == {}
    assert world.ask(clones[0], "exit", status=7) == {}
    assert world.stopped == [clones[0]]
    assert joined.waits
    assert world.ask(clones[1], "exit", status=0) == {}
    assert joined.result() == {
        "clones": [
            {"clone_id": 1, "status": 7, "error": None, "size": len(large)},
            {"clone_id": 2, "status": 0, "error": None, "size": 0},
        ]
    }
    assert world.results() == {1: large}
    assert len(world.pieces) == 3
    assert sorted(world.cloud.deleted) == sorted(clones)
    assert world.ask(parent, "info")["tickets"] == []


def test_result_that_is_sent_again(world: World, parent: str) -> None:
    ticket, [clone] = world.cloned(parent)
    for offset, data in ((0, b"abcd"), (4, b"ef"), (4, b"EF"), (0, b"xy"), (2, b"z")):
        world.ask(clone, "put", offset=offset, data=encoded(data))
    world.ask(clone, "exit", status=0)
    world.ask(parent, "join", ticket=ticket)
    assert world.results() == {1: b"xyz"}


def test_result_with_a_gap(world: World, parent: str) -> None:
    _, [clone] = world.cloned(parent)
    with refused("invalid", "missing"):
        world.ask(clone, "put", offset=1, data=encoded(b"a"))
    world.ask(clone, "put", offset=0, data=encoded(b"a"))


def test_result_that_is_too_long(world: World, parent: str) -> None:
    world.conf.set_override("guest_result_max", 10, group="snowflock")
    ticket, [clone] = world.cloned(parent)
    world.ask(clone, "put", offset=0, data=encoded(b"0123456789"))
    for offset, data in ((0, b"0123456789a"), (10, b"a"), (1 << 31, b"")):
        with refused("refused", "10 bytes"):
            world.ask(clone, "put", offset=offset, data=encoded(data))
    world.ask(clone, "exit", status=0)
    world.ask(parent, "join", ticket=ticket)
    assert world.results() == {1: b"0123456789"}


@pytest.mark.parametrize("data", ["A", "====", "AB\n==", "\ud800", "é", "A*=="])
def test_result_that_is_not_in_base64(world: World, parent: str, data: str) -> None:
    _, [clone] = world.cloned(parent)
    with refused("invalid"):
        world.ask(clone, "put", offset=0, data=data)


@pytest.mark.parametrize(("call", "more"), [("put", {"offset": 0, "data": ""}), ("exit", {})])
def test_what_is_only_for_clones(
    world: World, parent: str, call: str, more: dict[str, Any]
) -> None:
    arguments = more or {"status": 0}
    with refused("invalid", "not a clone"):
        world.ask(parent, call, **arguments)
    assert world.stopped == []


def test_clones_that_nobody_waits_for(world: World, parent: str) -> None:
    """Those that their owner made."""
    record = world.record(parent)
    world.cloud.fork(parent, fork_id=record.id, count=1)
    clone = world.cloud.clones[record.id][1]["server_id"]
    with refused("invalid", "No program"):
        world.ask(clone, "exit", status=0)
    assert world.stopped == []


def test_parents_host_is_restarted(world: World, parent: str) -> None:
    ticket, [clone] = world.cloned(parent)
    world.hosts.trouble = [DOWN, DOWN]
    assert world.ask(clone, "exit", status=3) == {}
    assert world.tickets.get(ticket).exits == {"1": 3}


def test_parents_host_stays_away(
    world: World, parent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_calls, "_PATIENCE", 0.0)
    _, [clone] = world.cloned(parent)
    world.hosts.trouble = [DOWN] * 5
    with refused("failed"):
        world.ask(clone, "exit", status=3)
    assert world.stopped == []


def test_clones_that_are_faster_than_the_answer(world: World, parent: str) -> None:
    """They have results, and exit, before their parent's host knows that they are there."""
    ticket = world.ticket(parent, 2)

    def after(fork: str) -> None:
        clone = world.cloud.clones[fork][1]["server_id"]
        world.ask(clone, "put", offset=0, data=encoded(b"fast"))
        world.ask(clone, "exit", status=5)

    world.cloud.after = after
    world.ask(parent, "clone", ticket=ticket)
    assert world.tickets.get(ticket).exits == {"1": 5}
    world.ask(world.tickets.get(ticket).clones["2"], "exit", status=6)
    answer = world.ask(parent, "join", ticket=ticket)
    assert [clone["status"] for clone in answer["clones"]] == [5, 6]
    assert world.results() == {1: b"fast"}


def test_clones_of_a_stranger_with_the_same_request(world: World, parent: str) -> None:
    """They do not exit in place of those that are just being made."""
    stranger = world.add()
    _, [strange] = _cloned_for(world, stranger, "r")
    world.calls.forget(stranger)
    ticket = world.ticket(parent, 2)
    told: list[bool] = []

    def after(fork: str) -> None:
        known = world.servers[strange].system_metadata
        told.append(world.calls.told(known[rpc.FORK], 1, None, None, 9))
        # Nor do clones that the owner makes of the same image meanwhile.
        told.append(world.calls.told(fork, 3, None, None, 9))

    world.cloud.after = after
    world.ask(parent, "clone", "r", ticket=ticket)
    assert told == [False, False]
    assert world.tickets.get(ticket).exits == {}


def _cloned_for(world: World, asker: str, request: str) -> tuple[str, list[str]]:
    ticket = world.ticket(asker)
    world.ask(asker, "clone", request, ticket=ticket)
    return ticket, list(world.tickets.get(ticket).clones.values())


# Joins


def test_join_before_clone(world: World, parent: str) -> None:
    with refused("invalid", "has no clones"):
        world.ask(parent, "join", ticket=world.ticket(parent))


@pytest.mark.parametrize("status", ["ERROR", "SHUTOFF", "DELETED", "GONE"])
def test_clone_that_ends_without_exit(world: World, parent: str, status: str) -> None:
    ticket, clones = world.cloned(parent, 2)
    joined = Asked(world.ask, parent, "join", ticket=ticket)
    world.ask(clones[1], "exit", status=0)
    fork = str(world.tickets.get(ticket).fork)
    world.cloud.clones[fork][1]["status"] = status
    [first, second] = joined.result()["clones"]
    said = "DELETED" if status == "GONE" else status
    assert first["error"] == f"Its server is {said}, and it has not exited"
    assert first["status"] is None
    assert (second["status"], second["error"]) == (0, None)
    assert sorted(world.cloud.deleted) == sorted(clones)


def test_fork_that_is_gone(world: World, parent: str) -> None:
    """Its image was not needed, since its owner has deleted its clones."""
    ticket, _ = world.cloned(parent)
    del world.cloud.clones[str(world.tickets.get(ticket).fork)]
    [clone] = world.ask(parent, "join", ticket=ticket)["clones"]
    assert "DELETED" in clone["error"]


def test_api_is_down_while_a_program_waits(world: World, parent: str) -> None:
    ticket, [clone] = world.cloned(parent)
    looks = threading.Semaphore(0)

    def shown() -> None:
        looks.release()
        raise DOWN

    world.cloud.shown = shown
    joined = Asked(world.ask, parent, "join", ticket=ticket)
    for _ in range(2):
        assert looks.acquire(timeout=TIMEOUT)
    assert joined.waits
    world.cloud.shown = lambda: None
    world.ask(clone, "exit", status=1)
    assert joined.result()["clones"][0]["status"] == 1


def test_exit_wakes_who_waits(world: World, parent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for the next look."""
    ticket, clones = world.cloned(parent, 2)
    looked = threading.Event()
    world.cloud.shown = looked.set
    joined = Asked(world.ask, parent, "join", ticket=ticket)
    assert looked.wait(TIMEOUT)
    monkeypatch.setattr(guest_calls, "_LOOK_AGAIN", 1e6)
    for clone in clones:
        world.ask(clone, "exit", status=0)
    assert len(joined.result()["clones"]) == 2


def test_join_is_asked_again(world: World, parent: str) -> None:
    ticket, [clone] = world.cloned(parent)
    world.ask(clone, "put", offset=0, data=encoded(b"result"))
    world.ask(clone, "exit", status=1)
    answer = world.ask(parent, "join", "j", ticket=ticket)
    world.restart()
    pieces, world.pieces = world.pieces, []
    assert world.ask(parent, "join", "j", ticket=ticket) == answer
    assert world.pieces == pieces == [(1, 0, encoded(b"result"))]
    assert world.cloud.deleted == [clone]
    with refused("invalid", "has no clones"):
        world.ask(parent, "join", "other", ticket=ticket)


def test_restart_while_a_program_waits(world: World, parent: str) -> None:
    ticket, [clone] = world.cloned(parent)
    world.ask(clone, "exit", status=4)
    world.cloud.refusal = DOWN
    with refused("failed"):  # as far as deleting the clone
        world.ask(parent, "join", "j", ticket=ticket)
    world.restart()
    world.cloud.refusal = None
    assert world.ask(parent, "join", "j", ticket=ticket)["clones"][0]["status"] == 4
    assert world.cloud.deleted == [clone]


def test_clone_after_its_join(world: World, parent: str) -> None:
    ticket, [clone] = world.cloned(parent)
    world.ask(clone, "exit", status=0)
    world.ask(parent, "join", "j", ticket=ticket)
    for call, arguments in (("exit", {"status": 9}), ("put", {"offset": 0, "data": "QUE="})):
        with refused("invalid", "No program"):
            world.ask(clone, call, **arguments)
    assert world.ask(parent, "join", "j", ticket=ticket)["clones"][0]["status"] == 0
    assert world.results() == {}


def test_two_that_join(world: World, parent: str) -> None:
    """One of them gets it, and gets it again."""
    ticket, [clone] = world.cloned(parent)
    requests = ("a", "b")
    both = [Asked(world.ask, parent, "join", request, ticket=ticket) for request in requests]
    world.ask(clone, "exit", status=0)
    got = []
    for request, joined in zip(requests, both, strict=True):
        # "invalid" or "busy", as it comes.
        with contextlib.suppress(guest_calls.CallError):
            got.append((request, joined.result()))
    [(request, answer)] = got
    assert world.ask(parent, "join", request, ticket=ticket) == answer
    assert world.cloud.deleted == [clone]


def test_outcome_is_forgotten(world: World, parent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket, [clone] = world.cloned(parent)
    world.ask(clone, "put", offset=0, data=encoded(b"result"))
    world.ask(clone, "exit", status=0)
    world.ask(parent, "join", "j", ticket=ticket)
    granted = world.ticket(parent)
    world.calls.sweep()
    assert world.tickets.get(ticket)
    monkeypatch.setattr(guest_calls, "_REMEMBERED", -1.0)
    world.calls.sweep()
    assert os.listdir(world.directory / "snowflock" / "tickets") == [f"{granted}.json"]


# Kills


def test_kill(world: World, parent: str) -> None:
    ticket, clones = world.cloned(parent, 2)
    joined = Asked(world.ask, parent, "join", ticket=ticket)
    assert world.ask(parent, "kill", ticket=ticket) == {}
    assert sorted(world.cloud.deleted) == sorted(clones)
    with refused("invalid", "There is no ticket"):
        joined.result()
    with refused("invalid", "No program"):
        world.ask(clones[0], "exit", status=0)
    assert world.ask(parent, "request_ticket", n=4)["n"] == 4


def test_kill_that_fails_may_be_tried_again(world: World, parent: str) -> None:
    ticket, clones = world.cloned(parent)
    world.cloud.refusal = agents_cloud.Refusal(409, "it is locked")
    with refused("failed", "it is locked"):
        world.ask(parent, "kill", ticket=ticket)
    world.cloud.refusal = None
    world.ask(parent, "kill", ticket=ticket)
    assert world.cloud.deleted == clones


def test_kill_while_the_join_deletes(world: World, parent: str) -> None:
    ticket, [clone] = world.cloned(parent)
    world.ask(clone, "exit", status=0)
    begun, go_on = threading.Event(), threading.Event()

    def delete(server: str) -> None:
        begun.set()
        assert go_on.wait(TIMEOUT)

    setattr(world.cloud, "delete_server", delete)  # noqa: B010
    joined = Asked(world.ask, parent, "join", ticket=ticket)
    assert begun.wait(TIMEOUT)
    with refused("busy"):
        world.ask(parent, "kill", ticket=ticket)
    go_on.set()
    assert joined.result()["clones"][0]["status"] == 0


def test_kill_of_clones_whose_maker_never_asked_again(world: World, parent: str) -> None:
    """The host was restarted, and the guest with it."""
    ticket = world.ticket(parent, 2)
    world.ask(parent, "clone", "r", ticket=ticket)
    clones = list(world.tickets.get(ticket).clones.values())
    stop_short(world, ticket)
    world.ask(parent, "kill", ticket=ticket)
    assert sorted(world.cloud.deleted) == sorted(clones)
    assert list(world.tickets) == []


def test_kill_of_a_ticket_whose_clones_were_never_made(world: World, parent: str) -> None:
    ticket = world.ticket(parent)
    stop_short(world, ticket)
    world.ask(parent, "kill", ticket=ticket)
    assert world.cloud.deleted == []
    assert list(world.tickets) == []


# Checkpoints


def test_checkpoint(world: World, parent: str) -> None:
    made = world.ask(parent, "checkpoint_parent", "c", params={"a": "b"})
    checkpoint = made["checkpoint"]
    assert made == {"checkpoint": checkpoint, "clone_id": 0}
    [options] = world.cloud.forks()
    assert options == {
        "count": 0,
        "checkpoint": True,
        "params": {"a": "b", marks.REQUEST: "c"},
    }
    for first in (1, 3):
        ticket = world.ticket(parent, 2)
        assert world.ask(parent, "create_clones", checkpoint=checkpoint, ticket=ticket) == {}
        kept = world.tickets.get(ticket)
        assert (kept.fork, kept.first) == (checkpoint, first)
        for number, clone in enumerate(kept.clones.values()):
            world.ask(clone, "exit", status=number)
        answer = world.ask(parent, "join", ticket=ticket)["clones"]
        assert [(one["clone_id"], one["status"]) for one in answer] == [(first, 0), (first + 1, 1)]
    assert world.ask(parent, "release", checkpoint=checkpoint) == {}
    assert world.cloud.asked[-1] == ("release", parent, checkpoint)


def test_checkpoint_is_made_once(world: World, parent: str) -> None:
    made = world.ask(parent, "checkpoint_parent", "c")
    world.restart()
    assert world.ask(parent, "checkpoint_parent", "c") == made
    assert len(world.cloud.forks()) == 1


def test_checkpoints_are_limited(world: World) -> None:
    asker = world.add("2")
    kept = [world.ask(asker, "checkpoint_parent")["checkpoint"] for _ in range(2)]
    with refused("refused", "2 checkpoints"):
        world.ask(asker, "checkpoint_parent")
    world.ask(world.add("1"), "checkpoint_parent")
    world.ask(asker, "release", checkpoint=kept[0])
    world.ask(asker, "checkpoint_parent")


def test_checkpoints_are_limited_at_a_time(world: World) -> None:
    asker = world.add("1")

    def before() -> None:
        with refused("refused", "1 checkpoints"):
            world.ask(asker, "checkpoint_parent")

    world.cloud.before = before
    world.ask(asker, "checkpoint_parent")
    world.cloud.before = lambda: None
    world.cloud.refusal = DOWN
    other = world.add("1")
    for _ in range(2):
        with refused("failed"):
            world.ask(other, "checkpoint_parent")
    world.cloud.refusal = None
    world.ask(other, "checkpoint_parent")


@pytest.mark.parametrize("call", ["release", "create_clones"])
@pytest.mark.parametrize("whose", ["stranger's", "owner's", "nobody's", "no checkpoint"])
def test_checkpoints_of_others(world: World, parent: str, call: str, whose: str) -> None:
    stranger = world.add()
    if whose == "stranger's":
        checkpoint = world.ask(stranger, "checkpoint_parent")["checkpoint"]
    elif whose == "owner's":
        checkpoint = world.record(parent, checkpoint=True).id
    elif whose == "nobody's":
        checkpoint = str(uuid.uuid4())
    else:
        ticket, _ = world.cloned(parent)
        checkpoint = world.tickets.get(ticket).fork
    more = {"ticket": world.ticket(parent)} if call == "create_clones" else {}
    asked = len(world.cloud.asked)
    with refused("invalid", f"There is no checkpoint {checkpoint}"):
        world.ask(parent, call, checkpoint=checkpoint, **more)
    assert len(world.cloud.asked) == asked


def test_create_clones_that_fails_may_be_tried_again(world: World, parent: str) -> None:
    checkpoint = world.ask(parent, "checkpoint_parent")["checkpoint"]
    ticket = world.ticket(parent)
    world.cloud.refusal = agents_cloud.Refusal(409, "no")
    with refused("failed"):
        world.ask(parent, "create_clones", checkpoint=checkpoint, ticket=ticket)
    kept = world.tickets.get(ticket)
    assert (kept.state, kept.fork, kept.first) == ("granted", None, 1)
    world.cloud.refusal = None
    world.ask(parent, "clone", ticket=ticket)


def test_restart_while_clones_of_a_checkpoint_are_made(world: World, parent: str) -> None:
    checkpoint = world.ask(parent, "checkpoint_parent")["checkpoint"]
    arguments = {"checkpoint": checkpoint}
    world.ask(parent, "create_clones", ticket=world.ticket(parent), **arguments)
    ticket = world.ticket(parent, 2)
    world.ask(parent, "create_clones", "r", ticket=ticket, **arguments)
    before = world.tickets.get(ticket)
    asked = len(world.cloud.forks())
    stop_short(world, ticket)
    assert world.ask(parent, "create_clones", "r", ticket=ticket, **arguments) == {}
    assert len(world.cloud.forks()) == asked
    assert world.tickets.get(ticket) == before
    # A crash before the API was asked is another matter.
    stop_short(world, ticket)
    kept = world.tickets.get(ticket)
    kept.first = 4
    world.tickets.put(kept)
    world.ask(parent, "create_clones", "r", ticket=ticket, **arguments)
    assert len(world.cloud.forks()) == asked + 1
    assert list(world.tickets.get(ticket).clones) == ["4", "5"]


def test_two_that_make_clones_of_a_checkpoint(world: World, parent: str) -> None:
    """Each gets its own."""
    checkpoint = world.ask(parent, "checkpoint_parent")["checkpoint"]
    held = [world.ticket(parent, 2) for _ in range(2)]
    both = threading.Barrier(2)

    def before() -> None:
        # Would both be asked for at a time, they would meet here.
        try:
            both.wait(0.2)
        except threading.BrokenBarrierError:
            both.reset()

    def after(fork: str) -> None:
        for clone_id in list(world.cloud.clones[fork])[-2:]:
            world.calls.told(fork, clone_id, None, None, clone_id)

    world.cloud.before, world.cloud.after = before, after
    asked = [
        Asked(world.ask, parent, "create_clones", checkpoint=checkpoint, ticket=ticket)
        for ticket in held
    ]
    assert [one.result() for one in asked] == [{}, {}]
    found = [list(world.tickets.get(ticket).clones) for ticket in held]
    assert sorted(found) == [["1", "2"], ["3", "4"]]
    for ticket in held:
        kept = world.tickets.get(ticket)
        assert kept.exits == {clone_id: int(clone_id) for clone_id in kept.clones}
    assert sorted(world.tickets.get(ticket).first for ticket in held) == [1, 3]


def test_owner_makes_clones_meanwhile(world: World, parent: str) -> None:
    """They are not the ticket's, and are not deleted with its clones."""
    checkpoint = world.ask(parent, "checkpoint_parent")["checkpoint"]
    ticket = world.ticket(parent)
    owners: list[str] = []

    def before() -> None:
        world.cloud.before = lambda: None
        made = world.cloud.fork(parent, fork_id=checkpoint, count=1)
        owners.extend(clone["server_id"] for clone in made["clones"])

    world.cloud.before = before
    world.ask(parent, "create_clones", checkpoint=checkpoint, ticket=ticket)
    kept = world.tickets.get(ticket)
    assert (kept.first, list(kept.clones)) == (2, ["2"])
    world.ask(parent, "kill", ticket=ticket)
    assert owners
    assert not set(owners) & set(world.cloud.deleted)
    assert len(world.cloud.deleted) == 1


# Else


def test_info(world: World, parent: str) -> None:
    granted = world.ticket(parent)
    ticket, [clone] = world.cloned(parent)
    told = world.ask(parent, "info")
    tickets = told.pop("tickets")
    assert told == {
        "server": parent,
        "clone_id": 0,
        "fork": None,
        "parent": None,
        "params": {},
        "limit": 4,
    }
    assert sorted(tickets, key=str) == sorted(
        [
            {"ticket": granted, "n": 1, "state": "granted"},
            {"ticket": ticket, "n": 1, "state": "cloned"},
        ],
        key=str,
    )
    fork = world.tickets.get(ticket).fork
    assert world.ask(clone, "info") == {
        "server": clone,
        "clone_id": 1,
        "fork": fork,
        "parent": parent,
        "params": {},
        "limit": 0,
        "tickets": [],
    }


def test_params_of_a_clone(world: World, parent: str) -> None:
    ticket = world.ticket(parent)
    world.ask(parent, "clone", ticket=ticket, params={"a": "b"})
    [clone] = world.tickets.get(ticket).clones.values()
    assert world.ask(clone, "info")["params"] == {"a": "b"}


def test_states_are_those_that_are_documented() -> None:
    states = (agents_tickets.GRANTED, agents_tickets.CLONING, agents_tickets.CLONED)
    assert states == ("granted", "cloning", "cloned")
