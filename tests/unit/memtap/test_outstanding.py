# SPDX-License-Identifier: Apache-2.0
"""Requests on their way: timeouts, coalescing, and when to look again."""

from collections.abc import Iterator
import itertools
import math
import pathlib

from hypothesis import given
from hypothesis import strategies as st
import pytest

from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import wire
from nova_snowflock.memtap.client import outstanding
from nova_snowflock.memtap.client import store as page_store

BLOCK = outstanding.BLOCK
FULL = (1 << BLOCK) - 1


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[page_store.StoredFile]:
    directory: pathlib.Path = tmp_path_factory.mktemp("store")
    stored = page_store.StoredFile(3, "memory", 1000 * PAGE_SIZE, str(directory))
    yield stored
    stored.close()


def runs(request: outstanding.Request) -> list[wire.Run]:
    """The pages of a request that are still to come."""
    return outstanding.runs(request.file, request.block, request.wanted)


def arrive(
    requests: outstanding.Outstanding, file: page_store.StoredFile, block: int, now: float
) -> None:
    """All pages of a block."""
    assert requests.arrived(file, block * BLOCK, BLOCK, now)
    assert not requests.has(file, block)


def test_timeout_follows_the_answers() -> None:
    timeout = outstanding.Timeout(0.005)
    first = timeout.value
    for _ in range(100):
        timeout.sample(0.05)
    assert 0.05 <= timeout.value < 0.06
    for _ in range(100):
        timeout.sample(0.0001)
    assert timeout.value == 0.005 <= first
    for sample in (0.01, 0.2) * 50:
        timeout.sample(sample)
    assert timeout.value > 0.2


def test_timeout_backs_off_to_a_bound() -> None:
    timeout = outstanding.Timeout(0.005)
    values = []
    for _ in range(30):
        timeout.back_off()
        values.append(timeout.value)
    assert values == sorted(values)
    assert values[-1] == values[-2] <= 2.0
    timeout.sample(0.001)
    assert timeout.value < values[0]


@given(st.integers(1, FULL))
def test_runs(file: page_store.StoredFile, bits: int) -> None:
    request = outstanding.Outstanding().add(file, 5, bits, 0.0, background=False)
    found = runs(request)
    pages = [page for run in found for page in range(run.page, run.page + run.pages)]
    assert pages == [5 * BLOCK + number for number in range(BLOCK) if bits >> number & 1]
    assert all(run.file == 3 and run.pages for run in found)
    # What could be one run is one.
    assert all(a.page + a.pages < b.page for a, b in itertools.pairwise(found))


def test_a_request_ends_with_its_last_page(file: page_store.StoredFile) -> None:
    requests = outstanding.Outstanding()
    requests.add(file, 0, 0b101, 1.0, background=False)
    assert not requests.arrived(file, 0, 2, 1.1)
    assert len(requests) == 1
    assert requests.has(file, 0)
    assert requests.arrived(file, 2, 1, 1.1)
    assert not requests.has(file, 0)
    assert len(requests) == 0
    assert not requests.arrived(file, 2, 1, 1.2)


def test_pages_of_several_requests_arrive(file: page_store.StoredFile) -> None:
    requests = outstanding.Outstanding()
    for block in range(4):
        requests.add(file, block, FULL, 1.0, background=True)
    assert requests.arrived(file, 5, 3 * BLOCK, 1.1)
    assert [requests.has(file, block) for block in range(4)] == [True, False, False, True]
    assert requests.background == 2
    assert [run for request in requests for run in runs(request)] == [
        wire.Run(3, 0, 5),
        wire.Run(3, 3 * BLOCK + 5, BLOCK - 5),
    ]


def test_faults_of_one_block_are_one_request(file: page_store.StoredFile) -> None:
    requests = outstanding.Outstanding()
    requests.add(file, 0, 0b0011, 1.0, background=False)
    both = requests.add(file, 0, 0b1100, 1.0, background=False)
    assert len(requests) == 1
    assert runs(both) == [wire.Run(3, 0, 4)]


def test_a_fault_hastens_a_background_request(file: page_store.StoredFile) -> None:
    requests = outstanding.Outstanding()
    slow = requests.add(file, 0, FULL, 1.0, background=True)
    before = slow.due
    assert requests.background == 1
    fast = requests.add(file, 0, 1, 1.0, background=False)
    assert fast is slow
    assert fast.fault
    assert fast.due < before
    assert requests.due == fast.due
    assert requests.background == 1
    arrive(requests, file, 0, 1.01)
    assert requests.background == 0


def test_overdue(file: page_store.StoredFile) -> None:
    requests = outstanding.Outstanding()
    assert requests.due == math.inf
    for block in range(3):
        requests.add(file, block, FULL, block, background=False)
    first = requests.due
    assert requests.overdue(first - 1e-6) == []
    (late,) = requests.overdue(first)
    assert late.block == 0
    assert requests.due > first
    assert [request.block for request in requests.overdue(100.0)] == [0, 1, 2]


def test_each_repeat_waits_longer(file: page_store.StoredFile) -> None:
    requests = outstanding.Outstanding()
    request = requests.add(file, 0, FULL, 0.0, background=False)
    waits = [request.due]
    for _ in range(12):
        now = request.due
        assert requests.overdue(now) == [request]
        requests.renew(request, now)
        waits.append(request.due - now)
        assert requests.due == request.due
    assert waits[1] > waits[0]
    assert all(a <= b + 1e-9 for a, b in itertools.pairwise(waits))
    assert waits[-1] == pytest.approx(waits[-2])
    assert waits[-1] <= 2.0


def test_answers_to_repeats_tell_nothing(file: page_store.StoredFile) -> None:
    """It cannot be told which of the requests they answer (Karn's rule)."""
    requests = outstanding.Outstanding()
    before = requests.fault_timeout.value
    request = requests.add(file, 0, FULL, 0.0, background=False)
    requests.renew(request, 0.5)
    arrive(requests, file, 0, 0.5001)
    assert requests.fault_timeout.value == before


def test_files_are_kept_apart(file: page_store.StoredFile, tmp_path: pathlib.Path) -> None:
    other = page_store.StoredFile(4, "disk", 1000 * PAGE_SIZE, str(tmp_path))
    requests = outstanding.Outstanding()
    requests.add(file, 0, 1, 0.0, background=False)
    assert not requests.has(other, 0)
    assert not requests.arrived(other, 0, 1, 0.0)
    assert len(requests) == 1
    other.close()


def test_stranded(file: page_store.StoredFile) -> None:
    requests = outstanding.Outstanding()
    for block in range(4):
        requests.add(file, block, FULL, 0.0, background=True)
    requests.add(file, 4, FULL, 0.0, background=False)
    assert requests.stranded(file, 0) == []
    for block in (0, 1, 4):
        requests.arrived(file, block * BLOCK, BLOCK - 1, 0.1)
    # What came last may still go on, and guests wait for a fault's answer in another way.
    assert [request.block for request in requests.stranded(file, BLOCK)] == [0]
    assert [request.block for request in requests.stranded(file, 2 * BLOCK)] == [0, 1]
    for request in requests.stranded(file, 2 * BLOCK):
        requests.renew(request, 0.1)
    assert requests.stranded(file, 2 * BLOCK) == []
    for block in (0, 1):
        assert requests.arrived(file, block * BLOCK + BLOCK - 1, 1, 0.2)
    assert requests.background == 2
