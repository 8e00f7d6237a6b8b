# SPDX-License-Identifier: Apache-2.0
"""The few things libvirt has no call for, asked from QEMU's own monitor through libvirt."""

from collections.abc import Mapping
import contextlib
import dataclasses
import json
import os
import re
from typing import Any, Self

import libvirt
import libvirt_qemu
from oslo_log import log as logging

from nova_snowflock import exception

LOG = logging.getLogger(__name__)

# hmp `info ramblock` (softmmu/physmem.c, ram_block_format()): name, page size, offset, used and
# total length; from QEMU 8.2 on also the host address and whether it is read-only.
_RAM_BLOCK = re.compile(
    r"^\s*(?P<name>\S+)\s+(?P<page>\d+) (?P<unit>[KMGT]iB)"
    r"\s+0x[0-9a-f]+\s+0x(?P<used>[0-9a-f]+)\s+0x[0-9a-f]+"
    r"(?:\s+0x(?P<address>[0-9a-f]+)\s+(?P<mode>ro|rw))?\s*$"
)
_UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
# hmp `info mtree -f` (softmmu/memory.c, mtree_print_flatview()).
_ADDRESS_SPACE = re.compile(r'^ AS "(?P<name>.*)", root: ')
_FLAT_RANGE = re.compile(
    r"^  (?P<start>[0-9a-f]{16})-[0-9a-f]{16} \(prio -?\d+, ram\): (?P<name>\S+)"
    r"(?: @(?P<offset>[0-9a-f]{16}))?(?: .*)?$"
)
# hmp `gpa2hva`.
_HOST_ADDRESS = re.compile(r"Host virtual address for 0x[0-9a-f]+ \((.*)\) is 0x([0-9a-f]+)\s*")


@dataclasses.dataclass(frozen=True)
class RamBlock:
    """A RAM block of a running QEMU.

    :param size: bytes
    :param page_size: bytes
    :param address: in the QEMU process; None if it could not be found or the block is not one that
        a guest writes to
    """

    name: str
    size: int
    page_size: int
    address: int | None = None


@dataclasses.dataclass(frozen=True)
class Mapped:
    """Where guest RAM is in the guest's physical address space.

    :param offset: bytes from the start of its memory region
    """

    guest_address: int
    offset: int


def parse_ram_blocks(text: str) -> list[RamBlock]:
    """The blocks in the output of ``info ramblock``.

    Blocks without a name, which QEMU does not migrate, are left out.

    :raises MonitorError: there are none
    """
    blocks = []
    for line in text.splitlines():
        match = _RAM_BLOCK.match(line)
        if match is None:
            continue
        address = int(match["address"], 16) if match["mode"] == "rw" else None
        page_size = int(match["page"]) * _UNITS[match["unit"]]
        blocks.append(RamBlock(match["name"], int(match["used"], 16), page_size, address))
    if not blocks:
        raise exception.MonitorError(f"QEMU names no RAM blocks: {text[:200]!r}")
    return blocks


def parse_memory_tree(text: str) -> dict[str, Mapped]:
    """RAM that the output of ``info mtree -f`` shows in the guest, by the name of its region.

    Regions that share a name cannot be told apart and are left out, as are read-only ones.
    """
    regions: dict[str, Mapped] = {}
    ambiguous: set[str] = set()
    in_memory = False
    for line in text.splitlines():
        if line.startswith("FlatView"):
            in_memory = False
        elif space := _ADDRESS_SPACE.match(line):
            in_memory = in_memory or space["name"] == "memory"
        elif in_memory and (found := _FLAT_RANGE.match(line)):
            place = Mapped(int(found["start"], 16), int(found["offset"] or "0", 16))
            known = regions.setdefault(found["name"], place)
            # Ranges of one region go up in both address spaces.
            if known is not place and place.offset <= known.offset:
                ambiguous.add(found["name"])
    return {name: place for name, place in regions.items() if name not in ambiguous}


