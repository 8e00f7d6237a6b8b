# SPDX-License-Identifier: Apache-2.0
"""From pages to datagrams and back: server's batches, memtap's assembler."""

from collections.abc import Callable, Iterator
import dataclasses
import pathlib
import random

import pytest

from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import wire
from nova_snowflock.memtap.client import assembler
from nova_snowflock.memtap.client import store as page_store
from nova_snowflock.memtap.server import batch
from nova_snowflock.memtap.server import source

KEY = bytes(32)
MTUS = [1280, 1300, 1428, 1460, 1461, 1462, 1500, 2144, 2145, 4192, 9000, 16384, 65535]
PAGES = 100


@dataclasses.dataclass
class Path:
    """A server's sending end and a memtap's receiving end."""

    batch: batch.Batch
    sealer: wire.Sealer
    opener: wire.Opener
    file: page_store.StoredFile
    store: page_store.PageStore
    assembler: assembler.Assembler
    present: list[int]

    def datagrams(self, image: source.ImageSource, run: wire.Run) -> list[bytes]:
        """What is sent for a run; what is zero is noted at the other end."""
        datagrams, zeros = self.batch.seal(image, run, self.sealer)
        for zero in zeros:
            assert zero.file == run.file
            assert run.page <= zero.page
            assert zero.page + zero.pages <= run.page + run.pages
            self.file.set_present(zero.page, zero.pages, page_store.ZERO)
        size = self.batch.geometry.datagram
        return [bytes(datagrams[at : at + size]) for at in range(0, len(datagrams), size)]

    def receive(self, datagrams: list[bytes]) -> None:
        """As if they had come together."""
        for datagram in datagrams:
            payload = self.opener.open(datagram)
            assert payload is not None
            self.assembler.add(memoryview(payload))
        self.assembler.flush()

    def content(self) -> bytes:
        assert self.file.missing == 0
        data = memoryview(bytearray(self.file.pages * PAGE_SIZE))
        self.file.read_into(data, 0)
        return bytes(data)


@pytest.fixture
def connect(tmp_path: pathlib.Path) -> Iterator[Callable[..., Path]]:
    stores = []

    def make(mtu: int, pages: int = PAGES) -> Path:
        file = page_store.StoredFile(1, "memory", pages * PAGE_SIZE, str(tmp_path))
        store = page_store.PageStore({1: file})
        stores.append(store)
        present: list[int] = []
        return Path(
            batch.Batch(wire.geometry(mtu)),
            wire.Sealer(5, wire.session_key(KEY, "multicast", 5)),
            wire.Opener(5, wire.session_key(KEY, "multicast", 5)),
            file,
            store,
            assembler.Assembler(
                store,
                lambda _, page, count: present.extend(range(page, page + count)),
                lambda _, page, data: None,
            ),
            present,
        )

    yield make
    for store in stores:
        store.close()


def image(pages: int, zero: Callable[[int], bool] = lambda page: False) -> bytes:
    return b"".join(
        bytes(PAGE_SIZE) if zero(page) else random.Random(page).randbytes(PAGE_SIZE)
        for page in range(pages)
    )


@pytest.mark.parametrize("mtu", MTUS)
@pytest.mark.parametrize(
    "zero",
    [
        lambda page: False,
        lambda page: True,
        lambda page: page % 2 == 0,
        lambda page: page % 7 in (2, 3, 4),
        lambda page: page >= PAGES - 3,
        lambda page: page < 3,
        lambda page: page == PAGES - 1,
    ],
    ids=["none", "all", "alternate", "some", "end", "beginning", "last"],
)
def test_all_bytes_arrive(
    connect: Callable[..., Path], mtu: int, zero: Callable[[int], bool]
) -> None:
    path = connect(mtu)
    data = image(PAGES, zero)
    blob = source.Blob(data)
    step = path.batch.geometry.batch
    for page in range(0, PAGES, step):
        path.receive(path.datagrams(blob, wire.Run(1, page, min(step, PAGES - page))))
    assert path.content() == data
    assert sorted(path.present) == sorted(set(path.present))
    assert path.assembler.malformed == path.assembler.repeated == 0


@pytest.mark.parametrize("mtu", MTUS)
def test_runs_of_every_length_and_place(connect: Callable[..., Path], mtu: int) -> None:
    path = connect(mtu)
    chosen = random.Random(mtu)
    data = image(PAGES, lambda page: page % 5 == 0)
    blob = source.Blob(data)
    page = 0
    runs = []
    while page < PAGES:
        count = min(chosen.randint(1, path.batch.geometry.batch), PAGES - page)
        runs.append(wire.Run(1, page, count))
        page += count
    chosen.shuffle(runs)
    for run in runs:
        path.receive(path.datagrams(blob, run))
    assert path.content() == data


