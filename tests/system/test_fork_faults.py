# SPDX-License-Identifier: Apache-2.0
"""What goes wrong with forks, on real guests: none of it costs a guest anything, or leaves a trace.

Failures after the guest was stopped are caused, not faked: QEMU, the kernel or the memory server
refuse what this makes of the preparation.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import time
from typing import Any
import uuid

import libvirt
import pytest

from demo import checks
from nova_snowflock import descriptor
from nova_snowflock import exception
from nova_snowflock.virt import connections
from nova_snowflock.virt import hypervisor
from tests import emulation
from tests import engine
from tests.guest import client as guest_client
from tests.guest import domain

FILL_MIB = 64


@pytest.fixture(scope="module")
def engines(hosts: list[emulation.Host]) -> list[engine.Engine]:
    for host in hosts:
        domain.install_kernel(host)
    return [engine.Engine(host, population="lazy") for host in hosts]


@pytest.fixture(scope="module")
def parent(engines: list[engine.Engine]) -> Iterator[guest_client.GuestClient]:
    """A guest on the first host that the tests share: it runs on, whatever they do."""
    domain.boot(engines[0].host, "parent", 320, fill_mib=FILL_MIB)
    try:
        with domain.client(engines[0].host, "parent") as guest:
            guest.call("tick")
            yield guest
    finally:
        domain.destroy(engines[0].host, "parent")


@pytest.fixture(autouse=True)
def nothing_remains(engines: list[engine.Engine]) -> Iterator[None]:
    before = [one.footprint() for one in engines]
    yield
    after = [one.footprint() for one in engines]
    assert [new - old for new, old in zip(after, before, strict=True)] == [set()] * 3


@pytest.fixture
def image(engines: list[engine.Engine], parent: guest_client.GuestClient) -> Iterator[engine.Image]:
    result = engines[0].fork("parent")
    try:
        yield result
    finally:
        for one in engines:
            one.release(result.uuid)


@contextlib.contextmanager
def spawned(home: engine.Engine, image: engine.Image) -> Iterator[guest_client.GuestClient]:
    name = f"clone-{secrets.token_hex(2)}"
    home.spawn(image, name)
    try:
        with domain.client(home.host, name) as guest:
            yield guest
    finally:
        # It may have ended with its memory.
        with contextlib.suppress(libvirt.libvirtError):
            domain.destroy(home.host, name)


@contextlib.contextmanager
def runs_on(guest: guest_client.GuestClient) -> Iterator[None]:
    """A guest that counts on without a break, and keeps its data."""
    digest = guest.call("digest")
    first = guest.call("tick")["tick"]
    yield
    wait_until(lambda: guest.call("tick")["tick"] > first)
    checks.count_is_unbroken("the parent", guest.call("history", count=2000))
    assert guest.call("digest") == digest


# What happens on a host


def identity_of(name: str) -> tuple[int, int, int]:
    """The domain's state and its QEMU: pid and start, which change if it is disturbed for good."""
    found = engine.find_domain(name)
    pid = engine.qemu_pid(name) if found.isActive() else 0
    started = os.stat(f"/proc/{pid}").st_ctime_ns if pid else 0
    return found.state()[0], pid, started


def change_state(name: str, method: str) -> None:
    getattr(engine.find_domain(name), method)()


def define(description: str) -> None:
    libvirt.open("qemu:///system").defineXML(description)


def make_disk(path: str) -> None:
    with open(path, "wb") as disk:
        disk.truncate(1 << 20)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    os.kill(pid, number)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Guests that cannot be forked

DISK = "/var/lib/libvirt/images/disk.raw"
REFUSED = {
    "shared": (
        "<memory",
        "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking><memory",
        "shared with other processes",
    ),
    "memfd": (
        "<memory",
        "<memoryBacking><source type='memfd'/></memoryBacking><memory",
        "its memory is in a memfd",
    ),
    "huge pages": (
        "<memory",
        "<memoryBacking><hugepages/></memoryBacking><memory",
        "on huge pages",
    ),
    "NUMA": (
        "<cpu mode='maximum'/>",
        "<cpu mode='maximum'><numa><cell id='0' cpus='0' memory='256' unit='MiB'/></numa></cpu>",
        "NUMA",
    ),
    "shared disk": (
        "</devices>",
        f"<disk type='file'><driver name='qemu' type='raw' cache='none'/><source file='{DISK}'/>"
        "<target dev='vda' bus='virtio'/><shareable/></disk></devices>",
        "shared with other guests",
    ),
    "network interface of one guest": (
        "</devices>",
        "<interface type='udp'><source address='127.0.0.1' port='5555'><local address='127.0.0.1' "
        "port='5556'/></source></interface></devices>",
        "network interface of type udp",
    ),
}