class Monitor:
    """QEMU's monitor.

    Every call raises MonitorError if QEMU refuses, with its own message, or has ended.
    """

    def __init__(self, domain: libvirt.virDomain) -> None:
        self._domain = domain

    def command(
        self, name: str, arguments: Mapping[str, Any] | None = None, fd: int | None = None
    ) -> Any:
        """What a QMP command returns.

        :param fd: a file descriptor, if it takes one
        """
        request = json.dumps({"execute": name, "arguments": arguments or {}})
        try:
            if fd is None:
                answer = libvirt_qemu.qemuMonitorCommand(self._domain, request, 0)
            else:
                answer, _ = libvirt_qemu.qemuMonitorCommandWithFiles(self._domain, request, [fd], 0)
        except libvirt.libvirtError as error:
            raise exception.MonitorError(f"The monitor command {name} failed: {error}") from error
        try:
            reply = json.loads(answer)
        except ValueError as error:
            raise exception.MonitorError(f"The answer to {name} is not JSON") from error
        if "return" not in reply:
            reason = reply.get("error", {}).get("desc", answer)
            raise exception.MonitorError(f"QEMU refused {name}: {reason}")
        return reply["return"]

    def human(self, line: str) -> str:
        """What a command of the human monitor prints."""
        return str(self.command("human-monitor-command", {"command-line": line}))

    def version(self) -> str:
        """QEMU's version, such as '7.2.22'."""
        qemu: Mapping[str, int] = self.command("query-version")["qemu"]
        return f"{qemu['major']}.{qemu['minor']}.{qemu['micro']}"

    def migration_blockers(self) -> list[str]:
        """Why QEMU would not migrate the guest; such a guest cannot be forked either."""
        return list(self.command("query-migrate").get("blocked-reasons", ()))

    def host_address(self, guest_address: int) -> tuple[str, int]:
        """Name of the memory region there, and its address in the QEMU process."""
        answer = self.human(f"gpa2hva {guest_address:#x}")
        match = _HOST_ADDRESS.fullmatch(answer)
        if match is None:
            raise exception.MonitorError(f"QEMU knows no RAM at {guest_address:#x}: {answer!r}")
        return match[1], int(match[2], 16)

    def ram_blocks(self) -> list[RamBlock]:
        """Every RAM block, with addresses where known; first the guest's memory, whose is."""
        blocks = parse_ram_blocks(self.human("info ramblock"))
        main, address = self.host_address(0)
        found = {main: address}
        if not any(block.address for block in blocks):
            for name, place in parse_memory_tree(self.human("info mtree -f")).items():
                if name == main:
                    continue
                # The guest may unmap a device's memory at any time.
                with contextlib.suppress(exception.MonitorError):
                    region, address = self.host_address(place.guest_address)
                    if region == name:
                        found[name] = address - place.offset
        blocks = _with_addresses(blocks, found)
        blocks.sort(key=lambda block: _region(block) != main)
        if _region(blocks[0]) != main or blocks[0].address != found[main]:
            raise exception.MonitorError(f"QEMU has no RAM block for the guest's memory {main!r}")
        return blocks


def _region(block: RamBlock) -> str:
    """Name of a block's memory region: the block's without the device it belongs to."""
    return block.name.rpartition("/")[2]


def _with_addresses(blocks: list[RamBlock], found: Mapping[str, int]) -> list[RamBlock]:
    names = [_region(block) for block in blocks]
    return [
        dataclasses.replace(block, address=found[name])
        if name in found and names.count(name) == 1
        else block
        for block, name in zip(blocks, names, strict=True)
    ]


class DeviceState:
    """Where QEMU writes its device state: a file in memory, passed as a descriptor, on no disk.

    xen-save-devices-state takes a path; /dev/fdset/N stands for a descriptor that was added to
    QEMU's set N, opened for what the command wants: writing only. Use as a context manager.

    :raises MonitorError: QEMU refuses, or has ended
    """

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._memory = os.memfd_create("snowflock-device-state", os.MFD_CLOEXEC)
        try:
            writer = os.open(f"/proc/self/fd/{self._memory}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                self._set = monitor.command("add-fd", fd=writer)["fdset-id"]
            finally:
                os.close(writer)
        except BaseException:
            os.close(self._memory)
            raise

    def save(self) -> None:
        """Have QEMU write its device state. The guest must be stopped and stays so."""
        self._monitor.command(
            "xen-save-devices-state", {"filename": f"/dev/fdset/{self._set}", "live": False}
        )

    def read(self) -> bytes:
        """What QEMU has written."""
        return os.pread(self._memory, os.fstat(self._memory).st_size, 0)

    def close(self) -> None:
        """Have QEMU forget the descriptor. Does not fail: QEMU may have ended. Idempotent."""
        if self._memory < 0:
            return
        os.close(self._memory)
        self._memory = -1
        try:
            self._monitor.command("remove-fd", {"fdset-id": self._set})
        except exception.MonitorError as error:
            LOG.warning("QEMU keeps an empty file descriptor set %d: %s", self._set, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
