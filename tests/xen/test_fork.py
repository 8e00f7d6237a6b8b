# SPDX-License-Identifier: Apache-2.0
"""Forks of real guests of Xen."""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import hashlib
import os
import random
import secrets
import signal
import time
from typing import Any
from unittest import mock
import uuid

import pytest

from devstack.embedded import image as boot_image
from nova_snowflock import descriptor
from nova_snowflock import exception
from nova_snowflock.virt import hypervisor
from nova_snowflock.virt.xen import device_model
from nova_snowflock.virt.xen import helper
from nova_snowflock.virt.xen import nodes
from nova_snowflock.virt.xen import stream
from tests import emulation
from tests import engine
from tests.xen import guest


@pytest.fixture(autouse=True)
def nothing_remains(host: emulation.Host) -> Iterator[None]:
    before = host.run(guest.footprint)
    yield
    host.run(guest.forget_disks)
    deadline = time.monotonic() + 30
    while left := host.run(guest.footprint) - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)


@contextlib.contextmanager
def parent(host: emulation.Host, name: str = "parent", **options: Any) -> Iterator[str]:
    """A guest of that name, until the context ends."""
    host.run(guest.create, name, **options)
    try:
        yield name
    finally:
        host.run(guest.destroy, name)


@contextlib.contextmanager
def forked(xen: engine.Engine, name: str) -> Iterator[engine.Image]:
    """A fork, until the context ends; its clones end with it."""
    image = xen.fork(name, shared=str(guest.BASE))
    try:
        yield image
    finally:
        xen.host.run(guest.destroy, f"{name}-1")
        xen.release(image.uuid)


STAGES = {"suspend", "devices", "copy", "state", "disks", "resume"}


def test_clone_is_its_parent(*, host: emulation.Host, xen: engine.Engine) -> None:
    """It goes on where that was stopped, each for itself from then on."""
    with parent(host) as name:
        before = host.run(guest.ask, name, "state")
        with forked(xen, name) as image:
            assert set(image.stages) == STAGES
            xen.spawn(image, f"{name}-1")
            for server in (f"{name}-1", name):
                after = host.run(guest.ask, server, "state")
                assert after["boot_id"] == before["boot_id"]
                assert after["digest"] == before["digest"]
                assert after["tick"] > before["tick"]
            changed = host.run(guest.ask, f"{name}-1", "write", seed=1, pages=64)
            assert changed["digest"] != before["digest"]
            assert host.run(guest.ask, name, "digest") == before["digest"]


def spawn_unpaged(options: engine.Options, image: engine.Image, name: str) -> None:
    """In dom0: start a clone where Xen does not page."""
    identity = hypervisor.Identity(name, str(uuid.uuid4()), 1)
    known = descriptor.Descriptor.decode(image.descriptor)
    # What it learns thereby is not for other tests.
    back_end = engine.back_end.__wrapped__(options)
    with mock.patch.object(helper, "page", side_effect=helper.CannotPage("not here")):
        back_end.spawn(known, image.key, identity)


def test_clone_where_xen_does_not_page(*, host: emulation.Host, xen: engine.Engine) -> None:
    """It has all of its memory when it begins to run."""
    with parent(host) as name:
        before = host.run(guest.ask, name, "state")
        with forked(xen, name) as image:
            host.run(spawn_unpaged, xen.options, image, f"{name}-1")
            assert host.run(guest.pagers) == []
            status = xen.memtap(image.uuid)
            assert status["population"] == "eager"
            assert status["pages"]["missing"] == 0
            after = host.run(guest.ask, f"{name}-1", "state")
            assert after["boot_id"] == before["boot_id"]
            assert after["digest"] == before["digest"]


def counts(host: emulation.Host, name: str) -> bool:
    """Whether a guest's workload does: every 100 ms."""
    before = host.run(guest.ask, name, "tick")["tick"]
    time.sleep(1)
    return bool(host.run(guest.ask, name, "tick")["tick"] > before)


@pytest.mark.long
def test_guest_that_was_left_suspended(*, host: emulation.Host, xen: engine.Engine) -> None:
    """By who was killed before it could resume it: it runs again when the image goes."""
    with parent(host) as name:
        with forked(xen, name) as image:
            host.run(guest.suspend, name, image.uuid)
            assert host.run(guest.is_suspended, name)
        assert counts(host, name)


@pytest.mark.long
def test_parent_that_crashes(*, host: emulation.Host, xen: engine.Engine) -> None:
    """Which libvirt does not notice after a fork: what its domain says is done all the same."""
    with parent(host) as name:
        with forked(xen, name):
            pass
        before = host.run(guest.number, name)
        host.run(guest.crash, name)
        deadline = time.monotonic() + 60
        while host.run(guest.number, name) == before:
            assert time.monotonic() < deadline
            xen.end_stopped()
            time.sleep(1)


