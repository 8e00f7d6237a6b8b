# SPDX-License-Identifier: Apache-2.0
"""Which guests are refused, and that none is touched by it; captures that fail half-way."""

from collections.abc import Callable, Iterator
import dataclasses
import os
import pathlib
import re
import select
import signal
import subprocess
import sys
import threading
from typing import Any
import uuid

import libvirt
from oslo_config import cfg
import pytest

from nova_snowflock import conf as snowflock_conf
from nova_snowflock import descriptor
from nova_snowflock import exception
from nova_snowflock.memtap import control
from nova_snowflock.memtap import process
from nova_snowflock.virt import connections
from nova_snowflock.virt import hypervisor
from nova_snowflock.virt.qemu import driver
from nova_snowflock.virt.qemu import freeze
from nova_snowflock.virt.qemu import monitor
from tests import emulation
from tests.guest import domain

RUN_PATH = "/run/nova-snowflock"
KEY = bytes(range(32))


# In the host


def back_end(address: str = "127.0.0.1") -> driver.QemuHypervisor:
    libvirt.registerErrorHandler(lambda *_: None, None)
    conf = cfg.ConfigOpts()
    snowflock_conf.register_opts(conf)
    conf([])
    conf.set_override("address", address, "snowflock")
    conf.set_override("distribution", "unicast", "snowflock")
    os.makedirs(RUN_PATH, exist_ok=True)
    return driver.QemuHypervisor(connections.Connections("qemu:///system"), conf)


def lookup(name: str) -> libvirt.virDomain:
    return libvirt.open("qemu:///system").lookupByName(name)


def in_host_probe(name: str) -> str | None:
    return back_end().probe(lookup(name))


def in_host_prepare_refused(name: str, image: str) -> str:
    with pytest.raises(exception.CannotFork) as caught:
        back_end().prepare(lookup(name), image, KEY)
    assert os.listdir(RUN_PATH) == []
    return str(caught.value)


def in_host_suspend(name: str, stopped: bool) -> None:
    guest = lookup(name)
    guest.suspend() if stopped else guest.resume()


def in_host_state(name: str) -> int:
    return int(lookup(name).state()[0])


def in_host_without(capability: str, name: str) -> str:
    """Probe in a process without a capability."""
    code = (
        "import sys\n"
        "from tests.system import test_probe\n"
        "print(test_probe.in_host_probe(sys.argv[1]))\n"
    )
    drop = f"-{capability}"
    command = ["setpriv", "--bounding-set", drop, "--inh-caps", drop]
    outcome = subprocess.run(
        [*command, sys.executable, "-c", code, name], capture_output=True, check=True, text=True
    )
    return outcome.stdout.strip()


def processes_of_image() -> list[int]:
    """Return frozen processes, memory servers and memtaps of this host."""
    found = []
    for path in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes()
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"nova_snowflock.memtap" in command or (b"qemu-system" in command and state in "Tt"):
            found.append(int(path.name))
    return found


def in_host_failed_capture(name: str, step: str) -> tuple[str, int, list[str], list[int], Any]:
    """Capture with one step that fails; return the cause and what is there afterwards."""

    def fail(*_: Any, **__: Any) -> Any:
        raise exception.SnowFlockError(f"{step} went wrong on purpose")

    owner, attribute = {
        "device state": (monitor.DeviceState, "save"),
        "freeze": (freeze.Freezer, "freeze"),
        "settle": (freeze.Freezer, "settle"),
        "publish": (control.MemoryServerClient, "publish"),
        "serve": (control.MemoryServerClient, "serve"),
    }[step]
    hypervisor_back_end, image = back_end(), str(uuid.uuid4())
    preparation = hypervisor_back_end.prepare(lookup(name), image, KEY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, attribute, fail)
        with pytest.raises(exception.CaptureFailed) as caught:
            hypervisor_back_end.capture(preparation)
    return (str(caught.value), in_host_state(name), os.listdir(RUN_PATH), *leftovers(name))


def leftovers(name: str) -> tuple[list[int], Any]:
    added = [
        entry
        for entry in monitor.Monitor(lookup(name)).command("query-fdsets")
        if not all("serial" in fd.get("opaque", "") for fd in entry["fds"])
    ]
    threads = [thread.name for thread in threading.enumerate() if "freeze" in thread.name]
    return processes_of_image(), (added, threads)


