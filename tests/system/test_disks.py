# SPDX-License-Identifier: Apache-2.0
"""Forks of a guest with disks: what clones read, what they cost, and how layers come and go."""

from collections.abc import Iterator, Sequence
from concurrent import futures
import contextlib
import dataclasses
import hashlib
import mmap
import os
import pathlib
import random
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any
from unittest import mock
import uuid

import libvirt
import pytest

from demo import checks
from nova_snowflock import descriptor
from nova_snowflock import exception
from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.virt import hypervisor
from nova_snowflock.virt.disks import merge
from nova_snowflock.virt.disks import qcow2
from nova_snowflock.virt.qemu import disks
from nova_snowflock.virt.qemu import domain_xml
from nova_snowflock.virt.qemu import monitor
from tests import emulation
from tests import engine
from tests.guest import client as guest_client
from tests.guest import domain

INSTANCES = "/var/lib/libvirt/images/instances"
BASE = f"{INSTANCES}/_base/base"
SHARED = f"{INSTANCES}/_base/"
MIB = 1 << 20
BASE_SIZE = 16 * MIB
# By target device: format, size, and what it is based on.
DISKS = {
    "vda": ("qcow2", 32 * MIB, BASE),
    "vdb": ("raw", 8 * MIB, None),
    "vdc": ("qcow2", 16 * MIB, None),
}
NAMES = {"vda": "disk", "vdb": "disk.eph0", "vdc": "disk.swap"}
PARENT = f"{INSTANCES}/parent"
READERS = 65531
"""A group that nobody is in."""


def base_content() -> bytes:
    return random.Random("base").randbytes(BASE_SIZE)


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


@pytest.fixture(scope="module")
def engines(hosts: list[emulation.Host]) -> list[engine.Engine]:
    for host in hosts:
        domain.install_kernel(host)
        host.run(make_base)
    return [engine.Engine(host, population="lazy") for host in hosts]


@pytest.fixture(scope="module")
def parent(engines: list[engine.Engine]) -> Iterator[guest_client.GuestClient]:
    with booted(engines[0], "parent") as guest:
        yield guest


@pytest.fixture(autouse=True)
def nothing_remains(engines: list[engine.Engine]) -> Iterator[None]:
    before = [one.footprint() | one.host.run(instance_files) for one in engines]
    yield
    with contextlib.suppress(libvirt.libvirtError):  # not every test has that parent
        assert engines[0].collapse("parent")
    after = [one.footprint() | one.host.run(instance_files) for one in engines]
    assert [new - old for new, old in zip(after, before, strict=True)] == [set()] * 3


# What happens on a host


def make_base() -> None:
    if not os.path.exists(BASE):
        os.makedirs(os.path.dirname(BASE), mode=0o755)
        pathlib.Path(BASE).write_bytes(base_content())
        for path in (INSTANCES, os.path.dirname(BASE), BASE):
            os.chmod(path, 0o755)


def make_disks(name: str, targets: Sequence[str]) -> None:
    directory = f"{INSTANCES}/{name}"
    os.makedirs(directory)
    os.chmod(directory, 0o755)
    for target in targets:
        disk_format, size, base = DISKS[target]
        options = ["-b", base, "-F", "raw"] if base else []
        path = f"{directory}/{NAMES[target]}"
        qcow2.qemu_img("create", "-q", "-f", disk_format, *options, path, str(size))


def make_directory(name: str) -> None:
    os.makedirs(f"{INSTANCES}/{name}")
    os.chmod(f"{INSTANCES}/{name}", 0o755)


def remove_directory(name: str) -> None:
    shutil.rmtree(f"{INSTANCES}/{name}")


def instance_files() -> set[str]:
    return {str(path) for path in pathlib.Path(INSTANCES).rglob("*")}


def files_of(name: str) -> set[str]:
    return set(os.listdir(f"{INSTANCES}/{name}"))


def chain_of(name: str, target: str = "vda") -> list[str]:
    """The files of a disk from libvirt's format and the files' headers, checked against QEMU's."""
    found = engine.find_domain(name)
    (disk,) = (disk for disk in merge.disks_of(found) if disk.target == target)
    chain = disk.chain()
    if found.isActive():
        assert len(chain) == len(disk.indexes)
        known = {
            node["node-name"]: node["file"]
            for node in monitor.Monitor(found).command("query-named-block-nodes", {"flat": True})
        }
        assert [known[f"libvirt-{index}-storage"] for index in disk.indexes] == [
            layer.path for layer in chain
        ]
        assert not [node for node in known if node.startswith("snowflock")]
    return [layer.path for layer in chain]


@contextlib.contextmanager
def booted(
    home: engine.Engine,
    name: str,
    targets: Sequence[str] = tuple(DISKS),
    memory_mib: int = 256,
    driver: str = "",
    extra: str = "",
) -> Iterator[guest_client.GuestClient]:
    home.host.run(make_disks, name, targets)
    disks = "".join(
        f"<disk type='file'><driver name='qemu' type='{DISKS[target][0]}' {driver}/>"
        f"<source file='{INSTANCES}/{name}/{NAMES[target]}'/>"
        f"<target dev='{target}' bus='virtio'/></disk>"
        for target in targets
    )
    description = domain.xml(name, memory_mib, fill_mib=8)
    description = description.replace("<vcpu", "<iothreads>1</iothreads><vcpu")
    try:
        domain.start(home.host, description.replace("</devices>", f"{disks}{extra}</devices>"))
        with domain.client(home.host, name) as guest:
            guest.call("tick")
            yield guest
    finally:
        with contextlib.suppress(libvirt.libvirtError):
            domain.destroy(home.host, name)
        with contextlib.suppress(FileNotFoundError):
            home.host.run(remove_directory, name)


