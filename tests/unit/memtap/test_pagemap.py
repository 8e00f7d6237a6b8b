# SPDX-License-Identifier: Apache-2.0
"""The page map: what goes in comes out, and nothing else is taken."""

import random
import tracemalloc
import zlib

from hypothesis import given
from hypothesis import strategies as st
import pytest

from nova_snowflock import exception
from nova_snowflock.memtap import pagemap


def make(flags: list[bool]) -> pagemap.PageMap:
    return pagemap.PageMap(bytes(flags))


@given(st.lists(st.booleans(), max_size=300))
def test_round_trip(flags: list[bool]) -> None:
    page_map = make(flags)
    decoded = pagemap.PageMap.decode(page_map.encode(), len(flags))
    assert list(decoded.content) == flags
    assert decoded.pages == len(flags)
    assert decoded.count() == sum(flags)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=300))
def test_either(flags: list[tuple[bool, bool]]) -> None:
    first, second = (make([pair[number] for pair in flags]) for number in (0, 1))
    assert list((first | second).content) == [a or b for a, b in flags]


def test_first_page_is_the_lowest_bit() -> None:
    assert zlib.decompress(make([True, False, True] + 6 * [False]).encode()) == b"\x05\x00"


@given(st.binary(max_size=200), st.integers(0, 2000))
def test_random_bytes_are_refused(data: bytes, pages: int) -> None:
    with pytest.raises(exception.InvalidPageMap):
        pagemap.PageMap.decode(data, pages)


@given(st.lists(st.booleans(), min_size=1, max_size=300), st.integers(0, 400))
def test_another_number_of_pages_is_refused(flags: list[bool], pages: int) -> None:
    data = make(flags).encode()
    if -(-pages // 8) == -(-len(flags) // 8) and not any(flags[pages:]):
        assert list(pagemap.PageMap.decode(data, pages).content)[: len(flags)] == flags[:pages]
    else:
        with pytest.raises(exception.InvalidPageMap):
            pagemap.PageMap.decode(data, pages)


def test_every_truncation_is_refused() -> None:
    source = random.Random(1)
    data = make([source.random() < 0.5 for _ in range(1000)]).encode()
    for length in range(len(data)):
        with pytest.raises(exception.InvalidPageMap):
            pagemap.PageMap.decode(data[:length], 1000)


def test_bytes_after_the_end_are_refused() -> None:
    data = make([True] * 8).encode()
    for after in (b"\0", data):
        with pytest.raises(exception.InvalidPageMap, match="8 pages"):
            pagemap.PageMap.decode(data + after, 8)


def test_pages_after_the_end_are_refused() -> None:
    with pytest.raises(exception.InvalidPageMap, match="after its 7 pages"):
        pagemap.PageMap.decode(make([True] * 8).encode(), 7)


def test_a_bomb_is_not_inflated() -> None:
    bomb = zlib.compress(bytes(64 << 20))
    tracemalloc.start()
    try:
        with pytest.raises(exception.InvalidPageMap):
            pagemap.PageMap.decode(bomb, 4096)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
