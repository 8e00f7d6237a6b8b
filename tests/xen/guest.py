# SPDX-License-Identifier: Apache-2.0
"""Test guests of Xen. What is here runs in dom0."""

from collections.abc import Sequence
import contextlib
import functools
import os
import pathlib
import shutil
import subprocess
import tempfile
import threading
import time
from typing import Any

import libvirt
from lxml import etree

from devstack.xen import settings
from nova_snowflock.virt.disks import qcow2
from nova_snowflock.virt.xen import qmp
from tests.emulation import harness
from tests.guest import client as guest_client
from tests.guest import terminal

URI = "xen:///system"
OPTIONS = {
    "hypervisor": "xen",
    "connection_uri": URI,
    "interface": "lo",
    "mtu": 9000,
    "background_rate": settings.BACKGROUND_RATE,
}
"""Of the product's engine in dom0."""
INSTANCES = pathlib.Path("/root/instances")
BASE = INSTANCES / "_base/base"
"""What disks are based on: a file that every host has."""
BOOTABLE = pathlib.Path(f"{BASE}.bootable")
"""Another, of disks that HVM guests boot from."""
DISK_MIB = 32
# Of a base: has the BIOS boot from its second disk.
BOOT_SECTOR = bytes.fromhex(
    "31c0 8ed8 8ec0 8ed0 bc007c"  # ds, es and ss are 0, sp 7c00
    "be007c bf0006 b90001 fc f3a5"  # copy this from 7c00 to 600
    "ea1c060000"  # and go on there, behind this
    "b80102 bb007c b90100 ba8100 cd13"  # read the first sector of disk 81 to 7c00
    "ea007c0000"  # and go on there
)
IMAGE = harness.REPOSITORY / "build/guest"
BOOT_IMAGE = IMAGE / "xen.qcow2"
"""The disk that HVM guests boot from, as devstack.embedded.image builds it."""
BOOT_DISK = "sdb"
"""It, besides xvda, of which the BIOS reads one sector."""
TEMPLATE = """\
<domain type='xen'>
  <name>{name}</name>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>{vcpus}</vcpu>
  <cputune>{pins}</cputune>
  <os>
    <type arch='x86_64' machine='{machine}'>{kind}</type>
    {boot}
  </os>
  {features}
  <clock offset='utc'/>
  <on_reboot>restart</on_reboot>
  <devices>
    <console type='pty'><target type='xen' port='0'/></console>
    {devices}
  </devices>
</domain>
"""
PIN = f"<vcpupin vcpu='{{number}}' cpuset='{settings.GUEST_CPUS}'/>"
KERNEL = """\
<kernel>{image}/vmlinuz</kernel>
<initrd>{image}/initrd.gz</initrd>
<cmdline>{cmdline}</cmdline>
"""
DISK = """\
<disk type='file' device='disk'>
  <driver name='{driver}' type='{format}'/><source file='{path}'/>
  <target dev='{target}' bus='{bus}'/>
</disk>
"""
INTERFACE = """\
<interface type='bridge'><mac address='{mac}'/><source bridge='{bridge}'/></interface>
"""
BRIDGE = "snowbr0"
ADDRESS = "192.0.2.1"
"""Of dom0 on the bridge."""
# A guest that counts at its usual pace takes all that the emulator has.
CMDLINE = (
    "console=hvc0 quiet panic=-1 mitigations=off snowflock.port=/dev/hvc0 snowflock.tick_ms=100 "
    "snowflock.fill={fill_mib}"
)
KINDS = {
    "pvh": ("xenpvh", "xenpvh", KERNEL, ""),
    "pv": ("xenpv", "linux", KERNEL, ""),
    # QEMU gives a kernel to a BIOS byte by byte, and so it does what is on an IDE disk: that takes
    # minutes here. It boots from a SCSI disk.
    "hvm": ("xenfv", "hvm", "<boot dev='hd'/>", "<features><acpi/><apic/></features>"),
}
SCREEN = """\
<graphics type='vnc' autoport='yes'/>
<video><model type='vga' vram='16384'/></video>
"""
"""Of an HVM guest."""


