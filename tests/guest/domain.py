# SPDX-License-Identifier: Apache-2.0
"""Run the test guest on an emulated host, through that host's libvirt."""

import os
import pathlib
import shutil
import uuid

import libvirt
from lxml import etree

from tests.emulation import harness
from tests.guest import client as guest_client
from tests.guest import workload

IMAGE = pathlib.Path(os.environ.get("SNOWFLOCK_GUEST", harness.REPOSITORY / "build/guest"))
# The place for kernels in libvirt's state directory: QEMU's user may read it.
BOOT = "/var/lib/libvirt/boot"

# An ordinary server, as Nova would make it; only the disk and the network interface are missing.
TEMPLATE = """\
<domain type='qemu'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>{vcpus}</vcpu>
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <kernel>{boot}/vmlinuz</kernel>
    <initrd>{boot}/initrd.gz</initrd>
    <cmdline>{cmdline}</cmdline>
  </os>
  <features><acpi/><apic/></features>
  <cpu mode='maximum'/>
  <on_reboot>destroy</on_reboot>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <serial type='file'><source path='/var/lib/libvirt/qemu/{name}.console'/></serial>
    <channel type='unix'><target type='virtio' name='{port}'/></channel>
    <memballoon model='virtio' freePageReporting='on'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    <video><model type='virtio'/></video>
    <graphics type='vnc' autoport='yes' listen='127.0.0.1'/>
    <input type='tablet' bus='usb'/>
  </devices>
</domain>
"""


def xml(
    name: str, memory_mib: int = 512, *, vcpus: int = 1, fill_mib: int = 64, tick_ms: int = 10
) -> str:
    """Domain XML of a test guest.

    It keeps `fill_mib` MiB of random data and counts every `tick_ms` milliseconds.
    """
    parameters = f"snowflock.fill={fill_mib} snowflock.tick_ms={tick_ms}"
    return TEMPLATE.format(
        name=name,
        uuid=uuid.uuid4(),
        memory_mib=memory_mib,
        vcpus=vcpus,
        cmdline=f"console=ttyS0 quiet panic=-1 {parameters}",
        boot=BOOT,
        port=workload.PORT_NAME,
    )


def boot(host: harness.Host, name: str, memory_mib: int = 512, **options: int) -> None:
    """Define and start the guest that :func:`xml` describes. Returns when QEMU runs."""
    start(host, xml(name, memory_mib, **options))


def start(host: harness.Host, description: str) -> None:
    """Define and start a domain that boots the test guest's kernel."""
    install_kernel(host)
    host.run(_start, description)


def install_kernel(host: harness.Host) -> None:
    """Have the files that domains on this host boot from, as Nova has a server's image there."""
    for file in ("vmlinuz", "initrd.gz"):
        target = host.path(f"{BOOT}/{file}")
        if not target.exists():
            shutil.copyfile(IMAGE / file, target)


def client(host: harness.Host, name: str, timeout: float = 60.0) -> guest_client.GuestClient:
    """A connection to the guest's workload, which answers as soon as it is ready."""
    return guest_client.GuestClient(str(host.path(host.run(port_path, name))), timeout)


def destroy(host: harness.Host, name: str) -> None:
    """End the guest, whether it runs or not, and forget its definition."""
    host.run(_destroy, name)


def _start(description: str) -> None:
    with libvirt.open("qemu:///system") as connection:
        connection.defineXML(description).create()


def _destroy(name: str) -> None:
    with libvirt.open("qemu:///system") as connection:
        domain = connection.lookupByName(name)
        # A clone has no definition: it is forgotten when it ends.
        persistent = domain.isPersistent()
        if domain.isActive():
            domain.destroy()
        if persistent:
            domain.undefine()


def port_path(name: str) -> str:
    """On the host: the UNIX socket of the domain's port to the workload."""
    with libvirt.open("qemu:///system") as connection:
        description = etree.fromstring(connection.lookupByName(name).XMLDesc())
    source = description.find(f"devices/channel/target[@name='{workload.PORT_NAME}']/../source")
    if source is None:
        raise LookupError(f"domain {name} has no channel {workload.PORT_NAME}")
    return str(source.attrib["path"])
