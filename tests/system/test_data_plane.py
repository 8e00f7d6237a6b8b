# SPDX-License-Identifier: Apache-2.0
"""The data plane as real processes: a memory server, memtaps, and readers of their mounts."""

import base64
from collections.abc import Iterator
import concurrent.futures
import contextlib
import ctypes
import errno
import functools
import json
import mmap
import os
import pathlib
import random
import signal
import stat
import subprocess
import sys
import threading
from typing import Any

import pytest

from nova_snowflock import exception
from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import process
from nova_snowflock.memtap import spec as process_spec
from nova_snowflock.memtap import wire
from tests import emulation
from tests.system import plane

PAGES = 2048
DATA = plane.content(PAGES)
NONZERO = plane.nonzero(DATA)
NOBODY = 65534
OWNER = 65533


@pytest.fixture
def image() -> Iterator[plane.Loopback]:
    with plane.loopback() as made:
        yield made


@contextlib.contextmanager
def background(function: Any, *arguments: Any) -> Iterator[concurrent.futures.Future[Any]]:
    """Call it in a thread that is waited for."""
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        yield executor.submit(function, *arguments)


def group(image: plane.Loopback) -> str:
    """A multicast group that no other test uses at the same time."""
    number = int(image.image[:4], 16)
    return f"239.77.{number >> 8}.{number & 255}:{20000 + number % 10000}"


# Reading


def test_lazy(image: plane.Loopback) -> None:
    image.serve(DATA)
    memtap = image.tap(population="lazy")
    start = plane.wait_for(memtap, state="attached")
    assert start["pages"] == {"resident": 0, "zero": PAGES - NONZERO, "missing": NONZERO}
    assert plane.read(image.path(), 5 * PAGE_SIZE, 100) == DATA[5 * PAGE_SIZE :][:100]
    after = plane.status(memtap)
    assert 1 <= after["pages"]["resident"] <= 32
    assert after["faults"] == sum(after["fault_latency"]["counts"]) == 1
    assert plane.mapped(image.path()) == DATA
    end = plane.wait_for(memtap, state="detached")
    assert end["pages"] == {"resident": NONZERO, "zero": PAGES - NONZERO, "missing": 0}
    assert end["waiting"] == end["outstanding"] == 0
    assert end["rejected"] == end["replayed"] == end["malformed"] == end["stale"] == 0


@pytest.mark.parametrize("population", ["background", "eager"])
def test_populates(image: plane.Loopback, population: str) -> None:
    image.serve(DATA)
    memtap = image.tap(population=population)
    done = plane.wait_for(memtap, state="detached")
    assert done["pages"] == {"resident": NONZERO, "zero": PAGES - NONZERO, "missing": 0}
    plane.until(lambda: plane.status(image.server)["memtaps"] == [], "the good-bye")
    plane.stop(image.server)
    assert plane.mapped(image.path()) == DATA
    assert plane.read(image.path(), 0, len(DATA)) == DATA
    assert plane.status(memtap)["state"] == "detached"


def test_lazy_until_told_otherwise(image: plane.Loopback) -> None:
    image.serve(DATA)
    memtap = image.tap(population="lazy")
    plane.wait_for(memtap, state="attached")
    assert plane.client(memtap).detach()["missing"] == NONZERO
    plane.wait_for(memtap, state="detached", pages__missing=0)
    assert plane.client(memtap).detach() == {"state": "detached", "missing": 0}