@pytest.mark.parametrize("mtu", MTUS)
def test_datagrams_fit_and_are_equal_but_for_the_last(
    connect: Callable[..., Path], mtu: int
) -> None:
    path = connect(mtu)
    geometry = path.batch.geometry
    for pages in range(1, geometry.batch + 1):
        datagrams = path.datagrams(source.Blob(image(pages)), wire.Run(1, 0, pages))
        assert all(len(datagram) == geometry.datagram for datagram in datagrams[:-1])
        assert len(datagrams[-1]) <= geometry.datagram <= mtu - 48
        assert len(datagrams) == -(-pages // geometry.pages) * geometry.fragments


@pytest.mark.parametrize("mtu", MTUS)
def test_any_order_and_any_number_of_times(connect: Callable[..., Path], mtu: int) -> None:
    path = connect(mtu)
    data = image(PAGES)
    blob = source.Blob(data)
    step = path.batch.geometry.batch
    datagrams = []
    for _ in range(2):
        for page in range(0, PAGES, step):
            datagrams += path.datagrams(blob, wire.Run(1, page, min(step, PAGES - page)))
    random.Random(1).shuffle(datagrams)
    for start in range(0, len(datagrams), 20):
        path.receive(datagrams[start : start + 20])
    assert path.content() == data
    assert sorted(path.present) == list(range(PAGES))


@pytest.mark.parametrize("mtu", [1280, 1500, 2145])
def test_a_page_is_not_there_before_its_last_fragment(
    connect: Callable[..., Path], mtu: int
) -> None:
    path = connect(mtu, pages=1)
    data = image(1)
    datagrams = path.datagrams(source.Blob(data), wire.Run(1, 0, 1))
    assert len(datagrams) > 1
    for datagram in reversed(datagrams):
        assert path.file.missing == 1
        assert not path.file.is_present(0, 1)
        path.receive([datagram])
    assert path.content() == data


def test_fragments_of_another_geometry(connect: Callable[..., Path]) -> None:
    path = connect(1500, pages=4)
    data = image(4)
    blob = source.Blob(data)
    path.receive(path.datagrams(blob, wire.Run(1, 0, 4))[::2])
    assert path.file.missing == 4
    path.file.forget_fragments()
    path.batch = batch.Batch(wire.geometry(1280))
    path.receive(path.datagrams(blob, wire.Run(1, 0, 4)))
    assert path.content() == data


def test_an_odd_end_of_file(connect: Callable[..., Path]) -> None:
    data = image(3)[: 2 * PAGE_SIZE + 5]
    for mtu in MTUS:
        path = connect(mtu, pages=3)
        for page in range(3):
            path.receive(path.datagrams(source.Blob(data), wire.Run(1, page, 1)))
        assert path.content() == data.ljust(3 * PAGE_SIZE, b"\0")


def location(file: int, fragments: int, index: int, page: int, size: int) -> memoryview:
    return memoryview(wire.LOCATION.pack(file, fragments, index, page) + b"x" * size)


@pytest.mark.parametrize(
    "payload",
    [
        location(2, 1, 0, 0, PAGE_SIZE),
        location(1, 1, 0, 4, PAGE_SIZE),
        location(1, 1, 0, 3, 2 * PAGE_SIZE),
        location(1, 1, 0, (1 << 64) - 1, PAGE_SIZE),
        location(1, 1, 1, 0, PAGE_SIZE),
        location(1, 0, 0, 0, PAGE_SIZE),
        location(1, 5, 0, 0, 820),
        location(1, 255, 0, 0, 17),
        location(1, 3, 3, 0, 1366),
        location(1, 3, 0, 0, 1365),
        location(1, 3, 0, 0, 1367),
        location(1, 2, 0, 4, 2048),
        location(1, 1, 0, 0, 0),
        location(1, 1, 0, 0, PAGE_SIZE - 1),
        location(1, 1, 0, 0, PAGE_SIZE + 1),
        location(1, 4, 0, 0, 0),
        memoryview(b""),
        memoryview(b"short"),
    ],
)
def test_malformed_data_changes_nothing(connect: Callable[..., Path], payload: memoryview) -> None:
    path = connect(1500, pages=4)
    path.assembler.add(payload)
    path.assembler.flush()
    assert path.assembler.malformed == 1
    assert path.file.missing == 4
    assert path.present == []


def test_a_full_disk_leaves_pages_missing(
    connect: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = connect(1500, pages=4)
    data = image(4)

    def full(offset: int, buffers: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(path.file, "write", full)
        path.receive(path.datagrams(source.Blob(data), wire.Run(1, 0, 4)))
        assert path.file.missing == 4
        assert path.present == []
        assert "No space left" in (path.store.error or "")
    path.receive(path.datagrams(source.Blob(data), wire.Run(1, 0, 4)))
    assert not path.store.error
    assert path.content() == data
