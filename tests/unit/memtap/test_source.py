# SPDX-License-Identifier: Apache-2.0
"""Image sources: blobs, sparse files, and the memory of a process that stands still."""

from collections.abc import Iterator
import ctypes
import mmap
import os
import pathlib
import random
import signal

import pytest

from nova_snowflock import exception
from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import pagemap
from nova_snowflock.memtap.server import source


def read(image: source.ImageSource, page: int, pages: int, parts: list[int] | None = None) -> bytes:
    """Read through buffers of these sizes; a page each if none are given."""
    buffers = [memoryview(bytearray(b"\xff" * size)) for size in parts or [PAGE_SIZE] * pages]
    assert sum(map(len, buffers)) == pages * PAGE_SIZE
    image.read(page, buffers)
    return b"".join(buffers)


def random_parts(pages: int, seed: int) -> list[int]:
    """Sizes of buffers as fragments of pages have them."""
    chosen = random.Random(seed)
    edges = sorted(chosen.sample(range(1, pages * PAGE_SIZE), 3 * pages))
    return [b - a for a, b in zip([0, *edges], [*edges, pages * PAGE_SIZE], strict=True)]


@pytest.mark.parametrize("size", [1, PAGE_SIZE - 1, PAGE_SIZE, PAGE_SIZE + 1, 3 * PAGE_SIZE + 17])
def test_blob(size: int) -> None:
    data = random.Random(size).randbytes(size)
    image = source.Blob(data)
    assert image.size == size
    assert image.page_map.count() == image.pages == -(-size // PAGE_SIZE)
    assert read(image, 0, image.pages) == data.ljust(image.pages * PAGE_SIZE, b"\0")
    assert (
        read(image, image.pages - 1, 1)[: size % PAGE_SIZE or PAGE_SIZE]
        == data[(image.pages - 1) * PAGE_SIZE :]
    )
    image.close()


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "image"


def open_file(path: pathlib.Path) -> source.SparseFile:
    return source.SparseFile(os.open(path, os.O_RDONLY))


def test_sparse_file(path: pathlib.Path) -> None:
    data = bytearray(64 * PAGE_SIZE + 123)
    with path.open("wb") as file:
        file.truncate(len(data))
        for page in (0, 5, 6, 30, 64):
            content = random.Random(page).randbytes(min(PAGE_SIZE, len(data) - page * PAGE_SIZE))
            data[page * PAGE_SIZE : page * PAGE_SIZE + len(content)] = content
            file.seek(page * PAGE_SIZE)
            file.write(content)
    image = open_file(path)
    assert (image.size, image.pages) == (len(data), 65)
    assert [page for page in range(65) if image.page_map.content[page]] == [0, 5, 6, 30, 64]
    padded = bytes(data).ljust(65 * PAGE_SIZE, b"\0")
    assert read(image, 0, 65) == padded
    assert read(image, 4, 60, random_parts(60, 1)) == padded[4 * PAGE_SIZE : 64 * PAGE_SIZE]
    assert read(image, 63, 2, random_parts(2, 2)) == padded[63 * PAGE_SIZE :]
    image.close()


@pytest.mark.parametrize(
    ("start", "length"), [(0, 10), (0, 2 * PAGE_SIZE), (PAGE_SIZE - 1, 2), (5000, 9000), (0, 0)]
)
def test_patched_file(path: pathlib.Path, start: int, length: int) -> None:
    """What is patched is content, even where the file has a hole."""
    data = bytearray(8 * PAGE_SIZE + 5)
    data[6 * PAGE_SIZE : 7 * PAGE_SIZE] = random.Random(1).randbytes(PAGE_SIZE)
    path.write_bytes(data)
    with path.open("r+b") as file:
        file.truncate(0)
        file.truncate(len(data))
        file.seek(6 * PAGE_SIZE)
        file.write(data[6 * PAGE_SIZE : 7 * PAGE_SIZE])
    patch = random.Random(2).randbytes(length)
    data[start : start + length] = patch
    image = source.SparseFile(os.open(path, os.O_RDONLY), (start, patch))
    padded = bytes(data).ljust(9 * PAGE_SIZE, b"\0")
    assert read(image, 0, 9, random_parts(9, 3)) == padded
    assert read(image, 1, 8) == padded[PAGE_SIZE:]
    wanted = {6, *range(start // PAGE_SIZE, -(-(start + length) // PAGE_SIZE))} if length else {6}
    assert {page for page in range(9) if image.page_map.content[page]} == wanted
    image.close()


@pytest.mark.parametrize("patch", [(-1, b"x"), (4095, b"xx"), (1 << 62, b"x")])
def test_patch_beyond_the_end(path: pathlib.Path, patch: tuple[int, bytes]) -> None:
    path.write_bytes(bytes(PAGE_SIZE))
    with pytest.raises(ValueError, match="beyond"):
        source.SparseFile(os.open(path, os.O_RDONLY), patch)


@pytest.mark.parametrize("size", [0, 1, 10 * PAGE_SIZE, 10 * PAGE_SIZE + 1])
def test_a_file_that_is_one_hole(path: pathlib.Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)
    image = open_file(path)
    assert image.page_map.count() == 0
    assert image.page_map.pages == image.pages == -(-size // PAGE_SIZE)
    image.close()


def test_data_up_to_an_odd_end(path: pathlib.Path) -> None:
    path.write_bytes(b"x" * (PAGE_SIZE + 1))
    image = open_file(path)
    assert image.page_map.content == b"\1\1"
    assert read(image, 1, 1) == b"x" + bytes(PAGE_SIZE - 1)
    image.close()


def test_a_file_that_is_cut_short(path: pathlib.Path) -> None:
    path.write_bytes(b"x" * 4 * PAGE_SIZE)
    image = open_file(path)
    os.truncate(path, 2 * PAGE_SIZE + 1)
    assert read(image, 0, 2) == b"x" * 2 * PAGE_SIZE
    for page in (2, 3):
        with pytest.raises(exception.SourceLost):
            read(image, page, 1)
    image.close()


RANGE = 16 * PAGE_SIZE
TOUCHED = {0: (0, 3, 4, 15), 1: (0, 15), 2: (7,)}


class Frozen:
    """A stopped child with three ranges of memory, of which it has written some pages."""

    def __init__(self) -> None:
        self.memory = [mmap.mmap(-1, RANGE, flags=mmap.MAP_PRIVATE) for _ in range(3)]
        self.ranges = [
            (ctypes.addressof(ctypes.c_char.from_buffer(memory)), RANGE) for memory in self.memory
        ]
        self.pid = os.fork()
        if not self.pid:
            for number, pages in TOUCHED.items():
                for page in pages:
                    start = page * PAGE_SIZE
                    self.memory[number][start : start + PAGE_SIZE] = self.page(number, page)
            os.kill(os.getpid(), signal.SIGSTOP)
            os._exit(0)
        os.waitpid(self.pid, os.WUNTRACED)

    @staticmethod
    def page(number: int, page: int) -> bytes:
        return random.Random(100 * number + page).randbytes(PAGE_SIZE)

    def expected(self) -> bytes:
        return b"".join(
            self.page(number, page) if page in TOUCHED[number] else bytes(PAGE_SIZE)
            for number in range(3)
            for page in range(RANGE // PAGE_SIZE)
        )

    def open(self, ranges: list[tuple[int, int]]) -> source.ProcessMemory:
        return source.ProcessMemory(*self.descriptors(), ranges)

    def descriptors(self) -> tuple[int, int]:
        memory, page_map = (
            os.open(f"/proc/{self.pid}/{name}", os.O_RDONLY) for name in ("mem", "pagemap")
        )
        return memory, page_map

    def end(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0


@pytest.fixture
def frozen() -> Iterator[Frozen]:
    child = Frozen()
    yield child
    child.end()


def test_process_memory(frozen: Frozen) -> None:
    image = frozen.open(frozen.ranges)
    assert (image.size, image.pages) == (3 * RANGE, 48)
    content = [page for page in range(48) if image.page_map.content[page]]
    assert content == [0, 3, 4, 15, 16, 31, 39]
    expected = frozen.expected()
    assert read(image, 0, 48) == expected
    # Runs that cross one and two edges between ranges, in buffers that do as well.
    assert read(image, 15, 2, [2 * PAGE_SIZE]) == expected[15 * PAGE_SIZE : 17 * PAGE_SIZE]
    assert read(image, 10, 30, [30 * PAGE_SIZE]) == expected[10 * PAGE_SIZE : 40 * PAGE_SIZE]
    assert read(image, 10, 30, random_parts(30, 3)) == expected[10 * PAGE_SIZE : 40 * PAGE_SIZE]
    image.close()


def test_process_memory_above_a_file(frozen: Frozen) -> None:
    """A page that is not there is the file's: zero only if it is zero in that."""
    below = pagemap.PageMap(bytes(page in (1, 3) for page in range(48)))
    image = source.ProcessMemory(*frozen.descriptors(), frozen.ranges, below.encode())
    content = [page for page in range(48) if image.page_map.content[page]]
    assert content == [0, 1, 3, 4, 15, 16, 31, 39]
    image.close()
    with pytest.raises(exception.InvalidPageMap):
        source.ProcessMemory(*frozen.descriptors(), frozen.ranges[:1], below.encode())


def test_process_memory_of_one_range(frozen: Frozen) -> None:
    image = frozen.open(frozen.ranges[:1])
    assert image.page_map.count() == 4
    expected = frozen.expected()[:RANGE]
    assert read(image, 2, 14, random_parts(14, 4)) == expected[2 * PAGE_SIZE :]
    image.close()


def test_ranges_in_any_order(frozen: Frozen) -> None:
    image = frozen.open(frozen.ranges[::-1])
    expected = frozen.expected()
    assert read(image, 0, 16) == expected[2 * RANGE :]
    assert read(image, 32, 16) == expected[:RANGE]
    image.close()


@pytest.mark.parametrize("count", [1, 3])
def test_process_that_has_ended(frozen: Frozen, count: int) -> None:
    image = frozen.open(frozen.ranges[:count])
    frozen.end()
    with pytest.raises(exception.SourceLost):
        read(image, 0, 1)
    image.close()


def test_process_that_has_ended_before(frozen: Frozen) -> None:
    fds = frozen.descriptors()
    frozen.end()
    with pytest.raises(exception.SourceLost):
        source.ProcessMemory(*fds, frozen.ranges)
    for fd in fds:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.close(fd)


def test_memory_that_is_not_mapped(frozen: Frozen) -> None:
    image = frozen.open([(PAGE_SIZE, RANGE)])
    assert image.page_map.count() == 0
    with pytest.raises(exception.SourceLost):
        read(image, 0, 1)
    image.close()


@pytest.mark.parametrize("ranges", [[], [(1, PAGE_SIZE)], [(PAGE_SIZE, 1)], [(0, 4096), (4096, 5)]])
def test_ranges_of_parts_of_pages_are_refused(
    frozen: Frozen, ranges: list[tuple[int, int]]
) -> None:
    with pytest.raises(ValueError, match="whole pages"):
        frozen.open(ranges)
