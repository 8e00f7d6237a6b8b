# SPDX-License-Identifier: Apache-2.0
"""What a descriptor and a host must be for a clone to start."""

import libvirt
from oslo_log import log as logging

from nova_snowflock import descriptor as image_descriptor
from nova_snowflock import exception
from nova_snowflock.virt import libvirt_xml
from nova_snowflock.virt.disks import disk_xml
from nova_snowflock.virt.qemu import domain_xml
from nova_snowflock.virt.qemu import guest
from nova_snowflock.virt.qemu import inject
from nova_snowflock.virt.qemu import procfs
from nova_snowflock.virt.qemu import stream
from nova_snowflock.virt.qemu import x86_64

LOG = logging.getLogger(__name__)

_MADV_NOHUGEPAGE = 15  # include/uapi/asm-generic/mman-common.h

HYPERVISOR = "qemu"
"""The back end's name in descriptors."""


def check_descriptor(descriptor: image_descriptor.Descriptor) -> image_descriptor.File:
    """The guest's memory in a descriptor that is QEMU's and does not contradict itself.

    :raises InvalidDescriptor: it is not
    """
    if descriptor.hypervisor != HYPERVISOR:
        raise exception.InvalidDescriptor(f"The image is of the hypervisor {descriptor.hypervisor}")
    try:
        incoming = stream.parse(descriptor.device_state)
        root = libvirt_xml.parse(descriptor.domain)
        machine_type = domain_xml.machine_type(root)
        reason = domain_xml.refusal(root)
    except (exception.InvalidStream, exception.InvalidDomain) as error:
        raise exception.InvalidDescriptor(f"The descriptor is invalid: {error}") from error
    if reason is not None:
        raise exception.InvalidDescriptor(f"The descriptor's guest cannot be a clone: {reason}")
    if domain_xml.cpu(root) != descriptor.cpu:
        raise exception.InvalidDescriptor("The descriptor's processors contradict each other")
    if not incoming.machine_type == machine_type == descriptor.machine_type:
        raise exception.InvalidDescriptor("The descriptor's machine types contradict each other")
    if incoming.ram_blocks != descriptor.ram_blocks:
        raise exception.InvalidDescriptor("The descriptor's RAM blocks contradict each other")
    sizes = {block.name: block.size for block in descriptor.ram_blocks}
    try:
        memory = descriptor.file(image_descriptor.MEMORY_FILE)
    except KeyError:
        raise exception.InvalidDescriptor("The descriptor has no memory") from None
    if memory.size != sizes.get(domain_xml.MEMORY):
        raise exception.InvalidDescriptor("The descriptor's memory is not its RAM block's size")
    forked = [
        disk_xml.target(disk) for disk in root.iterfind("devices/disk") if disk_xml.is_forked(disk)
    ]
    if sorted(forked) != sorted(disk.target for disk in descriptor.disks):
        raise exception.InvalidDescriptor("The descriptor's disks are not those of its domain")
    return memory


def check_host(connection: libvirt.virConnect, descriptor: image_descriptor.Descriptor) -> None:
    """:raises SpawnFailed: this host cannot run clones of the image"""
    root = libvirt_xml.parse(descriptor.domain)
    os_type = root.find("os/type")
    kind = root.get("type")
    arch = os_type.get("arch") if os_type is not None else None
    own = connection.getVersion()
    version = f"{own // 1000000}.{own // 1000 % 1000}.{own % 1000}"
    if _version(version) < _version(descriptor.hypervisor_version):
        raise exception.SpawnFailed(
            f"This host's QEMU {version} is older than the image's {descriptor.hypervisor_version}"
        )
    try:
        connection.getDomainCapabilities(None, arch, descriptor.machine_type, kind)
        cpu = root.find("cpu")
        if cpu is not None and cpu.get("mode", "custom") == "custom":
            connection.compareHypervisorCPU(
                None,
                arch,
                descriptor.machine_type,
                kind,
                descriptor.cpu,
                # Else nobody is told what is missing.
                libvirt.VIR_CONNECT_COMPARE_CPU_FAIL_INCOMPATIBLE,
            )
    except libvirt.libvirtError as error:
        raise exception.SpawnFailed(
            f"This host cannot run the image {descriptor.image}: {error}"
        ) from error


def use_small_pages(domain: libvirt.virDomain, mount: str) -> None:
    """Take back what QEMU asked of the kernel for the clone's memory: huge pages.

    A file has none to give, but in memory with that wish the kernel reads 4 MiB ahead of each fault
    (mm/filemap.c, do_sync_mmap_readahead). A clone for which this fails runs, but faults slowly.

    :param mount: where memtap presents the memory that it maps
    """
    try:
        pid = guest.qemu_pid(domain)
        for mapping in procfs.maps(pid):
            if mapping.path.startswith(f"{mount}/"):
                length = mapping.end - mapping.start
                inject.system_call(pid, x86_64.NR_MADVISE, mapping.start, length, _MADV_NOHUGEPAGE)
    except (OSError, exception.CannotFork) as error:
        LOG.warning("The clone %s will fault slowly: %s", domain.name(), error)


def _version(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split("."))
    except ValueError:
        raise exception.InvalidDescriptor(f"{text!r} is not a version of QEMU") from None