def test_zero_pages_are_not_requested(image: plane.Loopback) -> None:
    image.serve(DATA)
    memtap = image.tap(population="lazy")
    plane.wait_for(memtap, state="attached")
    for first in range(plane.ZERO_PERIOD * 3 // 4, PAGES, plane.ZERO_PERIOD):
        size = plane.ZERO_PERIOD // 4 * PAGE_SIZE
        assert plane.read(image.path(), first * PAGE_SIZE, size) == bytes(size)
    assert plane.status(memtap)["faults"] == 0
    server = plane.status(image.server)
    assert server["fault_requests"] == server["pages_unicast"] == server["pages_zero"] == 0
    assert plane.mapped(image.path()) == DATA
    assert plane.status(image.server)["pages_zero"] == 0


def test_pages_that_turn_out_to_be_zero(image: plane.Loopback) -> None:
    """The map says they have content; the server sees that they have not, and says so."""
    path = image.directory / "file"
    path.write_bytes(bytes(64 * PAGE_SIZE) + DATA[: 64 * PAGE_SIZE])
    spec = process_spec.ServerSpec(image.image, image.key, image.server, "127.0.0.1:0")
    image.descriptor = plane.serve(spec, [str(path)])
    memtap = image.tap(population="lazy")
    assert plane.mapped(image.path()) == path.read_bytes()
    assert plane.wait_for(memtap, state="detached")["pages"]["zero"] >= 64
    assert plane.status(image.server)["pages_zero"] >= 64


def test_an_image_without_content(image: plane.Loopback) -> None:
    image.serve(bytes(100 * PAGE_SIZE))
    memtap = image.tap()
    plane.wait_for(memtap, state="detached")
    assert plane.mapped(image.path()) == bytes(100 * PAGE_SIZE)


def test_several_files_of_odd_sizes(image: plane.Loopback) -> None:
    contents = [plane.content(300, 1)[:-1], plane.content(200, 2)[: 100 * PAGE_SIZE + 1], b"x"]
    image.serve(*contents)
    memtap = image.tap(population="background")
    for number, data in enumerate(contents, 1):
        assert plane.mapped(image.path(number)) == data
        assert plane.read(image.path(number), len(data) - 1, 10) == data[-1:]
        assert plane.read(image.path(number), len(data), 10) == b""
    status = plane.wait_for(memtap, state="detached")
    assert {name: file["size"] for name, file in status["files"].items()} == {
        f"file{number}": len(data) for number, data in enumerate(contents, 1)
    }
    assert (image.directory / "memtap/mount/descriptor").read_bytes() == image.descriptor


def test_files_by_hand(image: plane.Loopback) -> None:
    """The descriptor is file 0 and is served like any other."""
    contents = plane.content(200, 1), plane.content(100, 2)
    status = image.serve(*contents, mtu=9000)
    client = plane.Client(image.key, status["servers"][0])
    client.attach()
    for number, data in enumerate((image.descriptor, *contents)):
        pages = -(-len(data) // PAGE_SIZE)
        assert client.fetch(number, pages) == data.ljust(pages * PAGE_SIZE, b"\0")
    client.close()


@pytest.mark.parametrize("mtu", [1280, 1500, 9000, 65535])
def test_every_mtu(image: plane.Loopback, mtu: int) -> None:
    image.serve(DATA, mtu=mtu)
    memtap = image.tap(population="eager")
    plane.wait_for(memtap, state="detached")
    assert plane.mapped(image.path()) == DATA


@pytest.mark.parametrize("read_around", [4096, 16384, 131072])
def test_read_around(image: plane.Loopback, read_around: int) -> None:
    image.serve(DATA)
    memtap = image.tap(read_around=read_around)
    with (
        open(image.path(), "r+b") as file,
        mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as memory,
    ):
        page = memory[PAGE_SIZE * 1024 : PAGE_SIZE * 1025]
    assert page == DATA[PAGE_SIZE * 1024 : PAGE_SIZE * 1025]
    assert 1 <= plane.status(memtap)["pages"]["resident"] <= read_around // PAGE_SIZE + 1


def test_ipv6(image: plane.Loopback) -> None:
    image.serve(DATA, address="[::1]:0")
    memtap = image.tap(address="::1", population="eager")
    plane.wait_for(memtap, state="detached")
    assert plane.mapped(image.path()) == DATA


def read_at_random(path: str, seed: int) -> bool:
    chosen = random.Random(seed)
    with (
        open(path, "r+b") as file,
        mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as memory,
    ):
        if seed % 2:
            memory.madvise(mmap.MADV_RANDOM)
        for page in chosen.sample(range(PAGES), PAGES // 2):
            place = slice(page * PAGE_SIZE, (page + 1) * PAGE_SIZE)
            if memory[place] != DATA[place]:
                return False
    return True


@pytest.mark.parametrize("population", ["lazy", "eager"])
def test_many_readers(image: plane.Loopback, population: str) -> None:
    image.serve(DATA)
    image.tap(population=population)
    with concurrent.futures.ThreadPoolExecutor(16) as executor:
        right = list(executor.map(functools.partial(read_at_random, image.path()), range(16)))
    assert all(right)


# The mount


def test_what_the_mount_shows(image: plane.Loopback) -> None:
    image.serve(DATA)
    image.tap()
    mount = image.directory / "memtap/mount"
    assert sorted(os.listdir(mount)) == ["descriptor", "file1"]
    shown = os.stat(mount / "file1")
    assert stat.S_ISREG(shown.st_mode)
    assert (shown.st_size, shown.st_blksize) == (len(DATA), PAGE_SIZE)
    assert os.statvfs(mount).f_bsize == PAGE_SIZE
    with pytest.raises(FileNotFoundError):
        os.stat(mount / "file2")
    with pytest.raises(NotADirectoryError):
        os.stat(mount / "file1/file1")
    subprocess.run(["ls", "-la", mount], check=True, stdout=subprocess.DEVNULL)


def refusal(call: Any, *arguments: Any) -> int | None:
    """The error number that a call is refused with."""
    try:
        call(*arguments)
    except OSError as error:
        return error.errno
    return None


def test_nothing_can_be_changed(image: plane.Loopback) -> None:
    image.serve(DATA)
    image.tap()
    path, mount = image.path(), image.directory / "memtap/mount"
    fd = os.open(path, os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, as QEMU discards memory
    offsets = ctypes.c_long(0), ctypes.c_long(PAGE_SIZE)
    assert libc.fallocate(fd, 3, *offsets) == -1
    assert ctypes.get_errno() == errno.EOPNOTSUPP
    assert refusal(os.pwrite, fd, b"x", 0) == errno.EROFS
    assert refusal(os.ftruncate, fd, 0) == errno.EROFS
    assert refusal(os.truncate, path, len(DATA) + 1) == errno.EROFS
    assert refusal(os.open, path, os.O_RDWR | os.O_TRUNC) == errno.EROFS
    assert refusal(os.open, mount / "new", os.O_RDWR | os.O_CREAT) == errno.EROFS
    assert refusal(os.unlink, path) == errno.EROFS
    assert refusal(os.rename, path, mount / "new") == errno.EROFS
    assert refusal(os.link, path, mount / "new") == errno.EROFS
    assert refusal(os.symlink, path, mount / "new") == errno.EROFS
    assert refusal(os.mkdir, mount / "new") == errno.EROFS
    assert refusal(os.mkfifo, mount / "new") == errno.EROFS
    assert refusal(os.chmod, path, 0o777) == errno.EROFS
    assert refusal(os.chown, path, 1, 1) == errno.EROFS
    assert refusal(os.utime, path) == errno.EROFS
    assert refusal(os.setxattr, path, "user.x", b"x") in (errno.EROFS, errno.EOPNOTSUPP)
    os.fsync(fd)
    os.close(fd)
    assert plane.mapped(path) == DATA


def test_writes_do_not_reach_other_clones(image: plane.Loopback) -> None:
    image.serve(DATA)
    image.tap()
    with open(image.path(), "r+b", buffering=0) as file:
        with mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as clone:
            assert clone[:] == DATA
            with mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as other:
                other[:10] = bytes(10)
                other[100 * PAGE_SIZE : 101 * PAGE_SIZE] = bytes(PAGE_SIZE)
                for size in (1, 100, PAGE_SIZE, 3 * PAGE_SIZE):
                    assert refusal(os.pwrite, file.fileno(), bytes(size), PAGE_SIZE) == errno.EROFS
                assert refusal(mmap.mmap, file.fileno(), 0) == errno.ENODEV
                assert clone[:] == DATA
        assert plane.mapped(image.path()) == DATA


def open_as(uid: int, path: str) -> int:
    """The error number that somebody gets who opens the file."""
    child = os.fork()
    if not child:
        code = 255
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            code = refusal(os.open, path, os.O_RDWR) or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_only_the_owner_may_open(image: plane.Loopback) -> None:
    image.serve(DATA)
    memtap = image.tap(owner=(OWNER, OWNER))
    assert open_as(OWNER, image.path()) == 0
    assert open_as(NOBODY, image.path()) == errno.EACCES
    os.chmod(memtap, 0o755)  # the files themselves are closed to others, too
    assert open_as(NOBODY, image.path()) == errno.EACCES
    os.chmod(memtap, 0o710)


READERS = {
    "read": "os.pread(fd, 10, 0)",
    "random": "m = mmap.mmap(fd, 0, prot=1, flags=2); m.madvise(mmap.MADV_RANDOM); m[0]",
    "mapped": "m = mmap.mmap(fd, 0, prot=1, flags=2); m[0]",
}


def start_reader(kind: str, path: str) -> subprocess.Popen[bytes]:
    """A process that reads the first page and ends with its first byte."""
    *before, last = READERS[kind].split("; ")
    code = "\n".join(
        [
            "import mmap, os, signal",
            "signal.signal(signal.SIGUSR1, lambda *_: None)",
            f"fd = os.open({path!r}, os.O_RDWR)",
            *before,
            f"value = {last}",
            "os._exit(value if isinstance(value, int) else value[0])",
        ]
    )
    return subprocess.Popen([sys.executable, "-c", code])


@pytest.mark.parametrize("kind", READERS)
def test_killed_reader(image: plane.Loopback, kind: str) -> None:
    image.serve(DATA)
    memtap = image.tap()
    plane.wait_for(memtap, state="attached")
    address = image.kill_server()
    reader = start_reader(kind, image.path())
    plane.until(lambda: plane.status(memtap)["waiting"], "the reader to wait")
    reader.kill()
    assert reader.wait(plane.DEADLINE) == -signal.SIGKILL
    image.serve(DATA, address=address)
    assert plane.mapped(image.path()) == DATA
    assert plane.wait_for(memtap, waiting=0)["outstanding"] == 0


@pytest.mark.parametrize("kind", READERS)
def test_a_signal_does_not_break_a_read(image: plane.Loopback, kind: str) -> None:
    image.serve(DATA)
    memtap = image.tap()
    plane.wait_for(memtap, state="attached")
    address = image.kill_server()
    reader = start_reader(kind, image.path())
    plane.until(lambda: plane.status(memtap)["waiting"], "the reader to wait")
    for _ in range(3):
        reader.send_signal(signal.SIGUSR1)
        plane.status(memtap)
    image.serve(DATA, address=address)
    assert reader.wait(plane.DEADLINE) == DATA[0]


# Several memtaps


def test_lockstep(image: plane.Loopback) -> None:
    status = image.serve(DATA, group=group(image), mtu=9000)
    clients = [plane.Client(image.key, status["servers"][0]) for _ in range(2)]
    for client in clients:
        client.attach()
        client.send(client.request([], wire.BACKGROUND))
    plane.until(lambda: len(plane.status(image.server)["memtaps"]) == 2, "two memtaps")

    def ask() -> int:
        before = plane.status(image.server)["requests"]
        for client in clients:
            client.send(client.request([wire.Run(1, 0, 8)]))
        plane.until(
            lambda: plane.status(image.server)["requests"] == before + 2, "both requests"
        )
        lockstep: int = plane.status(image.server)["pages_lockstep"]
        return lockstep

    # How soon one comes after the other is not in the test's hands.
    assert plane.until(ask, "two requests at the same time") % 8 == 0
    after = plane.status(image.server)
    assert after["pages_multicast"] + after["pages_lockstep"] == 8 * after["fault_requests"]
    assert after["pages_unicast"] == 0
    # A repair goes to who asks, and at once.
    assert clients[1].fetch(1, 8) == DATA[: 8 * PAGE_SIZE]
    assert plane.status(image.server)["pages_unicast"] == 8
    for client in clients:
        client.close()


def test_pages_that_another_asked_for(image: plane.Loopback) -> None:
    image.serve(DATA, group=group(image))
    one, two = image.tap("one"), image.tap("two")
    plane.until(lambda: len(plane.status(image.server)["memtaps"]) == 2, "two memtaps")
    assert plane.mapped(image.path(name="one")) == DATA
    heard = plane.status(two)
    assert heard["fault_requests"] == heard["background_requests"] == 0
    assert heard["pages"]["resident"] > NONZERO * 0.9
    assert heard["bytes_multicast"] > NONZERO * PAGE_SIZE * 0.9
    assert plane.mapped(image.path(name="two")) == DATA
    plane.wait_for(one, state="detached")
    plane.wait_for(two, state="detached")
