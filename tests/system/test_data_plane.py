# SPDX-License-Identifier: Apache-2.0
"""The data plane as real processes: a memory server, memtaps, and readers of their mounts."""

import base64
from collections.abc import Callable, Iterator
import concurrent.futures
import contextlib
import ctypes
import errno
import functools
import hashlib
import json
import mmap
import multiprocessing
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
from tests.system import lossy
from tests.system import plane

PAGES = 2048
DATA = plane.content(PAGES)
NONZERO = plane.nonzero(DATA)
NOBODY = 65534
OWNER = 65533
READERS_GROUP = OWNER - 1


@pytest.fixture
def image() -> Iterator[plane.Loopback]:
    with plane.loopback() as made:
        yield made


class Mapped:
    """A process that reads all of a file as a clone does; a thread would stop this one too."""

    def __init__(self, path: str) -> None:
        code = "import sys; from tests.system import plane; print(plane.digest_mapped(sys.argv[1]))"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, path],
            stdout=subprocess.PIPE,
            text=True,
            cwd=pathlib.Path(__file__).parents[2],
        )

    def waits(self) -> bool:
        return self._process.poll() is None

    def has_read(self, data: bytes) -> bool:
        """Wait for its end; whether it saw this."""
        seen, _ = self._process.communicate(timeout=plane.DEADLINE)
        return seen.strip() == hashlib.sha256(data).hexdigest()


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
    assert plane.detach(memtap)["missing"] == NONZERO
    plane.wait_for(memtap, state="detached", pages__missing=0)
    assert plane.detach(memtap) == {"state": "detached", "missing": 0}


def test_eager_once_told_so(image: plane.Loopback) -> None:
    image.serve(DATA)
    memtap = image.tap(population="background")
    with pytest.raises(exception.ControlError, match="fast"):
        plane.detach(memtap, population="fast")
    plane.detach(memtap, population="eager")
    plane.wait_for(memtap, state="detached", population="eager", pages__missing=0)
    plane.detach(memtap)
    assert plane.status(memtap)["population"] == "eager"


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
    with multiprocessing.get_context("fork").Pool(16) as pool:
        assert all(pool.map(functools.partial(read_at_random, image.path()), range(16)))


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


def write(path: str) -> None:
    with open(path, "r+b", buffering=0) as file:
        for size in (1, 100, PAGE_SIZE, 3 * PAGE_SIZE):
            with contextlib.suppress(OSError):
                os.pwrite(file.fileno(), bytes(size), PAGE_SIZE)


def send_file(path: str) -> None:
    with open(path, "r+b", buffering=0) as file, open("/etc/passwd", "rb") as source:
        os.sendfile(file.fileno(), source.fileno(), 0, 100)


def write_to_shared_mapping(path: str) -> None:
    with (
        open(path, "r+b", buffering=0) as file,
        mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED) as memory,
    ):
        memory[: 3 * PAGE_SIZE] = bytes(3 * PAGE_SIZE)


def write_to_private_mapping(path: str) -> None:
    with (
        open(path, "r+b", buffering=0) as file,
        mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as memory,
    ):
        memory[: 3 * PAGE_SIZE] = bytes(3 * PAGE_SIZE)


@pytest.mark.parametrize(
    "harm",
    [
        write,
        send_file,
        pytest.param(
            write_to_shared_mapping,
            marks=pytest.mark.xfail(
                reason="QEMU before 8.2 opens its memory for writing, and Linux asks no FUSE "
                "server about stores to a shared mapping; direct I/O would keep them out, but "
                "makes each new clone wait for its siblings' faults"
            ),
        ),
        write_to_private_mapping,
    ],
)
def test_writes_do_not_reach_other_clones(
    image: plane.Loopback, harm: Callable[[str], None]
) -> None:
    """Whatever a hypervisor does to its memory that its guest has taken over."""
    image.serve(DATA)
    image.tap(owner=(OWNER, OWNER))
    with (
        open(image.path(), "r+b", buffering=0) as file,
        mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE) as clone,
    ):
        assert clone[:] == DATA
        run_as(OWNER, lambda: refusal(harm, image.path()))
        assert clone[:] == DATA
    assert plane.mapped(image.path()) == DATA