@functools.cache
def connection() -> libvirt.virConnect:
    return libvirt.open(URI)


def describe(
    name: str,
    *,
    memory_mib: int = 128,
    vcpus: int = 1,
    fill_mib: int = 16,
    kind: str = "pvh",
    devices: Sequence[str] = (),
) -> str:
    """A guest's XML."""
    machine, os_type, boot, features = KINDS[kind]
    return TEMPLATE.format(
        name=name,
        memory_mib=memory_mib,
        vcpus=vcpus,
        pins="".join(PIN.format(number=number) for number in range(vcpus)),
        machine=machine,
        kind=os_type,
        boot=boot.format(image=IMAGE, cmdline=CMDLINE.format(fill_mib=fill_mib)),
        features=features,
        devices="".join(devices),
    )


def create(name: str, **options: Any) -> None:
    """Start a guest, and wait until its workload answers."""
    connection().createXML(describe(name, **options))
    ask(name, "tick")


_PATIENCE, _LOOK_AGAIN = 240.0, 10.0
# A console takes one connection at a time.
_asking = threading.Lock()


def ask(name: str, command: str, **arguments: Any) -> Any:
    """What a guest's workload answers to a command."""
    with _asking, _connected(name) as guest:
        return guest.call(command, timeout=_PATIENCE, **arguments)


def crash(name: str) -> None:
    """Have a guest's kernel panic. One without ACPI, as ours, has no way to power off."""
    with (
        _asking,
        _connected(name) as guest,
        contextlib.suppress(guest_client.GuestError, OSError),  # it does not answer that
    ):
        guest.call("run", argv=["sh", "-c", "echo c >/proc/sysrq-trigger"], timeout=10)


def number(name: str) -> int | None:
    """Xen's of a guest, if there is one of that name: another one for each start."""
    numbers = {domain.name(): domain.ID() for domain in connection().listAllDomains()}
    return numbers.get(name)


def pagers() -> list[int]:
    """Processes that bring clones their memory."""
    return [
        int(path.parent.name)
        for path in pathlib.Path("/proc").glob("[0-9]*/cmdline")
        if path.read_bytes().split(b"\0")[1:2] == [b"page"]
    ]


def _connected(name: str) -> terminal.ConsoleClient:
    root = etree.fromstring(connection().lookupByName(name).XMLDesc())
    console = root.find("devices/console[@type='pty']")
    assert console is not None
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return terminal.connect(str(console.get("tty")), _LOOK_AGAIN)
        except guest_client.GuestError:
            # One that is lost does not answer any more.
            if is_suspended(name) or time.monotonic() > deadline:
                raise


def device_model_status(name: str) -> str:
    """Whether the QEMU of an HVM guest is "running"."""
    monitor = qmp.Monitor(connection().lookupByName(name).ID())
    return str(monitor.command("query-status")["status"])


def stop_device_model(name: str) -> None:
    """Have the QEMU of an HVM guest that is suspended stop."""
    qmp.Monitor(connection().lookupByName(name).ID()).command("stop")


def video_memory(name: str) -> bytes:
    """What an HVM guest's screen shows as text, and in which font."""
    monitor = qmp.Monitor(connection().lookupByName(name).ID())
    [buses] = monitor.command("query-pci")
    [vga] = [device for device in buses["devices"] if device["class_info"]["class"] == 0x0300]
    [memory] = [region for region in vga["regions"] if region["bar"] == 0]
    with tempfile.NamedTemporaryFile() as file:
        arguments = {"val": memory["address"], "size": 256 << 10, "filename": file.name}
        monitor.command("pmemsave", arguments)
        return file.read()


def destroy(*names: str) -> None:
    """End guests that there may be."""
    for domain in connection().listAllDomains():
        if domain.name() in names:
            domain.destroy()