def in_host_capture(name: str, image: str) -> tuple[bytes, float, dict[str, float]]:
    hypervisor_back_end = back_end()
    capture = hypervisor_back_end.capture(hypervisor_back_end.prepare(lookup(name), image, KEY))
    return capture.descriptor.encode(), capture.pause, dict(capture.stages)


def in_host_restart(data: bytes) -> list[Any]:
    """Kill the memory server, then start it again; return what it says before and afterwards."""
    captured = descriptor.Descriptor.decode(data)
    directory = os.path.join(RUN_PATH, captured.image)
    says = []
    server = process.find_memory_server(directory)
    assert server is not None
    says.append(server.status())
    pidfd = os.pidfd_open(server.status()["pid"])
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    select.select([pidfd], [], [], 10)
    os.close(pidfd)
    assert process.find_memory_server(directory) is None
    for _ in range(2):  # the second time there is nothing to do
        back_end().resume_serving(captured, KEY)
        server = process.find_memory_server(directory)
        assert server is not None
        says.append(server.status())
    return says


def in_host_restart_refused(data: bytes) -> str:
    with pytest.raises(exception.ControlError) as caught:
        back_end().resume_serving(descriptor.Descriptor.decode(data), KEY)
    return str(caught.value)


def in_host_release(image: str) -> None:
    back_end().release(image)


def in_host_files(image: str) -> dict[str, int]:
    directory = pathlib.Path(RUN_PATH, image)
    paths = [directory, *directory.iterdir()]
    return {path.name: path.stat().st_mode & 0o777 for path in paths}


def in_host_spawn_refused(data: bytes) -> tuple[str, list[str]]:
    captured = descriptor.Descriptor.decode(data)
    with pytest.raises(exception.SnowFlockError) as caught:
        back_end().spawn(captured, KEY, hypervisor.Identity("clone", str(uuid.uuid4()), 1))
    return str(caught.value), os.listdir(RUN_PATH)


# The tests


@pytest.fixture(scope="module")
def host(hosts: list[emulation.Host]) -> emulation.Host:
    return hosts[0]


@pytest.fixture(scope="module")
def guest(host: emulation.Host) -> Iterator[str]:
    name = "probed"
    domain.boot(host, name, 256, fill_mib=4)
    with domain.client(host, name) as client:
        client.call("tick")
    yield name
    domain.destroy(host, name)


def ticks(host: emulation.Host, name: str) -> int:
    with domain.client(host, name) as client:
        return int(client.call("tick")["tick"])


def test_ordinary_guest_can_be_forked(host: emulation.Host, guest: str) -> None:
    assert host.run(in_host_probe, guest) is None


def test_paused_guest_is_refused_and_stays_paused(host: emulation.Host, guest: str) -> None:
    host.run(in_host_suspend, guest, True)
    try:
        assert host.run(in_host_probe, guest) == "it is paused, not running"
        refused = host.run(in_host_prepare_refused, guest, str(uuid.uuid4()))
        assert refused == "it is paused, not running"
        assert host.run(in_host_state, guest) == libvirt.VIR_DOMAIN_PAUSED
    finally:
        host.run(in_host_suspend, guest, False)


@pytest.mark.parametrize("capability", ["sys_ptrace", "sys_admin"])
def test_without_privilege_it_is_refused(host: emulation.Host, guest: str, capability: str) -> None:
    before = ticks(host, guest)
    reason = str(host.run(in_host_without, capability, guest))
    assert f"this process lacks CAP_{capability.upper()}" in reason
    assert ticks(host, guest) > before


def before_vcpu(element: str) -> Callable[[str], str]:
    return lambda xml: xml.replace("<vcpu", f"{element}<vcpu", 1)


