# SPDX-License-Identifier: Apache-2.0
"""The page store: states and bytes."""

from collections.abc import Iterator
import os
import pathlib
import random

from hypothesis import given
from hypothesis import strategies as st
import pytest

from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import pagemap
from nova_snowflock.memtap.client import store as page_store

PAGES = 10000


@pytest.fixture
def file(tmp_path: pathlib.Path) -> Iterator[page_store.StoredFile]:
    stored = page_store.StoredFile(1, "memory", PAGES * PAGE_SIZE - 7, str(tmp_path))
    yield stored
    stored.close()


def zeros_at(*pages: int) -> pagemap.PageMap:
    return pagemap.PageMap(bytes(page not in pages for page in range(PAGES)))


def counts(file: page_store.StoredFile) -> tuple[int, int, int]:
    return file.resident, file.zero, file.missing


def test_content_and_zeros(file: page_store.StoredFile) -> None:
    assert (file.find_content(5), file.find_zero(5)) == (5, PAGES)
    file.apply(zeros_at(0, 1, 2, 9, PAGES - 1))
    assert (file.find_content(0), file.find_content(3), file.find_content(9)) == (3, 3, 10)
    assert file.find_content(PAGES - 1) == PAGES
    assert (file.find_zero(0), file.find_zero(3), file.find_zero(10)) == (0, 9, PAGES - 1)
    file.set_present(3, 1, page_store.RESIDENT)
    assert (file.find_content(0), file.find_zero(3)) == (3, 9)


def test_all_is_missing_at_first(file: page_store.StoredFile) -> None:
    assert file.pages == PAGES
    assert counts(file) == (0, 0, PAGES)
    assert file.find_missing(0) == 0
    assert not file.is_present(0, 1)


def test_pages_known_to_be_zero(file: page_store.StoredFile) -> None:
    file.apply(zeros_at(0, 1, 2, 5000, PAGES - 1))
    assert counts(file) == (0, 5, PAGES - 5)
    assert file.is_present(0, 3)
    assert not file.is_present(0, 4)
    assert file.find_missing(0) == 3
    assert file.find_missing(PAGES - 1) == PAGES
    buffer = memoryview(bytearray(b"x" * 3 * PAGE_SIZE))
    file.read_into(buffer, 0)
    assert buffer == bytes(3 * PAGE_SIZE)


def test_pages_become_present(file: page_store.StoredFile) -> None:
    file.set_present(7, 1, page_store.RESIDENT)
    file.set_present(8, 1, page_store.ZERO)
    assert counts(file) == (1, 1, PAGES - 2)
    assert file.is_present(7, 2)
    assert file.missing_bits(0, 16) == 0xFFFF & ~(1 << 7) & ~(1 << 8)
    assert file.missing_bits(7, 9) == 0


def test_pages_become_present_once(file: page_store.StoredFile) -> None:
    assert file.set_present(10, 5, page_store.RESIDENT) == [(10, 5)]
    assert file.set_present(10, 5, page_store.ZERO) == []
    assert file.set_present(8, 4, page_store.ZERO) in ([(8, 2)], [(8, 1), (9, 1)])
    assert file.set_present(3, 0, page_store.RESIDENT) == []
    assert counts(file) == (5, 2, PAGES - 7)
    assert file.is_present(8, 7)


def test_find_missing_far_away(file: page_store.StoredFile) -> None:
    content = bytes(page in (4095, 4096, 9999) for page in range(PAGES))
    file.apply(pagemap.PageMap(content))
    assert [file.find_missing(page) for page in (0, 4095, 4096, 4097, 9999, PAGES)] == [
        4095,
        4095,
        4096,
        9999,
        9999,
        PAGES,
    ]


def test_bytes_are_kept(file: page_store.StoredFile) -> None:
    chosen = random.Random(1)
    data = chosen.randbytes(5 * PAGE_SIZE)
    parts = [memoryview(data)[:100], memoryview(data)[100:9000], memoryview(data)[9000:]]
    file.write(3 * PAGE_SIZE, parts)
    buffer = memoryview(bytearray(5 * PAGE_SIZE))
    file.read_into(buffer, 3 * PAGE_SIZE)
    assert buffer == data
    assert counts(file) == (0, 0, PAGES)


def test_incomplete_pages_stay_missing(file: page_store.StoredFile) -> None:
    file.state[3] = 0b101
    file.set_present(4, 1, page_store.RESIDENT)
    assert not file.is_present(3, 1)
    file.forget_fragments()
    assert file.state[3] == 0
    assert file.is_present(4, 1)


@given(st.integers(0, 100), st.integers(1, 50), st.sets(st.integers(0, 160)))
def test_questions_agree(page: int, count: int, present: set[int]) -> None:
    stored = page_store.StoredFile(1, "memory", 160 * PAGE_SIZE, "/tmp")
    try:
        for number in present & set(range(160)):
            stored.set_present(number, 1, page_store.RESIDENT)
        end = min(page + count, 160)
        missing = [number for number in range(page, end) if number not in present]
        assert stored.is_present(page, end - page) == (not missing)
        bits = stored.missing_bits(page, end)
        assert [page + at for at in range(end - page) if bits >> at & 1] == missing
        left = [number for number in range(page, 160) if number not in present]
        assert stored.find_missing(page) == (left[0] if left else 160)
        assert stored.missing == 160 - len(present & set(range(160)))
    finally:
        stored.close()


def test_nobody_finds_it(tmp_path: pathlib.Path) -> None:
    stored = page_store.StoredFile(1, "memory", PAGE_SIZE, str(tmp_path))
    assert list(tmp_path.iterdir()) == []
    stored.close()


def test_it_is_sparse(file: page_store.StoredFile, tmp_path: pathlib.Path) -> None:
    file.write(0, [memoryview(b"x" * PAGE_SIZE)])
    used = [
        os.stat(f"/proc/self/fd/{fd}").st_blocks * 512
        for fd in os.listdir("/proc/self/fd")
        if os.path.exists(f"/proc/self/fd/{fd}")
        and os.readlink(f"/proc/self/fd/{fd}").startswith(str(tmp_path))
    ]
    assert used
    assert max(used) <= 64 << 10


def test_totals(file: page_store.StoredFile, tmp_path: pathlib.Path) -> None:
    other = page_store.StoredFile(2, "disk", 5, str(tmp_path))
    other.set_present(0, 1, page_store.ZERO)
    file.set_present(0, 1, page_store.RESIDENT)
    store = page_store.PageStore({1: file, 2: other})
    assert store.missing == PAGES - 1
    assert page_store.total(store.files.values()) == {
        "resident": 1,
        "zero": 1,
        "missing": PAGES - 1,
    }
    other.close()