@contextlib.contextmanager
def forked(
    engines: list[engine.Engine], name: str = "parent", home: int = 0
) -> Iterator[engine.Image]:
    image = engines[home].fork(name, shared=SHARED)
    with released(engines, image):
        yield image


@contextlib.contextmanager
def released(engines: list[engine.Engine], image: engine.Image) -> Iterator[None]:
    try:
        yield
    finally:
        for one in engines:
            one.release(image.uuid)


def paths(name: str, targets: Sequence[str] = tuple(DISKS)) -> dict[str, str]:
    return {target: f"{INSTANCES}/{name}/{NAMES[target]}" for target in targets}


@contextlib.contextmanager
def spawned(
    home: engine.Engine, image: engine.Image, clone_id: int = 1, **options: Any
) -> Iterator[tuple[str, guest_client.GuestClient]]:
    name = f"clone{clone_id}-{secrets.token_hex(2)}"
    targets = [disk.target for disk in descriptor.Descriptor.decode(image.descriptor).disks]
    home.host.run(make_directory, name)
    try:
        own = {"disks": paths(name, targets), "bases": [BASE]}
        home.spawn(image, name, clone_id, **{**own, **options})
        try:
            with domain.client(home.host, name) as guest:
                yield name, guest
        finally:
            domain.destroy(home.host, name)
    finally:
        home.host.run(remove_directory, name)