def run_as(uid: int, function: Callable[[], int | None]) -> int:
    """Call it as another user; what it returned, at most 254."""
    child = os.fork()
    if not child:
        code = 255
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            code = function() or 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def open_as(uid: int, path: str, flags: int = os.O_RDWR) -> int:
    """The error number that somebody gets who opens the file."""
    return run_as(uid, lambda: refusal(os.open, path, flags))


def test_only_the_owner_may_open(image: plane.Loopback) -> None:
    image.serve(DATA, DATA)
    image.tap(owner=(OWNER, READERS_GROUP))
    memory, layer = image.path(), image.path(2)
    assert open_as(OWNER, memory) == 0
    assert open_as(OWNER, layer, os.O_RDONLY) == 0
    # Nova reads disks, never memory.
    assert open_as(READERS_GROUP, layer, os.O_RDONLY) == 0
    assert open_as(READERS_GROUP, layer) == errno.EACCES
    assert open_as(READERS_GROUP, memory, os.O_RDONLY) == errno.EACCES
    for path in (memory, layer):
        assert open_as(NOBODY, path, os.O_RDONLY) == errno.EACCES


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
        plane.until(lambda: plane.status(image.server)["requests"] == before + 2, "both requests")
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


# Over a network


SHARED = "/run/snowflock-test"


@contextlib.contextmanager
def family(hosts: list[emulation.Host], data: bytes, multicast: bool) -> Iterator[plane.Loopback]:
    """A server on the first host, and a memtap on each that fetches nothing of itself."""
    image = plane.Loopback(pathlib.Path(SHARED))
    server = process_spec.ServerSpec(
        image.image,
        image.key,
        image.server,
        f"{hosts[0].address}:0",
        group(image) if multicast else None,
        interface="eth0",
    )
    try:
        for host in hosts:
            host.run(os.makedirs, SHARED)
            host.run(os.chmod, SHARED, 0o711)
        hosts[0].run(plane.write_sparse, f"{SHARED}/file", data)
        image.descriptor = hosts[0].run(plane.serve, server, [f"{SHARED}/file"])
        for host in hosts:
            spec = image.spec(address=host.address, interface="eth0", background_rate=1e9)
            host.run(plane.tap, spec)
        plane.until(
            lambda: len(hosts[0].run(plane.status, image.server)["memtaps"]) == len(hosts),
            "every memtap to greet",
        )
        yield image
    finally:
        for host in hosts:
            host.run(plane.remove, SHARED)


@pytest.mark.parametrize("multicast", [True, False], ids=["multicast", "unicast"])
def test_fills_together(hosts: list[emulation.Host], multicast: bool) -> None:
    data = plane.content(8192, seed=5)
    size = plane.nonzero(data) * PAGE_SIZE
    with family(hosts, data, multicast) as image:
        memtap = image.spec().run_directory
        for host in hosts:
            host.run(plane.detach, memtap)
        with concurrent.futures.ThreadPoolExecutor() as executor:
            ends = [
                executor.submit(host.run, plane.wait_for, memtap, state="detached")
                for host in hosts
            ]
            statuses = [end.result() for end in ends]
        for status in statuses:
            assert status["pages"]["missing"] == 0
        for host in hosts:
            assert host.run(plane.mapped, image.path()) == data
        server = hosts[0].run(plane.status, image.server)
        sent = server["bytes_multicast"] + server["bytes_unicast"]
        if multicast:
            assert size <= sent <= 1.3 * size
        else:
            assert server["bytes_multicast"] == 0
            # On a busy machine some is asked for again while it is on its way.
            sent -= sum(status["bytes_repeated"] for status in statuses)
            assert 3 * size <= sent <= 1.3 * 3 * size