def test_pager_is_killed(*, host: emulation.Host, xen: engine.Engine) -> None:
    """Its clone ends, and nobody else."""
    with parent(host) as name, forked(xen, name) as image:
        xen.spawn(image, f"{name}-1")
        pagers = host.run(guest.pagers)
        if not pagers:
            pytest.skip("this Xen does not page")
        xen.end_stopped()
        assert host.run(guest.number, f"{name}-1")
        for pid in pagers:
            host.run(os.kill, pid, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while host.run(guest.number, f"{name}-1"):
            assert time.monotonic() < deadline
            xen.end_stopped()
        host.run(guest.ask, name, "tick")


def test_descriptor_of_another_xen(*, host: emulation.Host, xen: engine.Engine) -> None:
    with parent(host) as name, forked(xen, name) as image:
        known = descriptor.Descriptor.decode(image.descriptor)
        state = stream.parse(known.device_state, host.run(guest.version))
        for altered in (
            stream.compose(dataclasses.replace(state, xen_version=(4, 3))),
            stream.compose(dataclasses.replace(state, emulator=b"QEVM\0\0\0\3")),
            known.device_state[:-1],
            known.device_state.replace(b"XENF", b"XENG"),
        ):
            other = dataclasses.replace(known, device_state=altered).encode()
            with pytest.raises(exception.InvalidDescriptor):
                xen.spawn(dataclasses.replace(image, descriptor=other), f"{name}-1")


def test_guest_that_cannot_be_forked(*, host: emulation.Host, xen: engine.Engine) -> None:
    with parent(host, kind="pv") as name:
        assert "not a PVH or HVM guest" in str(xen.probe(name))
        with pytest.raises(exception.CannotFork):
            xen.fork(name)
        host.run(guest.ask, name, "tick")


MIB = 1 << 20


def write(host: emulation.Host, name: str, at: int, seed: int) -> None:
    """Have a guest write a megabyte of its disk."""
    host.run(guest.ask, name, "disk_write", disk="xvda", offset=at * MIB, seed=seed, length=MIB)


def digests(host: emulation.Host, name: str, count: int) -> list[str]:
    """Of the first megabytes of a guest's disk."""
    return [
        host.run(guest.ask, name, "disk_digest", disk="xvda", offset=at * MIB, length=MIB)["digest"]
        for at in range(count)
    ]


def written(seed: int) -> str:
    """The digest of what :func:`write` writes."""
    return hashlib.blake2b(random.Random(seed).randbytes(MIB), digest_size=32).hexdigest()


def spawn(host: emulation.Host, xen: engine.Engine, image: engine.Image, name: str) -> None:
    disks = {"xvda": host.run(guest.disk_path, name)}
    xen.spawn(image, name, disks=disks, bases=[str(guest.BASE)])


def test_disks(*, host: emulation.Host, xen: engine.Engine) -> None:
    """A clone has its parent's as it was, and each its own from then on."""
    with parent(host, devices=[host.run(guest.make_disk, "parent")]) as name:
        write(host, name, 0, seed=1)
        _, base = digests(host, name, 2)
        assert base != written(1)
        with forked(xen, name) as image:
            write(host, name, 0, seed=2)
            clone = f"{name}-1"
            spawn(host, xen, image, clone)
            assert digests(host, clone, 2) == [written(1), base]
            write(host, clone, 1, seed=3)
            assert digests(host, clone, 2) == [written(1), written(3)]
            assert digests(host, name, 2) == [written(2), base]
            # It does not need the image any more.
            assert xen.localize(clone)
            xen.release(image.uuid)
            assert digests(host, clone, 2) == [written(1), written(3)]
        assert xen.collapse(name)
        assert host.run(guest.disk_files) == [f"{clone}/disk", f"{name}/disk"]
        write(host, name, 1, seed=4)
        assert digests(host, name, 2) == [written(2), written(4)]


@pytest.mark.long
def test_disks_of_a_descriptor(*, host: emulation.Host, xen: engine.Engine) -> None:
    """They lead to nothing that is not the clone's business."""
    with parent(host, devices=[host.run(guest.make_disk, "parent")]) as name:
        with forked(xen, name) as image:
            known = descriptor.Descriptor.decode(image.descriptor)
            [disk] = known.disks
            files = host.run(guest.disk_files)
            for altered, error in (
                ([], exception.InvalidDescriptor),
                ([dataclasses.replace(disk, target="xvdb")], exception.InvalidDescriptor),
                ([dataclasses.replace(disk, base="/etc/passwd")], exception.SpawnFailed),
                ([dataclasses.replace(disk, base=None)], exception.SpawnFailed),
            ):
                other = dataclasses.replace(known, disks=tuple(altered)).encode()
                with pytest.raises(error):
                    spawn(host, xen, dataclasses.replace(image, descriptor=other), f"{name}-1")
                assert host.run(guest.disk_files) == files
        assert xen.collapse(name)
        assert host.run(guest.disk_files) == [f"{name}/disk"]


def fork_in_vain(options: engine.Options, name: str, failing: str, *, done: bool) -> None:
    """In dom0: QEMU does not do what a method has it do, or has done it and does not say so."""
    kind = nodes.Blocks if failing == "lay" else device_model.DeviceModel
    method = getattr(kind, failing)

    def fail(*arguments: Any) -> None:
        if done:
            method(*arguments)
        raise exception.MonitorError("a fault")

    with mock.patch.object(kind, failing, fail):
        engine._fork(options, name, str(uuid.uuid4()), secrets.token_bytes(32), str(guest.BASE))


@pytest.mark.long
def test_disks_that_are_not_frozen(*, host: emulation.Host, xen: engine.Engine) -> None:
    """The guest goes on, and nothing is left."""
    with parent(host, devices=[host.run(guest.make_disk, "parent")]) as name:
        for seed, done in enumerate((False, True)):
            write(host, name, 0, seed)
            with pytest.raises(exception.CaptureFailed, match="a fault"):
                host.run(fork_in_vain, xen.options, name, "lay", done=done)
            assert host.run(guest.disk_files) == [f"{name}/disk"]
            write(host, name, 1, seed)
            assert digests(host, name, 2) == [written(seed)] * 2


@pytest.mark.long
def test_disks_of_one_that_was_started_with_layers(
    *, host: emulation.Host, xen: engine.Engine
) -> None:
    """QEMU has opened the lower ones itself then."""
    devices = [host.run(guest.make_disk, "parent")]
    with parent(host, devices=devices) as name:
        write(host, name, 0, seed=1)
        with forked(xen, name):
            host.run(guest.destroy, name)
            host.run(guest.create, name, devices=devices)
            assert digests(host, name, 1) == [written(1)]
            write(host, name, 1, seed=2)
            with forked(xen, name) as image:
                spawn(host, xen, image, f"{name}-1")
                assert digests(host, f"{name}-1", 2) == [written(1), written(2)]
            assert xen.collapse(name)
            write(host, name, 2, seed=3)
        assert xen.collapse(name)
        assert host.run(guest.disk_files) == [f"{name}-1/disk", f"{name}/disk"]
        assert digests(host, name, 3) == [written(1), written(2), written(3)]


PARENT_MAC, CLONE_MAC = "00:16:3e:00:00:01", "00:16:3e:00:00:02"


def address(host: emulation.Host, name: str, old: str | None, new: str) -> None:
    """Give a guest's interface another address."""
    # The old one goes first: Linux removes all of a network with its first.
    for verb, own in (("del", old), ("add", new)):
        if own is not None:
            change = ["ip", "address", verb, f"{own}/24", "dev", "eth0"]
            assert host.run(guest.ask, name, "run", argv=change) == 0


def becomes(wanted: Any, look: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while (found := look()) != wanted:
        assert time.monotonic() < deadline, found
        time.sleep(0.5)


def test_interfaces(*, host: emulation.Host, xen: engine.Engine) -> None:
    """A clone's has a MAC of its own, and leads nowhere for as long as it is held."""

    def reaches(name: str) -> bool:
        return bool(host.run(guest.ask, name, "reaches", address=guest.ADDRESS))

    with parent(host, devices=[host.run(guest.interface, PARENT_MAC)]) as name:
        address(host, name, None, "192.0.2.2")
        becomes(True, lambda: reaches(name))
        with forked(xen, name) as image:
            clone = f"{name}-1"
            own = host.run(guest.describe, clone, devices=[host.run(guest.interface, CLONE_MAC)])
            xen.spawn(image, clone, domain=own, interfaces=hypervisor.Interfaces.HOLD)
            becomes({"eth0": CLONE_MAC}, lambda: host.run(guest.ask, clone, "interfaces"))
            assert reaches(name)
            address(host, clone, "192.0.2.2", "192.0.2.3")
            assert not reaches(clone)
            xen.connect(clone)
            becomes(True, lambda: reaches(clone))
            assert reaches(name)


@pytest.mark.long
def test_interfaces_that_are_replaced(*, host: emulation.Host, xen: engine.Engine) -> None:
    """A clone's guest is given new ones: what it knew of the old is gone."""
    with parent(host, devices=[host.run(guest.interface, PARENT_MAC)]) as name:
        address(host, name, None, "192.0.2.2")
        with forked(xen, name) as image:
            clone = f"{name}-1"
            own = host.run(guest.describe, clone, devices=[host.run(guest.interface, CLONE_MAC)])
            xen.spawn(image, clone, domain=own, interfaces=hypervisor.Interfaces.REPLACE)
            becomes({"eth0": CLONE_MAC}, lambda: host.run(guest.ask, clone, "interfaces"))
            assert host.run(guest.ask, clone, "addresses") == []
            assert host.run(guest.ask, name, "addresses") == ["192.0.2.2"]


@pytest.fixture(scope="module")
def hvm() -> dict[str, Any]:
    """Options of an HVM guest, but for its disks."""
    # It may be of other parameters.
    guest.BOOT_IMAGE.unlink(missing_ok=True)
    boot_image.build(guest.BOOT_IMAGE, guest.CMDLINE.format(fill_mib=16))
    # Of its memory 16 MiB are the screen's.
    return {"kind": "hvm", "memory_mib": 160, "devices": [guest.SCREEN]}


def with_disks(hvm: dict[str, Any], disks: str) -> dict[str, Any]:
    return {**hvm, "devices": [disks, *hvm["devices"]]}


def spawn_hvm(
    host: emulation.Host,
    xen: engine.Engine,
    hvm: dict[str, Any],
    image: engine.Image,
    name: str,
) -> None:
    disks = {
        "xvda": host.run(guest.disk_path, name),
        guest.BOOT_DISK: guest.boot_disk_path(name),
    }
    own = host.run(guest.describe, name, **with_disks(hvm, guest.disks_of(name)))
    bases = [str(guest.BASE), str(guest.BOOTABLE)]
    xen.spawn(image, name, disks=disks, bases=bases, domain=own)


def test_hvm_guest(*, host: emulation.Host, xen: engine.Engine, hvm: dict[str, Any]) -> None:
    """Its device model goes on, too, and a clone has one of its own."""
    with parent(host, **with_disks(hvm, host.run(guest.make_disks, "parent"))) as name:
        assert xen.probe(name) is None
        write(host, name, 0, seed=1)
        before = host.run(guest.ask, name, "state")
        _, base = digests(host, name, 2)
        clone = f"{name}-1"
        with forked(xen, name) as image:
            assert set(image.stages) == STAGES
            write(host, name, 0, seed=2)
            spawn_hvm(host, xen, hvm, image, clone)
            for server in (clone, name):
                assert host.run(guest.device_model_status, server) == "running"
                after = host.run(guest.ask, server, "state")
                assert after["boot_id"] == before["boot_id"]
                assert after["digest"] == before["digest"]
                assert after["tick"] > before["tick"]
            shown = host.run(guest.video_memory, name)
            assert any(shown)
            assert host.run(guest.video_memory, clone) == shown
            assert digests(host, clone, 2) == [written(1), base]
            write(host, clone, 1, seed=3)
            changed = host.run(guest.ask, clone, "write", seed=1, pages=64)
            assert changed["digest"] != before["digest"]
            assert host.run(guest.ask, name, "digest") == before["digest"]
            assert digests(host, name, 2) == [written(2), base]
            assert digests(host, clone, 2) == [written(1), written(3)]
        assert xen.collapse(name)
        assert digests(host, name, 2) == [written(2), base]


@pytest.mark.long
def test_hvm_guest_that_is_not_captured(
    *, host: emulation.Host, xen: engine.Engine, hvm: dict[str, Any]
) -> None:
    """It goes on, and so does its device model; nothing is left. What was captured is checked."""
    with parent(host, **with_disks(hvm, host.run(guest.make_disks, "parent"))) as name:
        for failing, done in (("save", False), ("save", True), ("lay", True)):
            with pytest.raises(exception.CaptureFailed, match="a fault"):
                host.run(fork_in_vain, xen.options, name, failing, done=done)
            assert host.run(guest.device_model_status, name) == "running"
            write(host, name, 0, seed=1)
        with forked(xen, name) as image:
            host.run(guest.suspend, name, image.uuid)
            host.run(guest.stop_device_model, name)
        assert host.run(guest.device_model_status, name) == "running"
        assert counts(host, name)
        with forked(xen, name) as image:
            known = descriptor.Descriptor.decode(image.descriptor)
            state = stream.parse(known.device_state, host.run(guest.version))
            emulator = state.emulator or b""
            video = (descriptor.RamBlock("f0000", 64 * MIB),)
            clone = f"{name}-1"
            for altered, blocks, error in (
                (None, known.ram_blocks, exception.InvalidDescriptor),
                (emulator, video, exception.InvalidDescriptor),
                (emulator[: len(emulator) // 2], known.ram_blocks, exception.SpawnFailed),
            ):
                stated = stream.compose(dataclasses.replace(state, emulator=altered))
                other = dataclasses.replace(known, device_state=stated, ram_blocks=blocks)
                changed = dataclasses.replace(image, descriptor=other.encode())
                with pytest.raises(error):
                    spawn_hvm(host, xen, hvm, changed, clone)
                assert host.run(guest.number, clone) is None
        host.run(guest.ask, name, "tick")