def make_disk(name: str, driver: str = "qemu") -> str:
    """Make a guest's disk xvda, on a base with random data; its XML."""
    if not BASE.exists():
        BASE.parent.mkdir(parents=True)
        sector = BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa"
        BASE.write_bytes(sector + os.urandom((DISK_MIB << 20) - len(sector)))
    qcow2.create_overlay(disk_path(name), str(BASE), "raw", DISK_MIB << 20)
    return disk_of(name, driver)


def make_disks(name: str) -> str:
    """Make an HVM guest's disks; their XML."""
    make_disk(name)
    if not BOOTABLE.exists():
        subprocess.run(["qemu-img", "convert", "-O", "raw", BOOT_IMAGE, BOOTABLE], check=True)
    qcow2.create_overlay(boot_disk_path(name), str(BOOTABLE), "raw", BOOTABLE.stat().st_size)
    return disks_of(name)


def disks_of(name: str) -> str:
    """The XML of an HVM guest's disks."""
    path = boot_disk_path(name)
    boot = DISK.format(driver="qemu", format="qcow2", path=path, target=BOOT_DISK, bus="scsi")
    return f"{disk_of(name)}{boot}"


def disk_of(name: str, driver: str = "qemu") -> str:
    """The XML of a guest's disk xvda."""
    path = INSTANCES / name / "disk"
    return DISK.format(driver=driver, format="qcow2", path=path, target="xvda", bus="xen")


def disk_path(name: str) -> str:
    """Of a guest's disk xvda, which is to be made: in a directory of its own."""
    directory = INSTANCES / name
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return str(directory / "disk")


def boot_disk_path(name: str) -> str:
    """Of an HVM guest's disk :data:`BOOT_DISK`, beside its other one."""
    return str(INSTANCES / name / "disk.boot")


def disk_files() -> list[str]:
    """The files of all guests' disks, but for their base."""
    found = [str(path.relative_to(INSTANCES)) for path in INSTANCES.rglob("*") if path.is_file()]
    return sorted({*found} - {str(BASE.relative_to(INSTANCES))})


def forget_disks() -> None:
    shutil.rmtree(INSTANCES, ignore_errors=True)


def interface(mac: str) -> str:
    """The XML of one that leads to dom0's bridge, which is made."""
    if not pathlib.Path("/sys/class/net", BRIDGE).exists():
        for argv in (
            f"link add {BRIDGE} type bridge",
            f"address add {ADDRESS}/24 dev {BRIDGE}",
            f"link set {BRIDGE} up",
        ):
            subprocess.run(["ip", *argv.split()], check=True)
    return INTERFACE.format(mac=mac, bridge=BRIDGE)


def suspend(name: str, image: str) -> None:
    """Suspend a guest as a fork does, and leave what says so in the image's directory."""
    domain = connection().lookupByName(name)
    node = f"/local/domain/{domain.ID()}/control/shutdown"
    subprocess.run(["xenstore-write", node, "suspend"], check=True)
    pathlib.Path(f"/run/nova-snowflock/{image}/stopped").write_text(domain.UUIDString())
    deadline = time.monotonic() + 60
    while not is_suspended(name):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_suspended(name: str) -> bool:
    listed = subprocess.run(["xl", "list", name], check=True, capture_output=True, text=True)
    return listed.stdout.splitlines()[-1].split()[4][3] == "s"


def version() -> tuple[int, int]:
    """Xen's."""
    number = connection().getVersion()
    return number // 1000000, number // 1000 % 1000


def footprint() -> set[str]:
    """What there is in dom0 of any image."""
    found = set()
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if "nova_snowflock.memtap" in command or "snowflock-xen" in command:
            found.add(f"process {path.parent.name} {command}")
    for directory in ("/run/nova-snowflock", "/var/lib/nova-snowflock"):
        found |= {f"file {path}" for path in pathlib.Path(directory).rglob("*")}
    mounts = pathlib.Path("/proc/self/mounts").read_text().splitlines()
    return found | {f"mount {line}" for line in mounts if "nova-snowflock" in line}