def route_mtu(mtu: int | None) -> None:
    """Make the host's path to the others narrower than its interface says, or as it was."""
    route = ["ip", "route", "change", "10.77.0.0/24", "dev", "eth0"]
    subprocess.run([*route, *(["mtu", str(mtu)] if mtu else [])], check=True)


def test_path_with_smaller_mtu(hosts: list[emulation.Host]) -> None:
    data = plane.content(512, seed=6)
    try:
        with family(hosts[:2], data, multicast=False) as image:
            assert hosts[1].run(plane.read, image.path(), 0, PAGE_SIZE) == data[:PAGE_SIZE]
            hosts[0].run(route_mtu, 1000)
            assert hosts[1].run(plane.mapped, image.path()) == data
            assert hosts[0].run(plane.status, image.server)["state"] == "serving"
    finally:
        hosts[0].run(route_mtu, None)


@pytest.mark.parametrize("multicast", [True, False], ids=["multicast", "unicast"])
@pytest.mark.parametrize("population", ["lazy", "background", "eager"])
@pytest.mark.parametrize("loss", [0.01, 0.1])
def test_loss(image: plane.Loopback, loss: float, population: str, multicast: bool) -> None:
    image.serve(DATA, group=group(image) if multicast else None)
    specs = [image.spec(name, population=population) for name in ("one", "two")]
    for spec in specs:
        lossy.start(spec, loss)
    for spec in specs:
        name = os.path.basename(spec.run_directory)
        assert Mapped(image.path(name=name)).has_read(DATA)
        status = plane.wait_for(spec.run_directory, state="detached")
        assert status["pages"] == {"resident": NONZERO, "zero": PAGES - NONZERO, "missing": 0}
    assert plane.status(specs[0].run_directory)["repeated_requests"]


# What breaks


@pytest.mark.parametrize("population", ["lazy", "background"])
def test_server_that_is_killed(image: plane.Loopback, population: str) -> None:
    image.serve(DATA)
    memtap = image.tap(population=population, stall_after=0.3, background_rate=5e6)
    plane.wait_for(memtap, state="attached")
    assert plane.read(image.path(), 0, PAGE_SIZE) == DATA[:PAGE_SIZE]
    address = image.kill_server()
    reader = Mapped(image.path())
    plane.wait_for(memtap, state="stalled")
    plane.until(lambda: plane.status(memtap)["waiting"], "the reader to wait")
    assert plane.status(memtap)["pages"]["missing"]
    assert reader.waits()
    assert "no memory server has answered" in plane.log(memtap)
    assert address in plane.log(memtap)
    # What is here already can be read all the time.
    assert plane.read(image.path(), 0, PAGE_SIZE) == DATA[:PAGE_SIZE]
    image.serve(DATA, address=address)
    assert reader.has_read(DATA)
    plane.wait_for(memtap, state="detached")
    assert plane.log(memtap).count("no memory server has answered") == 1


def test_server_that_is_killed_while_nobody_waits(image: plane.Loopback) -> None:
    image.serve(DATA)
    memtap = image.tap(stall_after=0.3)
    plane.wait_for(memtap, state="attached")
    address = image.kill_server()
    image.serve(DATA, address=address)
    assert plane.mapped(image.path()) == DATA
    plane.wait_for(memtap, state="detached")


def test_memtap_before_its_server(image: plane.Loopback) -> None:
    address = image.serve(DATA)["servers"][0]
    image.kill_server()
    memtap = image.tap(stall_after=0.3)
    reader = Mapped(image.path())
    plane.wait_for(memtap, state="stalled")
    image.serve(DATA, address=address)
    assert reader.has_read(DATA)


