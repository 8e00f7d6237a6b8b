# SPDX-License-Identifier: Apache-2.0
"""What a guest must be to be forked, and what a fork has to know of it."""

import base64
from collections.abc import Iterator
import dataclasses
import os
from typing import Any

import libvirt

from nova_snowflock import descriptor
from nova_snowflock import exception
from nova_snowflock.virt import libvirt_xml
from nova_snowflock.virt.disks import files
from nova_snowflock.virt.qemu import domain_xml
from nova_snowflock.virt.qemu import freeze
from nova_snowflock.virt.qemu import monitor
from nova_snowflock.virt.qemu import procfs
from nova_snowflock.virt.qemu import stream

# Where libvirt keeps QEMU's pid (src/qemu/qemu_conf.c, stateDir).
_LIBVIRT_STATE = "/run/libvirt/qemu"
_PAGE_SIZE = descriptor.PAGE_SIZE
_ZERO_PAGE = bytes(_PAGE_SIZE)
_STATES = {
    libvirt.VIR_DOMAIN_BLOCKED: "blocked",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "being shut down",
    libvirt.VIR_DOMAIN_SHUTOFF: "shut off",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "suspended by its kernel",
}


@dataclasses.dataclass(frozen=True)
class Guest:
    """A guest that can be forked.

    :param qemu: its QEMU's monitor
    :param pid: of its QEMU
    :param xml: what clones derive from
    :param cpu: its ``<cpu>`` element
    :param version: its QEMU's
    :param blocks: its RAM blocks, its memory first
    :param disks: its disks that clones have layers of their own of
    :param memory_file: what its memory is a private mapping of, if it is a clone itself
    """

    domain: libvirt.virDomain
    qemu: monitor.Monitor
    pid: int
    xml: str
    cpu: str
    machine_type: str
    vcpus: int
    version: str
    blocks: tuple[monitor.RamBlock, ...]
    disks: tuple[files.Disk, ...]
    memory_file: str | None

    @property
    def writable(self) -> list[tuple[str, int, int]]:
        """Name, address in QEMU and bytes of each block it can write to, its memory first."""
        return [
            (block.name, block.address, block.size)
            for block in self.blocks
            if block.address is not None
        ]

    @property
    def clone_blocks(self) -> tuple[descriptor.RamBlock, ...]:
        """The RAM blocks of a clone: its own, but for the name of its memory."""
        memory, *others = self.blocks
        return (
            descriptor.RamBlock(domain_xml.MEMORY, memory.size),
            *(descriptor.RamBlock(block.name, block.size) for block in others),
        )

    @property
    def file(self) -> dict[str, Any]:
        """Its memory, as the memory server's command ``publish`` takes it."""
        memory = self.blocks[0]
        file = {
            "number": descriptor.MEMORY_FILE,
            "name": "memory",
            "size": memory.size,
            "kind": "process",
            "ranges": [[memory.address, memory.size]],
        }
        if self.memory_file is not None:
            file["mapped"] = self.memory_file
            file["below"] = base64.b64encode(_page_map_below(self.memory_file)).decode()
        return file

    def small_pages(self, memory: int) -> Iterator[stream.Page]:
        """The pages of the RAM blocks beside its memory that are not zero.

        :param memory: descriptor of the frozen process's memory
        """
        for name, address, size in self.writable[1:]:
            content = os.pread(memory, size, address)
            if len(content) != size:
                raise exception.SourceLost("The process that holds the frozen memory has ended")
            for start in range(0, len(content), _PAGE_SIZE):
                page = content[start : start + _PAGE_SIZE]
                if page != _ZERO_PAGE:
                    yield stream.Page(name, start, page)

    def check_unchanged(self) -> None:
        """:raises CannotFork: it is not what it was when it was examined"""
        if self.domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
            raise exception.CannotFork("it was stopped meanwhile")
        if _portable_xml(self.domain) != self.xml:
            raise exception.CannotFork("it was changed meanwhile")