def with_element(parent: str, element: str) -> Callable[[str], str]:
    return lambda xml: xml.replace(f"</{parent}>", f"{element}</{parent}>", 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            before_vcpu(
                "<memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>"
            ),
            "its memory is shared with other processes",
        ),
        (
            before_vcpu("<memoryBacking><source type='file'/></memoryBacking>"),
            "its memory is in a file",
        ),
        (
            lambda xml: re.sub(
                r"<cpu mode='maximum'/>",
                "<cpu mode='maximum'><numa>"
                "<cell id='0' cpus='0' memory='256' unit='MiB'/></numa></cpu>",
                xml,
            ),
            "it has NUMA nodes",
        ),
        (
            with_element(
                "devices",
                "<disk type='file' device='disk'><source file='/var/lib/libvirt/images/d'/>"
                "<driver name='qemu' type='raw' cache='none'/><target dev='vda' bus='virtio'/>"
                "<shareable/></disk>",
            ),
            "its disk vda is shared with other guests",
        ),
    ],
    ids=["shared", "file", "numa", "disk"],
)
def test_guest_of_another_kind_is_refused(
    host: emulation.Host, change: Callable[[str], str], reason: str
) -> None:
    disk = host.path("/var/lib/libvirt/images/d")
    disk.parent.mkdir(exist_ok=True)
    disk.touch()
    os.truncate(disk, 1 << 20)
    name = "refused"
    domain.start(host, change(domain.xml(name, 256, fill_mib=4)))
    try:
        assert reason in str(host.run(in_host_probe, name))
        assert reason in host.run(in_host_prepare_refused, name, str(uuid.uuid4()))
        assert host.run(in_host_state, name) == libvirt.VIR_DOMAIN_RUNNING
    finally:
        domain.destroy(host, name)


@pytest.mark.parametrize("step", ["device state", "freeze", "settle", "publish", "serve"])
def test_failed_capture_leaves_a_running_guest_and_nothing_else(
    host: emulation.Host, guest: str, step: str
) -> None:
    before = ticks(host, guest)
    cause, state, files, processes, others = host.run(in_host_failed_capture, guest, step)
    assert cause == f"{step} went wrong on purpose"
    assert state == libvirt.VIR_DOMAIN_RUNNING
    assert files == []
    assert processes == []
    assert others == ([], [])
    assert ticks(host, guest) > before


def test_capture_and_release(host: emulation.Host, guest: str) -> None:
    image = str(uuid.uuid4())
    data, pause, stages = host.run(in_host_capture, guest, image)
    try:
        files = host.run(in_host_files, image)
        assert files.pop(image) == 0o700
        assert set(files) >= {"frozen", "server.sock"}
        assert {mode & 0o077 for mode in files.values()} == {0}
        captured = descriptor.Descriptor.decode(data)
        assert captured.image == image
        assert captured.file(1).size == 256 << 20
        assert pause == pytest.approx(sum(stages.values()))
        assert KEY not in data
    finally:
        host.run(in_host_release, image)
    processes, others = host.run(leftovers, guest)
    assert (processes, others) == ([], ([], []))
    host.run(in_host_release, image)  # once more does no harm


def test_memory_server_is_restarted(host: emulation.Host, guest: str) -> None:
    image = str(uuid.uuid4())
    data, _, _ = host.run(in_host_capture, guest, image)
    try:
        before, after, again = host.run(in_host_restart, data)
        assert (after["state"], after["servers"]) == ("serving", before["servers"])
        assert after["pid"] == again["pid"] != before["pid"]
    finally:
        host.run(in_host_release, image)
    assert "is not on this host any more" in host.run(in_host_restart_refused, data)


def test_spawn_that_fails_leaves_nothing(hosts: list[emulation.Host], guest: str) -> None:
    image = str(uuid.uuid4())
    data, _, _ = hosts[0].run(in_host_capture, guest, image)
    try:
        captured = descriptor.Descriptor.decode(data)
        for change, reason in (
            ({"hypervisor": "xen"}, "of the hypervisor xen"),
            ({"hypervisor_version": "99.0.0"}, "is older than the image's 99.0.0"),
            ({"machine_type": "pc-q35-99"}, "contradict"),
            ({"device_state": b"nothing"}, "truncated"),
        ):
            altered = dataclasses.replace(captured, **change)
            message, files = hosts[1].run(in_host_spawn_refused, altered.encode())
            assert reason in message
            assert files == []
        # The kernel that the guest was booted with is not on that host: QEMU does not start.
        kernel = hosts[1].path(f"{domain.BOOT}/vmlinuz")
        kernel.unlink(missing_ok=True)
        message, files = hosts[1].run(in_host_spawn_refused, data)
        assert "could not be started" in message
        assert files == []
    finally:
        hosts[0].run(in_host_release, image)