def test_source_that_is_lost(image: plane.Loopback) -> None:
    image.serve(DATA)
    memtap = image.tap(stall_after=0.3)
    plane.wait_for(memtap, state="attached")
    os.truncate(image.directory / "file1", PAGE_SIZE)
    reader = start_reader("mapped", image.path())
    status = plane.wait_for(image.server, state="lost")
    assert "cut short" in status["reason"]
    assert "cut short" in plane.log(image.server)
    assert reader.poll() is None
    reader.kill()
    reader.wait(plane.DEADLINE)


def test_memtap_that_is_killed(image: plane.Loopback) -> None:
    image.serve(DATA)
    one, two = image.tap("one"), image.tap("two")
    for memtap in (one, two):
        plane.wait_for(memtap, state="attached")
    with open(image.path(name="one"), "r+b", buffering=0) as file:
        plane.kill(one)
        assert refusal(os.pread, file.fileno(), 10, 0) in (errno.ENOTCONN, errno.ECONNABORTED)
    assert refusal(os.stat, image.path(name="one")) == errno.ENOTCONN
    assert plane.mapped(image.path(name="two")) == DATA
    assert plane.status(image.server)["state"] == "serving"
    process.stop_memtap(one)
    assert os.listdir(one) == ["memtap.lock"]
    assert mounts(image) == [f"{two}/mount"]


@pytest.mark.parametrize("kind", READERS)
def test_reader_of_a_memtap_that_is_killed(image: plane.Loopback, kind: str) -> None:
    image.serve(DATA)
    memtap = image.tap()
    plane.wait_for(memtap, state="attached")
    image.kill_server()
    reader = start_reader(kind, image.path())
    plane.until(lambda: plane.status(memtap)["waiting"], "the reader to wait")
    plane.kill(memtap)
    assert reader.wait(plane.DEADLINE) == (1 if kind == "read" else -signal.SIGBUS)


def test_memtap_that_is_started_again(image: plane.Loopback) -> None:
    image.serve(DATA)
    memtap = image.tap(population="eager")
    plane.wait_for(memtap, state="detached")
    plane.kill(memtap)
    image.tap(population="eager")
    plane.wait_for(memtap, state="detached")
    assert plane.mapped(image.path()) == DATA
    assert mounts(image) == [f"{memtap}/mount"]


@contextlib.contextmanager
def small_disk(directory: pathlib.Path, size: str) -> Iterator[str]:
    path = str(directory / "disk.mounted")
    os.mkdir(path)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], check=True)
    try:
        yield path
    finally:
        process.stop_memtap(str(directory / "memtap"))
        subprocess.run(["umount", path], check=True)
        os.rmdir(path)


@pytest.mark.parametrize("population", ["lazy", "eager"])
def test_full_disk(image: plane.Loopback, population: str) -> None:
    image.serve(DATA)
    with small_disk(image.directory, "1m") as disk:
        memtap = image.tap(population=population, store_directory=disk)
        reader = Mapped(image.path())
        full = plane.wait_for(memtap, state="store-full")
        assert "No space left" in full["reason"]
        assert full["pages"]["missing"]
        assert reader.waits()
        assert "No space left" in plane.log(memtap)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert reader.has_read(DATA)
        done = plane.wait_for(memtap, state="detached")
        assert done["reason"] is None
        assert "can be written again" in plane.log(memtap)


# The processes