def examine(domain: libvirt.virDomain) -> Guest:
    """What a fork has to know of the guest, which this does not disturb.

    :raises CannotFork: the reason
    :raises SnowFlockError: QEMU or the XML makes no sense, so it cannot be forked either
    :raises OSError: QEMU has ended or is hidden
    :raises libvirt.libvirtError: libvirt refuses
    """
    hypervisor = domain.connect().getType()
    if hypervisor != "QEMU":
        raise exception.CannotFork(f"it runs on {hypervisor}, not on QEMU")
    state, _ = domain.state()
    if state != libvirt.VIR_DOMAIN_RUNNING:
        what = _STATES.get(state, "in an unknown state")
        raise exception.CannotFork(f"it is {what}, not running")
    xml = _portable_xml(domain)
    root = libvirt_xml.parse(xml)
    _refuse(domain_xml.refusal(root))
    live = libvirt_xml.parse(domain.XMLDesc())
    disks = tuple(files.writable(live))
    for disk in disks:
        disk.chain()
        # A merge of layers, which may be the engine's own, gives way to a fork.
        kind = domain.blockJobInfo(disk.target).get("type")
        if kind not in (None, libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT):
            raise exception.CannotFork(f"libvirt is busy with a job on its disk {disk.target}")
    if domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE:
        raise exception.CannotFork("libvirt is busy with another job on it, such as a migration")
    pid = qemu_pid(domain)
    _refuse(freeze.refusal(pid))
    qemu = monitor.Monitor(domain)
    blockers = qemu.migration_blockers()
    if blockers:
        raise exception.CannotFork(f"QEMU could not save it: {'; '.join(blockers)}")
    guest = Guest(
        domain=domain,
        qemu=qemu,
        pid=pid,
        xml=xml,
        cpu=domain_xml.cpu(root),
        machine_type=domain_xml.machine_type(root),
        vcpus=domain.maxVcpus(),
        version=qemu.version(),
        blocks=tuple(qemu.ram_blocks()),
        disks=disks,
        memory_file=domain_xml.memory_file(live),
    )
    _refuse(_memory_refusal(guest))
    return guest


def _page_map_below(memory_file: str) -> bytes:
    """Which pages have content in the memory of the image that a clone came from, encoded.

    :raises InvalidDescriptor: memtap does not present that image's descriptor beside it
    """
    path = os.path.join(os.path.dirname(memory_file), "descriptor")
    with open(path, "rb") as file:
        image = descriptor.Descriptor.decode(file.read())
    return image.file(descriptor.MEMORY_FILE).page_map


def _refuse(reason: str | None) -> None:
    if reason is not None:
        raise exception.CannotFork(reason)


def _portable_xml(domain: libvirt.virDomain) -> str:
    secure = libvirt.VIR_DOMAIN_XML_SECURE
    return domain_xml.portable(
        domain.XMLDesc(secure | libvirt.VIR_DOMAIN_XML_MIGRATABLE), domain.XMLDesc(secure)
    )


def qemu_pid(domain: libvirt.virDomain) -> int:
    """The PID of the domain's QEMU.

    :raises OSError: it has none
    :raises CannotFork: what libvirt says is not its QEMU
    """
    path = os.path.join(_LIBVIRT_STATE, f"{domain.name()}.pid")
    with open(path, encoding="ascii") as file:
        pid = int(file.read())
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        if domain.UUIDString().encode() not in file.read().split(b"\0"):
            raise exception.CannotFork(f"the process {pid} in {path} is not its QEMU")
    return pid


def _memory_refusal(guest: Guest) -> str | None:
    """Why not every page of the guest's RAM is private to QEMU and 4 KiB, or None."""
    for block in guest.blocks:
        if block.page_size != _PAGE_SIZE:
            return f"its memory {block.name} is on huge pages of {block.page_size} bytes"
    mappings = procfs.maps(guest.pid)
    for name, position, size in guest.writable:
        end = position + size
        for mapping in mappings:
            if mapping.start <= position < min(mapping.end, end):
                if mapping.mode[3] != "p":
                    return f"its memory {name} is shared with other processes"
                if mapping.inode and mapping.path != guest.memory_file:
                    return f"its memory {name} is in a file"
                position = mapping.end
        if position < end:
            return f"its memory {name} is not in one piece in QEMU"
    return None