@pytest.fixture
def huge_pages() -> Iterator[None]:
    """Room for one guest on huge pages; the kernel makes as much of it as it can."""
    count = pathlib.Path("/proc/sys/vm/nr_hugepages")
    if not os.access(count, os.W_OK):
        yield
        return
    before = count.read_text()
    count.write_text(str(int(before) + 256 // 2))
    try:
        yield
    finally:
        count.write_text(before)


@pytest.mark.usefixtures("huge_pages")
@pytest.mark.parametrize("kind", REFUSED)
def test_guest_of_another_kind_is_refused(engines: list[engine.Engine], kind: str) -> None:
    old, new, reason = REFUSED[kind]
    host = engines[0].host
    host.run(make_disk, DISK)
    description = domain.xml("odd", 256).replace(old, new, 1)
    try:
        domain.start(host, description)
    except libvirt.libvirtError as error:
        host.run(_forget, "odd")
        pytest.skip(f"this machine cannot run such a guest: {error}")
    refused_and_untouched(engines[0], "odd", reason)


def refused_and_untouched(home: engine.Engine, name: str, reason: str) -> None:
    host = home.host
    try:
        before = host.run(identity_of, name)
        assert reason in (home.probe(name) or "")
        with pytest.raises(exception.CannotFork, match=reason):
            home.fork(name)
        assert host.run(identity_of, name) == before
        assert before[0] == libvirt.VIR_DOMAIN_RUNNING
    finally:
        domain.destroy(host, name)


LUN = "/var/lib/libvirt/images/lun.raw"
TARGET = "iqn.2026-01.org.example:disk"
TGTADM = ("tgtadm", "--lld", "iscsi", "--tid", "1")


@pytest.fixture
def scsi_device(engines: list[engine.Engine]) -> Iterator[str]:
    """A SCSI device of the first host, as a guest's XML has it.

    It is one that QEMU reaches by iSCSI: the only kind that needs nothing of the machine.
    """
    host = engines[0].host
    host.run(make_disk, LUN)
    server = host.popen(["tgtd", "--foreground", "--iscsi", "portal=127.0.0.1:3260"])
    try:
        new_target = [*TGTADM, "--mode", "target", "--op", "new", "--targetname", TARGET]
        wait_until(lambda: host.popen(new_target).wait() == 0)
        for operation in (
            ["--mode", "logicalunit", "--op", "new", "--lun", "1", "--backing-store", LUN],
            ["--mode", "target", "--op", "bind", "--initiator-address", "127.0.0.1"],
        ):
            assert host.popen([*TGTADM, *operation]).wait() == 0
        yield (
            "<controller type='scsi' model='virtio-scsi'/><hostdev mode='subsystem' type='scsi'>"
            f"<source protocol='iscsi' name='{TARGET}/1'><host name='127.0.0.1' port='3260'/>"
            "</source></hostdev>"
        )
    finally:
        server.terminate()
        server.wait()


def test_guest_with_a_host_device_is_refused(
    engines: list[engine.Engine], scsi_device: str
) -> None:
    description = domain.xml("odd", 256).replace("</devices>", f"{scsi_device}</devices>", 1)
    domain.start(engines[0].host, description)
    refused_and_untouched(engines[0], "odd", "it has a host device")


def _forget(name: str) -> None:
    with contextlib.suppress(libvirt.libvirtError):
        engine.find_domain(name).undefine()


def test_paused_guest_is_refused(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    host = engines[0].host
    with runs_on(parent):
        host.run(change_state, "parent", "suspend")
        try:
            before = host.run(identity_of, "parent")
            assert "it is paused" in (engines[0].probe("parent") or "")
            with pytest.raises(exception.CannotFork, match="it is paused"):
                engines[0].fork("parent")
            assert host.run(identity_of, "parent") == before
        finally:
            host.run(change_state, "parent", "resume")


def test_guest_that_is_shut_off_is_refused(engines: list[engine.Engine]) -> None:
    host = engines[0].host
    host.run(define, domain.xml("off", 256))
    try:
        with pytest.raises(exception.CannotFork, match="it is shut off"):
            engines[0].fork("off")
        assert host.run(identity_of, "off") == (libvirt.VIR_DOMAIN_SHUTOFF, 0, 0)
    finally:
        domain.destroy(host, "off")


def fork_on_another_hypervisor() -> None:
    others = connections.Connections("test:///default")
    qemu = hypervisor.load(others, engine.configuration(()))
    guest = others.get().lookupByName("test")
    assert qemu.probe(guest) is not None
    try:
        qemu.prepare(guest, str(uuid.uuid4()), secrets.token_bytes(32))
    finally:
        assert guest.state()[0] == libvirt.VIR_DOMAIN_RUNNING


def test_other_hypervisor_is_refused(engines: list[engine.Engine]) -> None:
    with pytest.raises(exception.CannotFork, match="not on QEMU"):
        engines[0].host.run(fork_on_another_hypervisor)


def test_ptrace_is_not_permitted(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    """A service that lacks the capability says so before it stops anything."""
    source = "from tests import engine; print(engine._probe((), 'parent'))"
    unprivileged = ["setpriv", "--bounding-set=-sys_ptrace", "--inh-caps=-sys_ptrace"]
    with runs_on(parent):
        program = engines[0].host.popen(
            [*unprivileged, sys.executable, "-c", source], stdout=subprocess.PIPE, text=True
        )
        said, _ = program.communicate(timeout=60)
        assert said == "tracing QEMU is not permitted: this process lacks CAP_SYS_PTRACE\n"


# Failures after the guest was stopped


def refuse_device_state(preparation: Any) -> None:
    """QEMU has no such set of descriptors."""
    preparation.device_state._set = 4711


def refuse_freeze(preparation: Any) -> None:
    """QEMU has no memory there."""
    preparation.freezer._ranges = ((0x1000, 0x1000),)


def refuse_record(preparation: Any) -> None:
    """The record of the frozen process cannot be written, and what there is of it is no record."""
    pathlib.Path(preparation.server.path).with_name("frozen").touch()


def refuse_publish(preparation: Any) -> None:
    """A memory server publishes once."""
    null = os.open(os.devnull, os.O_RDONLY)
    entry = {"number": 1, "name": "memory", "kind": "file"}
    preparation.server.call("publish", (null,), files=[entry])
    os.close(null)


def end_server(preparation: Any) -> None:
    """The memory server ends between prepare and publish."""
    kill(preparation.server.peer())


def end_qemu(preparation: Any) -> None:
    """QEMU ends between its device state and the freeze."""
    save = preparation.device_state.save

    def save_and_die() -> None:
        save()
        pid = preparation.guest.pid
        kill(pid)
        wait_until(lambda: not pathlib.Path(f"/proc/{pid}/mem").exists(), 5)

    preparation.device_state.save = save_and_die


def fork_with(options: engine.Options, name: str, fault: Callable[[Any], None]) -> None:
    qemu = engine.back_end(options)
    image = str(uuid.uuid4())
    preparation = qemu.prepare(engine.find_domain(name), image, secrets.token_bytes(32))
    fault(preparation)
    qemu.capture(preparation)


@pytest.mark.parametrize(
    ("fault", "cause"),
    [
        (refuse_device_state, "xen-save-devices-state"),
        (refuse_freeze, "Cannot allocate memory"),
        (refuse_record, "File exists"),
        (refuse_publish, "published already"),
        (end_server, "does not answer"),
    ],
)
def test_failure_after_the_guest_was_stopped(
    engines: list[engine.Engine],
    parent: guest_client.GuestClient,
    fault: Callable[[Any], None],
    cause: str,
) -> None:
    before = engines[0].footprint()
    host = engines[0].host
    with runs_on(parent):
        with pytest.raises(exception.CaptureFailed, match=cause):
            host.run(fork_with, engines[0].options, "parent", fault)
        assert host.run(identity_of, "parent")[0] == libvirt.VIR_DOMAIN_RUNNING
        assert engines[0].footprint() == before


def test_fork_after_failures(
    engines: list[engine.Engine], parent: guest_client.GuestClient, image: engine.Image
) -> None:
    """Whatever failed before, the guest can be forked."""
    with spawned(engines[1], image) as clone:
        assert clone.call("digest") == parent.call("digest")


def test_qemu_ends_during_the_freeze(engines: list[engine.Engine]) -> None:
    host = engines[0].host
    domain.boot(host, "doomed", 256)
    try:
        before = engines[0].footprint()
        with pytest.raises(exception.CaptureFailed, match="died while it was being frozen"):
            host.run(fork_with, engines[0].options, "doomed", end_qemu)
        assert engines[0].footprint() == before
    finally:
        domain.destroy(host, "doomed")


# The data plane's processes


def test_memory_server_is_killed(
    engines: list[engine.Engine], parent: guest_client.GuestClient, image: engine.Image
) -> None:
    digest = parent.call("digest")
    home = engines[0]
    with spawned(engines[1], image) as clone, futures.ThreadPoolExecutor() as pool:
        clone.call("tick")
        home.host.run(kill, home.memory_server(image.uuid)["pid"])
        waiting = pool.submit(clone.call, "digest", timeout=120)
        wait_until(lambda: engines[1].memtap(image.uuid)["state"] == "stalled")
        assert engines[1].memtap(image.uuid)["waiting"] >= 1
        assert not waiting.done()
        home.resume_serving(image)
        assert waiting.result() == digest
        assert engines[1].memtap(image.uuid)["state"] == "attached"
    assert parent.call("digest") == digest


def test_frozen_process_is_killed(
    engines: list[engine.Engine], parent: guest_client.GuestClient, image: engine.Image
) -> None:
    """Its memory is gone for good: this is said, and no clone reads anything else instead."""
    home = engines[0]
    with spawned(engines[1], image) as clone, runs_on(parent):
        clone.call("tick")
        home.host.run(kill_frozen, image.uuid)
        with pytest.raises(guest_client.GuestError):
            clone.call("digest", timeout=3)
        wait_until(lambda: home.memory_server(image.uuid)["state"] == "lost")
        assert home.memory_server(image.uuid)["reason"]
        home.host.run(kill, home.memory_server(image.uuid)["pid"])
        with pytest.raises(exception.ControlError, match="not on this host any more"):
            home.resume_serving(image)


def kill_frozen(image: str) -> None:
    record = json.loads(pathlib.Path(f"{engine.RUN_PATH}/{image}/frozen").read_text())
    kill(record["pid"])


def test_memtap_is_killed(
    engines: list[engine.Engine], parent: guest_client.GuestClient, image: engine.Image
) -> None:
    """Only the clones of that image on that host lose anything."""
    digest = parent.call("digest")
    other_image = engines[0].fork("parent")
    try:
        with (
            spawned(engines[1], image) as lost,
            spawned(engines[1], other_image) as neighbour,
            spawned(engines[2], image) as sibling,
            runs_on(parent),
        ):
            lost.call("tick")
            engines[1].host.run(kill, engines[1].memtap(image.uuid)["pid"])
            with pytest.raises((guest_client.GuestError, OSError)):
                lost.call("digest", timeout=3)
            with pytest.raises(LookupError):
                engines[1].memtap(image.uuid)
            assert neighbour.call("digest") == digest
            assert sibling.call("digest") == digest
    finally:
        for one in engines:
            one.release(other_image.uuid)


# Descriptors


def encoded(image: engine.Image, **changes: Any) -> bytes:
    decoded = descriptor.Descriptor.decode(image.descriptor)
    return dataclasses.replace(decoded, **changes).encode()


DAMAGE: dict[str, tuple[Callable[[engine.Image], bytes], str]] = {
    "empty": (lambda image: b"", "truncated"),
    "truncated": (lambda image: image.descriptor[:-1], "truncated"),
    "altered": (
        lambda image: image.descriptor[:-1] + bytes([image.descriptor[-1] ^ 1]),
        "was altered",
    ),
    "version": (
        lambda image: image.descriptor[:8] + b"\0\2" + image.descriptor[10:],
        "is of version 2",
    ),
    "magic": (lambda image: b"QFI\xfb" + image.descriptor[4:], "is not a descriptor"),
    "hypervisor": (lambda image: encoded(image, hypervisor="xen"), "of the hypervisor xen"),
    "machine type": (
        lambda image: encoded(image, machine_type="pc-i440fx-7.2"),
        "machine types contradict",
    ),
    "device state": (lambda image: encoded(image, device_state=b"QEVM"), "truncated"),
    "domain": (lambda image: encoded(image, domain="<domain"), "not well-formed"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_bad_descriptor_is_refused(
    engines: list[engine.Engine], image: engine.Image, damage: str
) -> None:
    make, reason = DAMAGE[damage]
    bad = dataclasses.replace(image, descriptor=make(image))
    before = engines[1].footprint()
    with pytest.raises(exception.InvalidDescriptor, match=reason):
        engines[1].spawn(bad, "never")
    assert engines[1].footprint() == before
    with pytest.raises(libvirt.libvirtError, match="not found"):
        engines[1].host.run(identity_of, "never")


def test_clone_that_cannot_start_leaves_nothing(
    engines: list[engine.Engine], parent: guest_client.GuestClient, image: engine.Image
) -> None:
    """Its name is taken on the host. Nor does it cost the clones that are there anything."""
    before = engines[1].footprint()
    domain.boot(engines[1].host, "taken", 256)
    try:
        with pytest.raises(exception.SpawnFailed, match="taken"):
            engines[1].spawn(image, "taken")
        assert engines[1].footprint() == before
        with spawned(engines[1], image) as clone:
            with pytest.raises(exception.SpawnFailed, match="taken"):
                engines[1].spawn(image, "taken")
            assert clone.call("digest") == parent.call("digest")
    finally:
        domain.destroy(engines[1].host, "taken")


def test_clone_does_not_wait_for_ever(
    engines: list[engine.Engine], parent: guest_client.GuestClient, image: engine.Image
) -> None:
    """Its server stands still before it has sent a page."""
    impatient = engine.Engine(engines[1].host, population="lazy", spawn_timeout=5)
    before = impatient.footprint()
    server = engines[0].memory_server(image.uuid)["pid"]
    engines[0].host.run(os.kill, server, signal.SIGSTOP)
    try:
        with pytest.raises(exception.SpawnFailed, match="within 5 s"):
            impatient.spawn(image, "waiting")
    finally:
        engines[0].host.run(os.kill, server, signal.SIGCONT)
    assert impatient.footprint() == before
    with spawned(impatient, image) as clone:
        assert clone.call("digest") == parent.call("digest")


# The page store

STORE = "/run/other-store"


def make_store() -> None:
    os.mkdir(STORE)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1g,mode=700", "tmpfs", STORE], check=True)


def leave_room(room: int) -> None:
    """Make the store's file system as large as what is in it and some bytes more."""
    use = os.statvfs(STORE)
    size = (use.f_blocks - use.f_bfree) * use.f_frsize + room
    subprocess.run(["mount", "-o", f"remount,size={size}", STORE], check=True)


def remove_store() -> None:
    subprocess.run(["umount", "--lazy", STORE], check=True)
    os.rmdir(STORE)


def test_store_is_full(
    engines: list[engine.Engine], parent: guest_client.GuestClient, image: engine.Image
) -> None:
    digest = parent.call("digest")
    home = engine.Engine(engines[1].host, store_path=STORE, population="lazy")
    home.host.run(make_store)
    try:
        with spawned(home, image) as clone, futures.ThreadPoolExecutor() as pool:
            clone.call("tick")
            home.host.run(leave_room, 1 << 20)
            waiting = pool.submit(clone.call, "digest", timeout=120)
            wait_until(lambda: home.memtap(image.uuid)["state"] == "store-full")
            assert "No space left on device" in home.memtap(image.uuid)["reason"]
            assert not waiting.done()
            home.host.run(leave_room, 1 << 30)
            assert waiting.result() == digest
            assert home.memtap(image.uuid)["state"] == "attached"
            assert home.memtap(image.uuid)["reason"] is None
    finally:
        home.release(image.uuid)
        home.host.run(remove_store)