def mounts(image: plane.Loopback) -> list[str]:
    """Where anything is mounted below the image's directory."""
    lines = pathlib.Path("/proc/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[1].startswith(str(image.directory))]


def contains_key(data: bytes, key: bytes) -> bool:
    return any(form in data for form in (key, key.hex().encode(), base64.b64encode(key)))


def test_the_key_is_nowhere(image: plane.Loopback) -> None:
    image.serve(DATA)
    memtap = image.tap(population="eager")
    plane.wait_for(memtap, state="detached")
    assert not contains_key(image.descriptor, image.key)
    for directory in (image.server, memtap):
        pid = plane.client(directory).peer()
        for name in ("cmdline", "environ"):
            assert not contains_key(pathlib.Path(f"/proc/{pid}/{name}").read_bytes(), image.key)
        assert not contains_key(json.dumps(plane.status(directory)).encode(), image.key)
        for path in pathlib.Path(directory).iterdir():
            if path.is_file():
                assert not contains_key(path.read_bytes(), image.key)


def test_privileges_are_dropped(image: plane.Loopback) -> None:
    image.serve(DATA)
    memtap = image.tap()
    for directory in (image.server, memtap):
        pid = plane.client(directory).peer()
        lines = pathlib.Path(f"/proc/{pid}/status").read_text().splitlines()
        fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
        assert fields["Uid"].split() == [str(NOBODY)] * 4
        assert fields["Gid"].split() == [str(NOBODY)] * 4
        assert fields["Groups"].split() == []
        assert fields["NoNewPrivs"] == "1"
        for capabilities in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
            assert int(fields[capabilities], 16) == 0
        # Not dumpable: whoever is nobody cannot look into it.
        assert os.stat(f"/proc/{pid}/environ").st_uid == 0
        open_files = []
        for path in pathlib.Path(f"/proc/{pid}/fd").iterdir():
            # It may just be letting go of the connection that was asked for its PID.
            with contextlib.suppress(FileNotFoundError):
                open_files.append(os.readlink(path))
        assert not [path for path in open_files if path.startswith("/dev/pts")]


def test_run_directories_are_closed(image: plane.Loopback) -> None:
    image.serve(DATA)
    memtap = image.tap(owner=(OWNER, OWNER))
    assert stat.S_IMODE(os.stat(image.server).st_mode) == 0o700
    shown = os.stat(memtap)
    assert (stat.S_IMODE(shown.st_mode), shown.st_uid, shown.st_gid) == (0o711, 0, 0)
    for directory in (image.server, memtap):
        for path in pathlib.Path(directory).iterdir():
            if not path.is_dir():
                shown = path.stat()
                assert stat.S_IMODE(shown.st_mode) == 0o600
                assert shown.st_uid == 0
    # Neither can whoever owns the image's files reach the control socket.
    assert open_as(OWNER, f"{memtap}/memtap.log") == errno.EACCES


def ended(pid: int) -> bool:
    """Whether a process is gone, or would be had its parent looked."""
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return fields[0] in "ZX"


def sockets(address: str) -> int:
    """How many UDP sockets are bound to that port."""
    port = int(address.rpartition(":")[2])
    lines = pathlib.Path("/proc/net/udp").read_text().splitlines()[1:]
    return sum(int(line.split()[1].rpartition(":")[2], 16) == port for line in lines)


@pytest.mark.parametrize("population", ["lazy", "eager"])
def test_nothing_is_left(image: plane.Loopback, population: str) -> None:
    address = image.serve(DATA)["servers"][0]
    memtap = image.tap(population=population)
    if population == "eager":
        plane.wait_for(memtap, state="detached")
    pids = [plane.client(directory).peer() for directory in (image.server, memtap)]
    assert mounts(image) == [f"{memtap}/mount"]
    assert sockets(address) == 1
    for _ in range(2):
        process.stop_memtap(memtap)
        process.stop_memory_server(image.server)
        assert os.listdir(memtap) == ["memtap.lock"]
        assert os.listdir(image.server) == ["server.lock"]
        assert mounts(image) == []
        assert sockets(address) == 0
        for pid in pids:
            plane.until(functools.partial(ended, pid), f"process {pid} to be gone")
    assert process.find_memtap(memtap) is None
    assert process.find_memory_server(image.server) is None


def test_stop_with_a_reader_that_waits(image: plane.Loopback) -> None:
    image.serve(DATA)
    memtap = image.tap()
    plane.wait_for(memtap, state="attached")
    image.kill_server()
    reader = start_reader("random", image.path())
    plane.until(lambda: plane.status(memtap)["waiting"], "the reader to wait")
    process.stop_memtap(memtap)
    assert reader.wait(plane.DEADLINE) == -signal.SIGBUS
    assert mounts(image) == []


def test_every_status_field_is_documented(image: plane.Loopback) -> None:
    image.serve(DATA)
    documented = (pathlib.Path(__file__).parents[2] / "docs/control.rst").read_text()
    for directory in (image.server, image.tap()):
        for field in plane.status(directory):
            assert f"``{field}``" in documented


def test_they_are_found_again(image: plane.Loopback) -> None:
    image.serve(DATA)
    memtap = image.tap()
    found = process.find_memtap(memtap)
    assert found is not None
    assert found.peer() == found.status()["pid"]
    again = process.start_memtap(image.spec())
    assert again.peer() == found.peer()
    server = process.find_memory_server(image.server)
    assert server is not None
    assert server.status()["image"] == image.image


def test_started_by_two_at_once(image: plane.Loopback) -> None:
    image.serve(DATA)
    pids: list[int] = []
    threads = [
        threading.Thread(target=lambda: pids.append(process.start_memtap(image.spec()).peer()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(pids) == 4
    assert len(set(pids)) == 1
    assert mounts(image) == [f"{image.spec().run_directory}/mount"]


def test_signal_to_end(image: plane.Loopback) -> None:
    image.serve(DATA)
    memtap = image.tap()
    plane.until(lambda: plane.status(image.server)["memtaps"], "the greeting")
    pids = [plane.client(directory).peer() for directory in (memtap, image.server)]
    os.kill(pids[0], signal.SIGTERM)
    plane.until(lambda: plane.status(image.server)["memtaps"] == [], "the good-bye")
    os.kill(pids[1], signal.SIGTERM)
    for pid in pids:
        plane.until(functools.partial(ended, pid), f"process {pid} to end")
    for directory in (memtap, image.server):
        assert "Traceback" not in plane.log(directory)


def test_stop_command(image: plane.Loopback) -> None:
    image.serve(DATA)
    memtap = image.tap()
    for directory in (memtap, image.server):
        client = plane.client(directory)
        pid = client.peer()
        client.stop()
        plane.until(functools.partial(ended, pid), f"process {pid} to end")


def test_control_socket_is_for_root(image: plane.Loopback) -> None:
    image.serve(DATA)
    path = f"{image.server}/server.sock"
    os.chmod(image.server, 0o755)
    os.chmod(path, 0o666)
    code = "import sys; from nova_snowflock.memtap import control; sys.exit(control.main())"
    asked = subprocess.run(
        [
            *("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"),
            *(sys.executable, "-c", code, path, "stop"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert asked.returncode != 0
    assert asked.stdout == ""
    assert plane.status(image.server)["state"] == "serving"
    assert "refused" in plane.log(image.server)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"user": "no-such-user"}, "no-such-user"),
        ({"address": "10.99.99.99"}, "Cannot assign requested address"),
        ({"interface": "no-such0"}, "no interface"),
        ({"descriptor": b"something else"}, "magic is wrong"),
        ({"store_directory": "/proc"}, "not supported"),
    ],
)
def test_memtap_that_cannot_start(
    image: plane.Loopback, change: dict[str, Any], reason: str
) -> None:
    image.serve(DATA)
    with pytest.raises(exception.ControlError, match=reason) as raised:
        image.tap(**change)
    assert "Traceback" not in str(raised.value)
    assert os.listdir(image.directory / "memtap") == ["memtap.lock"]
    assert mounts(image) == []
    image.tap()
    assert plane.mapped(image.path()) == DATA


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"user": "no-such-user"}, "no-such-user"),
        ({"address": "10.99.99.99:0"}, "Cannot assign requested address"),
        ({"interface": "no-such0"}, "no interface"),
        ({"mtu": 576}, "below the minimum"),
    ],
)
def test_server_that_cannot_start(
    image: plane.Loopback, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(exception.ControlError, match=reason) as raised:
        image.serve(DATA, **change)
    assert "Traceback" not in str(raised.value)
    assert os.listdir(image.server) == ["server.lock"]
    image.serve(DATA)


def test_address_that_is_taken(image: plane.Loopback) -> None:
    address = image.serve(DATA)["servers"][0]
    other = process_spec.ServerSpec(image.image, image.key, str(image.directory / "other"), address)
    with pytest.raises(exception.ControlError, match="Address already in use"):
        process.start_memory_server(other)
    assert plane.status(image.server)["state"] == "serving"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({}, "files"),
        ({"files": [{}]}, "not described right"),
        ({"files": [{"number": 1, "name": "x", "kind": "file"}]}, "file 1"),
        ({"files": [{"number": 1, "name": "x", "kind": "other"}]}, "file 1"),
        ({"files": 5}, "not described right"),
        ({"files": [{"number": "x", "name": "x", "kind": "file"}]}, "x"),
    ],
)
def test_publish_that_is_refused(
    image: plane.Loopback, arguments: dict[str, Any], reason: str
) -> None:
    spec = process_spec.ServerSpec(image.image, image.key, image.server, "127.0.0.1:0")
    server = process.start_memory_server(spec)
    with pytest.raises(exception.ControlError, match=reason):
        server.call("publish", **arguments)
    with pytest.raises(exception.ControlError, match="after its files are published"):
        server.call("serve", descriptor="")
    assert server.status()["state"] == "prepared"
    # A mistake is no end: the same server takes the right files.
    image.serve(DATA)
    assert server.status()["state"] == "serving"
    with pytest.raises(exception.ControlError, match="published already"):
        server.call("publish", files=[])