def pattern(seed: int, length: int = MIB) -> str:
    """The digest of what :meth:`Workload.disk_write` writes with a seed."""
    source = random.Random(seed)
    return digest(b"".join(source.randbytes(MIB) for _ in range(length // MIB)))


def read(guest: guest_client.GuestClient, disk: str, offset: int, length: int = MIB) -> str:
    result: str = guest.call("disk_digest", disk=disk, offset=offset, length=length)["digest"]
    return result


def write(
    guest: guest_client.GuestClient, disk: str, offset: int, seed: int, length: int = MIB
) -> None:
    guest.call("disk_write", disk=disk, offset=offset, seed=seed, length=length)


def test_clones_have_the_disks_of_the_instant(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    for number, disk in enumerate(DISKS):
        write(parent, disk, MIB, number)
    memory = parent.call("digest")
    before = parent.call("tick")["tick"]
    with forked(engines) as image:
        history = parent.call("history")
        checks.count_is_unbroken("the parent", history)
        for number, disk in enumerate(DISKS):
            write(parent, disk, MIB, 10 + number)
            write(parent, disk, 3 * MIB, 20 + number)
        with spawned(engines[1], image, 1) as (_, first), spawned(engines[2], image, 2) as (_, two):
            for clone in (first, two):
                checks.clone_continues("clone", clone.call("history"), history)
                assert clone.call("digest") == memory
            for number, disk in enumerate(DISKS):
                write(first, disk, 2 * MIB, 30 + number)
                for clone in (first, two):
                    assert read(clone, disk, MIB) == pattern(number)
                assert read(two, disk, 2 * MIB) == read(parent, disk, 2 * MIB)
                assert read(first, disk, 2 * MIB) == pattern(30 + number)
                assert read(parent, disk, MIB) == pattern(10 + number)
                assert read(parent, disk, 3 * MIB) == pattern(20 + number)
            # What was never written comes from the base, which both have, or is zero.
            assert read(two, "vda", 8 * MIB) == digest(base_content()[8 * MIB : 9 * MIB])
            assert read(two, "vda", 20 * MIB) == read(two, "vdb", 5 * MIB) == digest(bytes(MIB))
            files = engines[1].memtap(image.uuid)["files"]
            layers = {f"{disk}-{number}" for disk in DISKS for number in range(2)}
            assert set(files) == {"memory", *layers}
            # The base was not copied: that takes 16 MiB.
            assert files["vda-1"]["resident"] * PAGE_SIZE < 3 * MIB
            assert files["vdb-1"]["zero"] * PAGE_SIZE > 6 * MIB
    assert before <= history[-1][0]
    assert engines[0].collapse("parent")
    for number, disk in enumerate(DISKS):
        assert len(engines[0].host.run(chain_of, "parent", disk)) == (2 if disk == "vda" else 1)
        assert read(parent, disk, MIB) == pattern(10 + number)
    assert engines[0].host.run(files_of, "parent") == set(NAMES.values())


def test_twenty_forks_leave_one_layer(engines: list[engine.Engine]) -> None:
    home = engines[0]
    targets = ("vda", "vdb")
    with booted(home, "mortal", targets) as parent:
        write(parent, "vda", MIB, 1)
        before = {disk: home.host.run(chain_of, "mortal", disk) for disk in targets}
        for number in range(20):
            with forked(engines, "mortal"):
                write(parent, "vda", 2 * MIB, number)
                write(parent, "vdb", number % 8 * MIB, number)
            if number % 7 == 3:
                assert home.collapse("mortal")
        assert len(home.host.run(chain_of, "mortal")) == 4
        assert home.collapse("mortal")
        assert {disk: home.host.run(chain_of, "mortal", disk) for disk in targets} == before
        assert home.host.run(files_of, "mortal") == {NAMES[disk] for disk in targets}
        assert read(parent, "vda", MIB) == pattern(1)
        assert read(parent, "vda", 2 * MIB) == pattern(19)
        assert read(parent, "vdb", 3 * MIB) == pattern(19)
        assert read(parent, "vdb", 4 * MIB) == pattern(12)
        assert home.collapse("mortal")
        # Its definition goes by the same files and formats.
        home.host.run(change_state, "mortal", "destroy")
        parent.close()
        home.host.run(change_state, "mortal", "create")
        with domain.client(home.host, "mortal") as guest:
            assert read(guest, "vda", 2 * MIB) == read(guest, "vdb", 3 * MIB) == pattern(19)


def test_guest_writes_all_the_time(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    """Layers come and go under a guest that never stops writing, and nothing of it is lost."""
    home = engines[0]
    written: dict[tuple[str, int], int] = {}
    ended = threading.Event()

    def keep_writing() -> None:
        source = random.Random(1)
        while not ended.is_set():
            disk, place = source.choice(list(DISKS)), source.randrange(8)
            seed = source.randrange(1 << 32)
            write(parent, disk, place * MIB, seed)
            written[disk, place] = seed

    with futures.ThreadPoolExecutor() as pool:
        writing = pool.submit(keep_writing)
        try:
            for number in range(8):
                with forked(engines) as image:
                    if number == 5:
                        with spawned(engines[1], image) as (_, clone):
                            clone.call("tick")
                if number % 3:
                    assert home.collapse("parent")
            assert home.collapse("parent")
        finally:
            ended.set()
        writing.result()
    assert len(written) > 10
    for (disk, place), seed in written.items():
        assert read(parent, disk, place * MIB) == pattern(seed), (disk, place)


RELOCATING = f"{INSTANCES}/relocating"


@contextlib.contextmanager
def pauses_before_reopening() -> Iterator[None]:
    """On a host: QEMU has opened a disk's file a second time, but writes by the first."""
    original = monitor.Monitor.command

    def command(qemu: monitor.Monitor, name: str, *arguments: Any, **options: Any) -> Any:
        if name == "blockdev-reopen":
            pathlib.Path(RELOCATING).touch()
            wait_until(lambda: not os.path.exists(RELOCATING))
        return original(qemu, name, *arguments, **options)

    with mock.patch.object(monitor.Monitor, "command", command):
        yield


def fork_with_pauses(options: engine.Options, name: str) -> engine.Image:
    with pauses_before_reopening():
        return engine._fork(options, name, str(uuid.uuid4()), secrets.token_bytes(32), SHARED)


def collapse_with_pauses(options: engine.Options, name: str) -> bool:
    with pauses_before_reopening():
        return engine._collapse(options, name)


def test_disk_that_grows_while_it_is_relocated(engines: list[engine.Engine]) -> None:
    """What is behind the end of a file, as it was when QEMU opened that, it takes for zeros."""
    home = engines[0]
    written = 0
    with booted(home, "mortal", ["vda"]) as parent, futures.ThreadPoolExecutor() as pool:
        relocating = home.host.path(RELOCATING)

        def write_in_pauses(running: futures.Future[Any]) -> Any:
            nonlocal written
            while not running.done():
                if relocating.exists():
                    write(parent, "vda", written * MIB, written)
                    written += 1
                    relocating.unlink()
            return running.result()

        for _ in range(2):
            forking = pool.submit(home.host.run, fork_with_pauses, home.options, "mortal")
            with released(engines, write_in_pauses(forking)):
                pass
            merging = pool.submit(home.host.run, collapse_with_pauses, home.options, "mortal")
            assert write_in_pauses(merging)
        assert written == 8
        for number in range(written):
            assert read(parent, "vda", number * MIB) == pattern(number), number


SWITCHED = f"{INSTANCES}/switched"


def fork_while_it_writes(options: engine.Options, name: str) -> engine.Image:
    """Between the switch of its disks and its stop, the guest writes."""
    original = disks.DiskFork.switch

    def switch(fork: disks.DiskFork) -> None:
        original(fork)
        pathlib.Path(SWITCHED).touch()
        wait_until(lambda: any(allocated(path) > 2 * MIB for path in paths(name).values()))
        os.unlink(SWITCHED)

    image, key = str(uuid.uuid4()), secrets.token_bytes(32)
    with mock.patch.object(disks.DiskFork, "switch", switch):
        return engine._fork(options, name, image, key, SHARED)


def allocated(path: str) -> int:
    return os.stat(path).st_blocks * 512


def tip(image: str, target: str) -> tuple[int, os.stat_result]:
    path = f"{INSTANCES}/_snowflock/{image}/{target}-0"
    return allocated(path), os.stat(path)


@pytest.mark.parametrize("driver", ["", "cache='none' io='native' iothread='1'", "cache='unsafe'"])
def test_write_under_way(engines: list[engine.Engine], driver: str) -> None:
    """Parent and clone both complete it, from where it was when the guest stopped.

    What the image lacked would stay in the clone as it was before.
    """
    home = engines[0]
    length = 8 * MIB
    with booted(home, "writer", driver=driver) as parent, futures.ThreadPoolExecutor() as pool:
        for seed, disk in enumerate(("vda", "vdb")):
            forking = pool.submit(home.host.run, fork_while_it_writes, home.options, "writer")
            wait_until(home.host.path(SWITCHED).exists)
            writing = pool.submit(write, parent, disk, 0, seed, length)
            image = forking.result()
            with released(engines, image), spawned(engines[1], image) as (_, clone):
                size, status = home.host.run(tip, image.uuid, disk)
                assert 2 * MIB < size < 2 * length
                assert (status.st_uid, status.st_mode & 0o777) == (0, 0o600)
                assert read(clone, disk, 0, length) == pattern(seed, length)
                writing.result()
                assert read(parent, disk, 0, length) == pattern(seed, length)
            assert home.collapse("writer")


def test_no_layer_that_is_served_is_changed(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    home = engines[0]
    with contextlib.ExitStack() as stack:
        images = []
        for number in range(3):
            write(parent, "vda", MIB, number)
            write(parent, "vdb", MIB, number)
            images.append(stack.enter_context(forked(engines)))
        write(parent, "vda", MIB, 3)
        home.release(images[1].uuid)
        assert home.collapse("parent")  # nothing to do: the youngest has all of its layers
        assert len(home.host.run(chain_of, "parent")) == 5
        with spawned(engines[1], images[2]) as (_, clone):
            assert read(clone, "vda", MIB) == read(clone, "vdb", MIB) == pattern(2)
        home.release(images[2].uuid)
        assert home.collapse("parent")
        assert len(home.host.run(chain_of, "parent")) == 3
        assert read(parent, "vda", MIB) == pattern(3)
        with spawned(engines[1], images[0]) as (_, clone):
            assert read(clone, "vda", MIB) == read(clone, "vdb", MIB) == pattern(0)
            home.release(images[0].uuid)
    assert home.collapse("parent")
    assert len(home.host.run(chain_of, "parent")) == 2
    assert read(parent, "vda", MIB) == pattern(3)
    assert read(parent, "vdb", MIB) == pattern(2)


def test_clones_outlive_their_parent_and_its_files(engines: list[engine.Engine]) -> None:
    with contextlib.ExitStack() as stack:
        with booted(engines[0], "mortal") as guest:
            write(guest, "vda", MIB, 1)
            write(guest, "vdb", MIB, 2)
            image = stack.enter_context(forked(engines, "mortal"))
            _, clone = stack.enter_context(spawned(engines[1], image))
        assert not engines[0].host.path(f"{INSTANCES}/mortal").exists()
        _, late = stack.enter_context(spawned(engines[2], image, 2))
        engines[0].host.run(os.kill, engines[0].memory_server(image.uuid)["pid"], signal.SIGKILL)
        engines[0].resume_serving(image)
        for one in (clone, late):
            assert (read(one, "vda", MIB), read(one, "vdb", MIB)) == (pattern(1), pattern(2))


def change_state(name: str, method: str) -> None:
    getattr(engine.find_domain(name), method)()


def test_parent_that_is_shut_off(engines: list[engine.Engine]) -> None:
    """Its layers are merged as well, and it starts again with the disks that it had."""
    home = engines[0]
    with booted(home, "mortal") as parent:
        for number in range(2):
            write(parent, "vda", number * MIB, number)
            with forked(engines, "mortal"):
                write(parent, "vdb", number * MIB, 10 + number)
                write(parent, "vdc", number * MIB, 20 + number)
        home.host.run(change_state, "mortal", "destroy")
        parent.close()
        home.host.run(change_state, "mortal", "create")
        assert len(home.host.run(chain_of, "mortal")) == 4
        home.host.run(change_state, "mortal", "destroy")
        assert home.collapse("mortal")
        assert home.host.run(files_of, "mortal") == set(NAMES.values())
        assert {disk: len(home.host.run(chain_of, "mortal", disk)) for disk in DISKS} == {
            **{"vda": 2, "vdb": 1, "vdc": 1},
        }
        home.host.run(change_state, "mortal", "create")
        with domain.client(home.host, "mortal") as guest:
            for number in range(2):
                assert read(guest, "vda", number * MIB) == pattern(number)
                assert read(guest, "vdb", number * MIB) == pattern(10 + number)
                assert read(guest, "vdc", number * MIB) == pattern(20 + number)


def test_parent_that_is_started_from_its_layers(engines: list[engine.Engine]) -> None:
    """libvirt then knows layers by their own names, and keeps one that it merges into."""
    home = engines[0]
    with booted(home, "mortal") as parent:
        parent.close()
        for number in range(3):
            with forked(engines, "mortal"):
                home.host.run(change_state, "mortal", "destroy")
                home.host.run(change_state, "mortal", "create")
                with domain.client(home.host, "mortal") as guest:
                    for disk in DISKS:
                        write(guest, disk, number * MIB, number)
            assert home.collapse("mortal")
            assert len(home.host.run(chain_of, "mortal")) == 2
            with domain.client(home.host, "mortal") as guest:
                for disk in DISKS:
                    write(guest, disk, (4 + number) * MIB, 10 + number)
        home.host.run(change_state, "mortal", "destroy")
        home.host.run(change_state, "mortal", "create")
        with domain.client(home.host, "mortal") as guest:
            for number in range(3):
                for disk in DISKS:
                    assert read(guest, disk, number * MIB) == pattern(number)
                    assert read(guest, disk, (4 + number) * MIB) == pattern(10 + number)
        with forked(engines, "mortal"):
            pass
        assert home.collapse("mortal")
        assert home.host.run(files_of, "mortal") == set(NAMES.values())


def test_localized_clone_needs_no_image(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    for number, disk in enumerate(DISKS):
        write(parent, disk, MIB, number)
    with (
        forked(engines) as image,
        spawned(engines[1], image, population="eager") as (name, clone),
    ):
        write(clone, "vda", 2 * MIB, 10)
        wait_until(lambda: engines[1].memtap(image.uuid)["state"] == "detached")
        engines[0].release(image.uuid)
        assert engines[1].localize(name)
        assert engines[1].host.run(chain_of, name) == [paths(name)["vda"], BASE]
        for disk in ("vdb", "vdc"):
            assert engines[1].host.run(chain_of, name, disk) == [paths(name)[disk]]
        for number, disk in enumerate(DISKS):
            assert read(clone, disk, MIB) == pattern(number)
        assert read(clone, "vda", 2 * MIB) == pattern(10)
        assert read(clone, "vda", 8 * MIB) == digest(base_content()[8 * MIB : 9 * MIB])
        assert engines[1].localize(name)


@pytest.mark.parametrize("population", ["lazy", "eager"])
def test_fork_of_a_clone(
    engines: list[engine.Engine], parent: guest_client.GuestClient, population: str
) -> None:
    """At any depth, also while it is filling, and after its own image was released at home."""
    home, middle, far = engines
    for disk in DISKS:
        write(parent, disk, 0, 1)
        write(parent, disk, MIB, 1)
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(forked(engines))
        name, clone = stack.enter_context(spawned(middle, image, population=population))
        history = parent.call("history")
        checks.clone_continues("clone", clone.call("history"), history)
        changed = clone.call("write", seed=5, pages=20)["digest"]
        for disk in DISKS:
            write(clone, disk, MIB, 2)
        assert middle.probe(name) is None
        child_image = stack.enter_context(forked(engines, name, home=1))
        history = clone.call("history")
        clone.call("write", seed=6, pages=20)
        for disk in DISKS:
            write(clone, disk, 0, 3)
        assert not middle.host.run(leave, middle.options, image.uuid)
        child, grandchild = (
            stack.enter_context(spawned(far, child_image, 1)),
            stack.enter_context(spawned(home, child_image, 2)),
        )
        for _, one in (child, grandchild):
            checks.clone_continues("child", one.call("history"), history)
            assert one.call("digest") == changed
            for disk in DISKS:
                assert read(one, disk, 0) == pattern(1)
                assert read(one, disk, MIB) == pattern(2)
        # Once more, from the clone of a clone.
        write(child[1], "vda", 2 * MIB, 4)
        third_image = stack.enter_context(forked(engines, child[0], home=2))
        _, third = stack.enter_context(spawned(middle, third_image))
        assert third.call("digest") == changed
        assert [read(third, "vda", number * MIB) for number in range(3)] == [
            pattern(1),
            pattern(2),
            pattern(4),
        ]
        stack.pop_all().close()
    assert home.collapse("parent")


def leave(options: engine.Options, image: str) -> bool:
    return engine.back_end(options).leave(image)


def make_persistent(name: str) -> None:
    """End a clone that has a definition as a cloud makes it, without its image's memory."""
    found = engine.find_domain(name)
    xml = found.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE)
    found.connect().defineXML(domain_xml.portable(xml, xml))
    found.destroy()


def test_localized_clone_that_is_shut_off(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    for number, disk in enumerate(DISKS):
        write(parent, disk, MIB, number)
    with forked(engines) as image, spawned(engines[1], image) as (name, clone):
        write(clone, "vda", 2 * MIB, 10)
        host = engines[1].host
        host.run(make_persistent, name)
        assert not host.run(leave, engines[1].options, image.uuid)
        assert engines[1].localize(name)
        assert host.run(chain_of, name) == [paths(name)["vda"], BASE]
        assert host.run(leave, engines[1].options, image.uuid)
        for number, disk in enumerate(DISKS):
            assert host.run(chain_of, name, disk)[0] == paths(name)[disk]
            assert host.run(content, paths(name)[disk], MIB) == pattern(number)
        assert host.run(content, paths(name)["vda"], 2 * MIB) == pattern(10)


def test_readers_of_a_clones_disk(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    """Nova copies disks to images, and is not QEMU's user."""
    write(parent, "vda", MIB, 1)
    with forked(engines) as image, spawned(engines[1], image, group=READERS):
        host = engines[1].host
        mount = f"{engine.RUN_PATH}/{image.uuid}/mount"
        assert host.run(read_as, READERS, f"{mount}/vda-1") is None
        for group, path in ((READERS, "memory"), (READERS + 1, "vda-1")):
            assert "Permission denied" in str(host.run(read_as, group, f"{mount}/{path}"))


def read_as(group: int, path: str) -> str | None:
    """What is wrong if somebody of a group reads a file."""
    identity = ("--reuid", str(group), "--regid", str(group), "--clear-groups")
    command = ["setpriv", *identity, "dd", f"if={path}", "of=/dev/null", "bs=64K", "count=1"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr if done.returncode else None


def content(path: str, offset: int) -> str:
    """The digest of 1 MiB of a disk that nobody uses."""
    with tempfile.TemporaryDirectory() as directory:
        qcow2.qemu_img("convert", "-q", "-f", "qcow2", "-O", "raw", path, f"{directory}/raw")
        with open(f"{directory}/raw", "rb") as file:
            file.seek(offset)
            return digest(file.read(MIB))


def merge_slowly(options: engine.Options, name: str) -> bool:
    original = libvirt.virDomain.blockCommit

    def block_commit(found: libvirt.virDomain, disk: str, *arguments: Any) -> None:
        base, top, _, flags = arguments
        original(found, disk, base, top, 1, flags)

    libvirt.virDomain.blockCommit = block_commit
    try:
        return engine._collapse(options, name)
    finally:
        libvirt.virDomain.blockCommit = original


def has_job(name: str) -> bool:
    return bool(engine.find_domain(name).blockJobInfo("vda"))


def test_fork_does_not_wait_for_a_merge(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    home = engines[0]
    with forked(engines):
        parent.call("disk_write", disk="vda", offset=0, seed=1, length=16 * MIB)
    with futures.ThreadPoolExecutor() as pool:
        merging = pool.submit(home.host.run, merge_slowly, home.options, "parent")
        wait_until(lambda: home.host.run(has_job, "parent"))
        assert home.probe("parent") is None
        with forked(engines) as image:
            assert not merging.result()
            with spawned(engines[1], image) as (_, clone):
                assert read(clone, "vda", 0, 16 * MIB) == pattern(1, 16 * MIB)
    assert home.collapse("parent")
    assert read(parent, "vda", 0, 16 * MIB) == pattern(1, 16 * MIB)


def start_job(name: str) -> None:
    engine.find_domain(name).blockCopy(
        "vda",
        f"<disk><source file='{INSTANCES}/{name}/copy'/><driver type='qcow2'/></disk>",
        {libvirt.VIR_DOMAIN_BLOCK_COPY_BANDWIDTH: 4096},
        libvirt.VIR_DOMAIN_BLOCK_COPY_TRANSIENT_JOB,
    )


def end_job(name: str) -> None:
    engine.find_domain(name).blockJobAbort("vda")
    os.unlink(f"{INSTANCES}/{name}/copy")


def test_others_jobs_are_left_alone(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    host = engines[0].host
    host.run(start_job, "parent")
    with pytest.raises(exception.CannotFork, match="busy with a job on its disk vda"):
        engines[0].fork("parent")
    assert host.run(has_job, "parent")
    host.run(end_job, "parent")


def direct(path: str, offset: int, length: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, length) as buffer, memoryview(buffer) as view:
            return buffer[: os.preadv(fd, [view], offset)]
    finally:
        os.close(fd)


def hide(path: str, hidden: str) -> None:
    os.rename(path, hidden)


def test_direct_reads_of_the_mount(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    size = DISKS["vdb"][1]
    write(parent, "vdb", 0, 1)
    write(parent, "vdb", size - MIB, 2)
    content, end = (random.Random(seed).randbytes(MIB) for seed in (1, 2))
    with forked(engines) as image, spawned(engines[1], image):
        path = f"{engine.RUN_PATH}/{image.uuid}/mount/vdb-1"
        for offset, length in (
            (512, 4096),
            (4096, 4096),
            (512, 512),
            (8192 + 512, 65536),
            (0, MIB),
        ):
            got = engines[1].host.run(direct, path, offset, length)
            assert got == content[offset : offset + length]
        assert engines[1].host.run(direct, path, size - 512, 4096) == end[-512:]
        assert engines[1].host.run(direct, path, size, 4096) == b""


def test_clone_that_cannot_have_its_disks(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    """Nothing is left of it, and what was there is still there."""
    host = engines[1].host
    with forked(engines) as image:
        before = engines[1].footprint() | host.run(instance_files)
        host.run(make_directory, "failed")
        good = paths("failed")
        try:
            host.run(make_disks, "taken", ["vda"])
            for options, reason in (
                ({"disks": {}}, "No file is named for the clone's disk vda"),
                ({"disks": {**good, "vdb": paths("taken")["vda"]}}, "File exists"),
                ({"disks": {**good, "vdc": "/nowhere/disk"}}, "No such file"),
                ({"disks": good, "domain": domain.xml("failed")}, "has no disk vda"),
            ):
                with pytest.raises(exception.SpawnFailed, match=reason):
                    engines[1].spawn(image, "failed", bases=[BASE], **options)
            decoded = descriptor.Descriptor.decode(image.descriptor)
            without = dataclasses.replace(decoded, disks=decoded.disks[1:]).encode()
            with pytest.raises(exception.InvalidDescriptor, match="not those of its domain"):
                engines[1].spawn(dataclasses.replace(image, descriptor=without), "failed")
            first = dataclasses.replace(decoded.disks[0], base=None)
            wrong = dataclasses.replace(decoded, disks=(first, *decoded.disks[1:])).encode()
            with pytest.raises(exception.SpawnFailed, match=f"based on {BASE}"):
                engines[1].spawn(dataclasses.replace(image, descriptor=wrong), "failed", disks=good)
            with pytest.raises(exception.SpawnFailed, match="not the base of this clone's disks"):
                engines[1].spawn(image, "failed", disks=good, bases=["/etc/shadow"])
            host.run(hide, BASE, f"{BASE}.hidden")
            with pytest.raises(exception.SpawnFailed, match=f"lacks {BASE}"):
                engines[1].spawn(image, "failed", disks=good, bases=[BASE])
            assert host.run(files_of, "failed") == set()
            assert host.run(files_of, "taken") == {"disk"}
        finally:
            host.run(hide, f"{BASE}.hidden", BASE)
            host.run(remove_directory, "failed")
            host.run(remove_directory, "taken")
        assert engines[1].footprint() | host.run(instance_files) == before


def test_clone_does_not_wait_for_ever(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    """For the headers of its disks' layers, from a server that stands still."""
    home, impatient = engines[0].host, engine.Engine(engines[1].host, spawn_timeout=3)
    with forked(engines) as image:
        before = impatient.footprint()
        server = engines[0].memory_server(image.uuid)["pid"]
        home.run(os.kill, server, signal.SIGSTOP)
        try:
            with pytest.raises(exception.SnowFlockError), spawned(impatient, image):
                pass
        finally:
            home.run(os.kill, server, signal.SIGCONT)
        assert impatient.footprint() == before
        with spawned(impatient, image):
            pass


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def make_config(name: str, content: bytes) -> None:
    pathlib.Path(f"{INSTANCES}/{name}/disk.config").write_bytes(content.ljust(MIB, b"\0"))


CONFIG = """<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>
<source file='{directory}/disk.config'/><target dev='sda' bus='sata'/><readonly/></disk>"""
INTERFACE = """<interface type='bridge'><mac address='{mac}'/><source bridge='br-test'/>
<target dev='{tap}'/><model type='virtio'/><mtu size='1400'/></interface>"""


def live_xml(name: str) -> str:
    return str(engine.find_domain(name).XMLDesc())


def test_clone_brings_what_is_its_own(engines: list[engine.Engine]) -> None:
    """Disks as fast as they can be, a drive for its configuration, and a network interface."""
    for one in engines[:2]:
        one.host.run(run, "ip", "link", "add", "br-test", "type", "bridge")
    home, other = engines[:2]
    mac, own_mac = "52:54:00:12:34:56", "52:54:00:65:43:21"
    home.host.run(make_directory, "config")
    home.host.run(make_config, "config", b"parent")
    extra = CONFIG.format(directory=f"{INSTANCES}/config") + INTERFACE.format(mac=mac, tap="tap7")
    driver = "cache='none' io='native' discard='unmap' iothread='1'"
    try:
        with (
            booted(home, "fast", ("vda", "vdb"), driver=driver, extra=extra) as parent,
            forked(engines, "fast") as image,
        ):
            write(parent, "vda", MIB, 7)
            other.host.run(make_directory, "own")
            other.host.run(make_config, "own", b"clone")
            own_extra = CONFIG.format(directory=f"{INSTANCES}/own") + INTERFACE.format(
                mac=own_mac, tap="tap8"
            )
            disks = "".join(
                f"<disk type='file'><driver name='qemu' type='qcow2' cache='writeback'/>"
                f"<source file='/ignored'/><target dev='{target}' bus='virtio'/></disk>"
                for target in ("vda", "vdb")
            )
            own = domain.xml("own").replace("</devices>", f"{disks}{own_extra}</devices>")
            own = own.replace("<memory", "<metadata><own xmlns='urn:own'/></metadata><memory", 1)
            try:
                with spawned(other, image, domain=own) as (name, clone):
                    assert list(clone.call("interfaces").values()) == [mac]
                    assert read(clone, "vda", MIB) == digest(base_content()[MIB : 2 * MIB])
                    xml = other.host.run(live_xml, name)
                    wanted = ("urn:own", "own/disk.config", "tap8", own_mac, "cache='writeback'")
                    for part in wanted:
                        assert part in xml
                    # Its guest believes in its parent's until its interface is reset.
                    assert mac not in xml
                    assert "config/disk.config" not in xml
                # The same, with an interface of its own in place of one that leads where it would.
                with spawned(
                    other, image, domain=own, interfaces=hypervisor.Interfaces.REPLACE
                ) as (name, clone):
                    wait_until(lambda: list(clone.call("interfaces").values()) == [own_mac])
                    wait_until(lambda: mac not in other.host.run(live_xml, name))
            finally:
                other.host.run(remove_directory, "own")
            home.release(image.uuid)
            assert home.collapse("fast")
            assert read(parent, "vda", MIB) == pattern(7)
    finally:
        home.host.run(remove_directory, "config")
        for one in engines[:2]:
            one.host.run(run, "ip", "link", "delete", "br-test")


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Failures


def take_next_layer(preparation: Any) -> None:
    """The parent's next layer of its second disk is gone."""
    second = preparation.guest.disks[1]
    os.unlink(second.next_path(preparation.image))


def refuse_snapshot(preparation: Any) -> None:
    """libvirt knows no such disk."""
    preparation.disks._snapshot_xml = preparation.disks._snapshot_xml.replace("vdc", "vdx")


def fail_late(preparation: Any) -> None:
    """libvirt fails when QEMU has made the snapshot."""
    domain = preparation.guest.domain
    original = domain.snapshotCreateXML

    def create(*arguments: Any) -> None:
        original(*arguments)
        raise libvirt.libvirtError("the status is not saved")

    domain.snapshotCreateXML = create


def take_tip(preparation: Any) -> None:
    """The second disk's tip cannot be made."""
    pathlib.Path(preparation.disks.layers.disks[1].files[0].path).touch()


def refuse_freeze(preparation: Any) -> None:
    """QEMU has no memory there."""
    preparation.freezer._ranges = ((0x1000, 0x1000),)


def take_layer(preparation: Any) -> None:
    """What is to be published is gone."""
    os.unlink(preparation.disks.layers.files[1].path)


def fill(preparation: Any) -> None:
    """The file system of its disks is full."""
    with open(f"{INSTANCES}/filler", "wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(PAGE_SIZE))


def fork_with(options: engine.Options, name: str, fault: Any) -> None:
    qemu = engine.back_end(options)
    preparation = qemu.prepare(engine.find_domain(name), str(uuid.uuid4()), secrets.token_bytes(32))
    fault(preparation)
    qemu.capture(preparation)


def test_failures_cost_the_parent_nothing(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    home = engines[0]
    chains = {disk: home.host.run(chain_of, "parent", disk) for disk in DISKS}
    before = home.footprint() | home.host.run(instance_files)
    for number, (fault, cause) in enumerate(
        (
            (take_next_layer, "No such file"),
            (refuse_snapshot, "vdx"),
            (fail_late, "the status is not saved"),
            (take_tip, "vdb cannot be copied"),
            (refuse_freeze, "Cannot allocate memory"),
            (take_layer, "No such file"),
        )
    ):
        write(parent, "vda", MIB, number)
        write(parent, "vdb", MIB, number)
        with pytest.raises(exception.CaptureFailed, match=cause):
            home.host.run(fork_with, home.options, "parent", fault)
        assert {disk: home.host.run(chain_of, "parent", disk) for disk in DISKS} == chains
        assert home.footprint() | home.host.run(instance_files) == before
        assert read(parent, "vda", MIB) == read(parent, "vdb", MIB) == pattern(number)
    checks.count_is_unbroken("the parent", parent.call("history"))
    with forked(engines) as image, spawned(engines[1], image) as (_, clone):
        assert read(clone, "vda", MIB) == read(clone, "vdb", MIB) == pattern(number)
    assert home.collapse("parent")


def test_full_file_system(engines: list[engine.Engine]) -> None:
    home = engines[2]
    home.host.run(run, "mount", "-t", "tmpfs", "-o", "size=64m,mode=755", "tmpfs", INSTANCES)
    try:
        home.host.run(make_base)
        with booted(home, "mortal", ("vda", "vdb")) as parent:
            write(parent, "vda", MIB, 1)
            before = home.footprint() | home.host.run(instance_files)
            with pytest.raises(exception.CaptureFailed, match=r"vda cannot be copied .* No space"):
                home.host.run(fork_with, home.options, "mortal", fill)
            checks.count_is_unbroken("the parent", parent.call("history"))
            home.host.run(os.unlink, f"{INSTANCES}/filler")
            assert home.footprint() | home.host.run(instance_files) == before
            write(parent, "vdb", MIB, 2)
            with forked(engines, "mortal", home=2) as image:
                write(parent, "vda", MIB, 3)
                with spawned(engines[1], image) as (_, clone):
                    assert read(clone, "vda", MIB) == pattern(1)
                    assert read(clone, "vdb", MIB) == pattern(2)
    finally:
        home.host.run(run, "umount", INSTANCES)


KILLED = """
import os, secrets, signal, sys
from tests import engine
from nova_snowflock.virt.disks import files, layers, merge, qcow2
from nova_snowflock.virt.qemu import disks, nodes, sparse
options, image, point = eval(sys.argv[1]), sys.argv[2], sys.argv[3]

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def die_after(owner, name, times=1):
    original = getattr(owner, name)
    left = [times]
    def wrapped(*arguments, **keywords):
        result = original(*arguments, **keywords)
        left[0] -= 1
        if not left[0]:
            die()
        return result
    setattr(owner, name, wrapped)

def die_at(owner, name, times=1):
    original = getattr(owner, name)
    left = [times]
    def wrapped(*arguments, **keywords):
        left[0] -= 1
        if not left[0]:
            die()
        return original(*arguments, **keywords)
    setattr(owner, name, wrapped)

qemu = engine.back_end(options)
guest = engine.find_domain("parent")
exec(point)
if image != "collapse":
    preparation = qemu.prepare(guest, image, secrets.token_bytes(32))
    exec(sys.argv[4])
    qemu.capture(preparation)
else:
    qemu.collapse(guest)
"""
POINTS = {
    "the record is written": ('die_after(layers.Layers, "save")', ""),
    "a link is missing": ('die_at(os, "link", 3)', ""),
    "QEMU has a node too many": ('die_after(nodes.monitor.Monitor, "command", 12)', ""),
    "QEMU is being told": ('die_at(qcow2, "create_overlay", 2)', ""),
    "prepared": ("", "die()"),
    "one name is changed": ("", 'die_at(os, "rename", 2)'),
    "no snapshot is made": ('die_at(disks.libvirt.virDomain, "snapshotCreateXML")', ""),
    "a snapshot is made": ('die_after(disks.libvirt.virDomain, "snapshotCreateXML")', ""),
    "it is stopped": ('die_after(disks.libvirt.virDomain, "suspend")', ""),
    "half a tip is made": ('die_after(os, "copy_file_range", 2)', ""),
    "a tip is missing": ('die_at(sparse, "copy", 3)', ""),
    "the tips are made": ('die_after(sparse, "copy", 3)', ""),
    "it runs again": ('die_after(disks.libvirt.virDomain, "resume")', ""),
}
COLLAPSES = {
    "merging has begun": 'die_after(merge.libvirt.virDomain, "blockCommit")',
    "the guest is stopped": 'die_after(merge.libvirt.virDomain, "suspend")',
    "the layers are one": 'die_after(merge.libvirt.virDomain, "blockJobAbort")',
    "the name is changed": 'die_after(files, "give_name")',
    "the guest runs again": 'die_after(merge.libvirt.virDomain, "resume")',
    "QEMU knows": 'die_after(nodes.Blocks, "relocate", 4)',
    "the second disk is next": 'die_after(merge, "_merge_running")',
}


def killed(home: engine.Engine, image: str, point: str, late: str = "") -> None:
    command = [sys.executable, "-c", KILLED, repr(home.options), image, point, late]
    process = home.host.popen(command, stderr=subprocess.PIPE, text=True)
    _, said = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL or "Killed" in said, said


def test_agent_that_is_killed(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    """Whoever comes after it finishes or undoes what it had begun."""
    home = engines[0]
    chains = {disk: home.host.run(chain_of, "parent", disk) for disk in DISKS}
    before = home.footprint() | home.host.run(instance_files)
    for number, (name, (point, late)) in enumerate(POINTS.items()):
        write(parent, "vda", MIB, number)
        write(parent, "vdb", MIB, number)
        image = str(uuid.uuid4())
        killed(home, image, point, late)
        home.release(image)
        assert home.collapse("parent"), name
        after = home.footprint() | home.host.run(instance_files)
        assert after == before, name
        assert {disk: home.host.run(chain_of, "parent", disk) for disk in DISKS} == chains, name
        assert read(parent, "vda", MIB) == read(parent, "vdb", MIB) == pattern(number), name


def test_agent_that_is_killed_while_it_merges(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    home = engines[0]
    chains = {disk: home.host.run(chain_of, "parent", disk) for disk in DISKS}
    before = home.footprint() | home.host.run(instance_files)
    for number, (name, point) in enumerate(COLLAPSES.items()):
        with forked(engines):
            write(parent, "vda", MIB, number)
            write(parent, "vdb", MIB, number)
        killed(home, "collapse", point)
        assert home.collapse("parent"), name
        after = home.footprint() | home.host.run(instance_files)
        assert after == before, name
        assert {disk: home.host.run(chain_of, "parent", disk) for disk in DISKS} == chains, name
        assert read(parent, "vda", MIB) == read(parent, "vdb", MIB) == pattern(number), name
