# SPDX-License-Identifier: Apache-2.0
"""Functions in clones. Processes are the machines here: they have their parent's memory too."""

from collections.abc import Callable, Iterator
import os
import random
import signal
import threading
from typing import Any

import pytest

from nova_snowflock import guest
from nova_snowflock.guest import client
from nova_snowflock.guest import workers
from tests.unit.guest import agents


@pytest.fixture
def host(host: agents.Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[agents.Host]:
    monkeypatch.setattr(client, "clone", host.fork)
    monkeypatch.setattr(workers, "_RETRY", 0.01)
    yield host
    for pid in host.clones:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def run(function: Callable[[Any], Any], items: Any, clones: int) -> list[Any]:
    """:func:`workers.map`; a clone that gets out of it does not go on with the test."""
    parent = os.getpid()
    try:
        return workers.map(function, items, clones)
    finally:
        if os.getpid() != parent:
            os._exit(77)


@pytest.mark.parametrize(("clones", "granted"), [(3, 3), (5, 2), (5, 1), (7, 7), (30, 30)])
def test_results_are_in_order(host: agents.Host, clones: int, granted: int) -> None:
    host.granted = granted
    lock = threading.Lock()  # could not be pickled

    def square(item: Callable[[], int]) -> tuple[int, int]:
        with lock:
            return item() ** 2, os.getpid()

    items = [lambda n=n: n for n in range(7)]
    results = run(square, iter(items), clones)
    assert [result for result, _ in results] == [n**2 for n in range(7)]
    workers_used = min(granted, 7)
    pids = [pid for _, pid in results]
    assert pids == [pids[n % workers_used] for n in range(7)]
    assert set(pids) == set(host.exited)
    assert len(set(pids)) == workers_used
    assert host.calls[0] == ("request_ticket", {"n": min(clones, 7)})


def test_no_items(host: agents.Host) -> None:
    assert run(str, [], 3) == []
    assert host.calls == []


def test_no_clones(host: agents.Host) -> None:
    with pytest.raises(ValueError, match="0 clones"):
        run(str, [1], 0)
    host.answers["request_ticket"] = agents.Refusal("refused", "the owner has not allowed it")
    with pytest.raises(guest.Refused, match="not allowed"):
        run(str, [1], 1)
    host.answers["request_ticket"] = {"ticket": "t", "n": 0}
    with pytest.raises(guest.Refused, match="no clones were granted"):
        run(str, [1], 1)


def test_clones_draw_numbers_of_their_own(host: agents.Host) -> None:
    random.seed(1)
    numbers = run(lambda _: random.random(), range(4), 4)
    assert len(set(numbers)) == 4


@pytest.mark.parametrize("error", [ValueError, SystemExit, KeyboardInterrupt])
def test_functions_that_raise(host: agents.Host, error: type[BaseException]) -> None:
    def fail(item: int) -> int:
        if item in (3, 4):
            raise error(f"of no use: {item}")
        return item

    with pytest.raises(workers.WorkerError, match=r"^clone 2, item 3: Traceback") as raised:
        run(fail, range(6), 2)
    assert (raised.value.clone_id, raised.value.item) == (2, 3)
    assert f"{error.__name__}: of no use: 3" in raised.value.text
    assert "in fail" in raised.value.text
    assert list(host.statuses.values()) == [0, 0]
    assert host.ended == {1: -signal.SIGKILL, 2: -signal.SIGKILL}


def test_results_that_cannot_be_pickled(host: agents.Host) -> None:
    with pytest.raises(workers.WorkerError, match=r"clone 2, item 1: (.|\n)*pickle"):
        run(lambda item: threading.Lock() if item == 1 else item, range(3), 3)


class Unreadable:
    def __reduce__(self) -> Any:
        return int, ("nothing",)


def test_results_that_cannot_be_read(host: agents.Host) -> None:
    with pytest.raises(workers.WorkerError, match=r"clone 1, item 0: (.|\n)*ValueError"):
        run(lambda item: Unreadable(), range(1), 1)


def test_clones_that_die(host: agents.Host) -> None:
    def die(item: int) -> int:
        if item == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(workers.WorkerError, match="clone 2: the clone has crashed") as raised:
        run(die, range(4), 3)
    assert (raised.value.clone_id, raised.value.item) == (2, None)
    assert sorted(host.statuses) == [1, 3]


def test_functions_that_end_the_clone(host: agents.Host) -> None:
    with pytest.raises(workers.WorkerError, match="clone 1: it ended with the status 5"):
        run(lambda item: guest.exit(5), range(1), 1)


def test_large_results(host: agents.Host) -> None:
    data = os.urandom(300_000)
    assert run(lambda item: data, range(2), 2) == [data, data]


def test_results_that_are_too_large(host: agents.Host) -> None:
    host.limit = 100_000
    with pytest.raises(workers.WorkerError, match=r"clone 1: .*too large"):
        run(lambda item: bytes(100_001), range(1), 1)
    assert len(host.exited) == 1


@pytest.mark.parametrize("kind", ["failed", "busy"])
def test_what_may_be_tried_again_is(host: agents.Host, kind: str) -> None:
    def first(arguments: dict[str, Any]) -> dict[str, Any]:
        del host.answers["exit"]
        raise agents.Refusal(kind)

    host.answers["exit"] = first
    assert run(str, range(1), 1) == ["0"]
    assert [call for call, _ in host.calls].count("exit") == 2


def test_clones_that_were_not_made(host: agents.Host) -> None:
    host.answers["join"] = {"clones": []}
    with pytest.raises(workers.WorkerError, match="clone 1: it was not made"):
        run(str, range(1), 1)


@pytest.mark.parametrize("result", ["", "AAAA"])
def test_damaged_results(host: agents.Host, result: str) -> None:
    clone = {"clone_id": 1, "status": 0, "error": None, "result": result}
    host.answers["join"] = {"clones": [clone]}
    with pytest.raises(workers.WorkerError, match="clone 1: its results are damaged"):
        run(str, range(1), 1)


def test_whoever_waits_no_longer_stops_the_clones(
    host: agents.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(ticket: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(client, "join", interrupt)
    host.answers["kill"] = {}
    with pytest.raises(KeyboardInterrupt):
        run(str, range(1), 1)
    assert ("kill", {"ticket": "a-ticket"}) in host.calls


def test_errors_of_join_are_the_callers(host: agents.Host) -> None:
    host.answers["join"] = agents.Refusal("forked", "this is a clone")
    with pytest.raises(guest.Forked):
        run(str, range(1), 1)
    assert "kill" not in [call for call, _ in host.calls]


def test_a_clone_whose_errors_cannot_be_told_ends(
    host: agents.Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise OSError("nobody reads this")

    monkeypatch.setattr(workers, "_compute", broken)
    with pytest.raises(workers.WorkerError, match="clone 1: the clone has crashed"):
        run(str, range(1), 1)
    assert host.ended == {1: 1}