def test_process_memory_is_served(image: plane.Loopback) -> None:
    size = 1024 * PAGE_SIZE
    memory = mmap.mmap(-1, 2 * size, flags=mmap.MAP_PRIVATE)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    content = DATA[: 2 * size - 64 * PAGE_SIZE]
    memory[64 * PAGE_SIZE :] = content
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    expected = content[size - 64 * PAGE_SIZE :] + bytes(64 * PAGE_SIZE)
    expected += content[: size - 64 * PAGE_SIZE]
    child = os.fork()
    if not child:
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    try:
        os.waitpid(child, os.WUNTRACED)
        spec = process_spec.ServerSpec(image.image, image.key, image.server, "127.0.0.1:0")
        server = process.start_memory_server(spec)
        fds = [os.open(f"/proc/{child}/{name}", os.O_RDONLY) for name in ("mem", "pagemap")]
        ranges = [[address + size, size], [address, size]]
        files = [{"number": 1, "name": "file1", "kind": "process", "ranges": ranges}]
        published = server.call("publish", fds=fds, files=files)
        for fd in fds:
            os.close(fd)
        assert published["files"][0]["content"] == 2 * 1024 - 64
        image.descriptor = plane.describe(image.image, published)
        server.call("serve", descriptor=base64.b64encode(image.descriptor).decode())
        memtap = image.tap()
        for page in (0, 1000, 1020, 1100):
            read = plane.read(image.path(), page * PAGE_SIZE, 8 * PAGE_SIZE)
            assert read == expected[page * PAGE_SIZE : (page + 8) * PAGE_SIZE]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    # What is here stays, the rest is gone with the process, and nobody reads anything else instead.
    assert plane.read(image.path(), 0, PAGE_SIZE) == expected[:PAGE_SIZE]
    other = Mapped(image.path())
    assert "ended" in plane.wait_for(image.server, state="lost")["reason"]
    assert other.waits()
    plane.stop(memtap)
    assert not other.has_read(expected)
