# SPDX-License-Identifier: Apache-2.0
"""The state of a Xen guest beside its memory: what libxc saves of a domain of type HVM.

PVH guests are of that type too, and have no device model. Sources, of Xen 4.17:
xen/include/public/hvm/params.h, xen/include/public/arch-x86/hvm/save.h and xen/arch/x86/hvm/save.c
(the context), tools/libs/guest/xg_sr_save_x86_hvm.c and xg_sr_restore_x86_hvm.c (what is saved, and
what becomes of it).
"""

from collections.abc import Mapping
import dataclasses
import enum
import re
import struct

from nova_snowflock import descriptor
from nova_snowflock import exception

PAGE_SIZE = descriptor.PAGE_SIZE

MAX_FRAMES = descriptor.MAX_FILE_SIZE // PAGE_SIZE
"""Guest frames are below. libxc has a bit for each frame up to the highest it is given."""
MAX_PAGES = 1 << 14
"""Pages that a state carries: few, as the guest's memory is in the image."""
DEVICE_FRAMES = range(0xF0000, 0x100000)
"""Where devices of HVM guests have their memory, unless they have very much: from
HVM_BELOW_4G_MMIO_START (xen/include/public/hvm/e820.h) to 4 GiB. What is there of the guest's own
is video memory, or Xen's and its tools'."""
MAX_CONTEXT = 8 << 20
"""Bytes. Xen 4.17 writes less than 20 KiB for each of at most 128 processors."""

CPUID_LEAF = 24
"""Bytes of struct xen_cpuid_leaf (xen/include/public/arch-x86/xen.h)."""
MSR_ENTRY = 16
"""Bytes of struct xen_msr_entry."""
# Xen 4.17 writes at most 120 leaves and 2 entries.
_MAX_LEAVES = 4096
_MAX_MSRS = 4096

_DESCRIPTOR = struct.Struct("<HHI")  # struct hvm_save_descriptor: type, instance, length
_HEADER = struct.Struct("<HHIII")  # of the first entry, with the begin of struct hvm_save_header
_TYPE_END = 0
_TYPE_HEADER = 1
_TYPE_CPU = 2
_MAGIC = 0x54381286
_VERSION = 1

# What QEMU writes of its devices begins with this (qemu_save_device_state() in migration/savevm.c),
# and is some 100 KiB.
_EMULATOR = b"QEVM\0\0\0\3"
_MAX_EMULATOR = 16 << 20

# What libxl__save_emulator_xenstore_data() writes, and no other part of xenstore. There are three
# for each of QEMU's own few memory regions.
_MAX_XENSTORE = 64 << 10
_PHYSMAP = re.compile(rb"(physmap/[0-9a-f]{1,16}/(start_addr|size|name)\0[\x20-\x7e]{0,255}\0)+")


class Param(enum.IntEnum):
    """HVM parameters. Those named PFN are guest frame numbers."""

    CALLBACK_IRQ = 0
    STORE_PFN = 1
    STORE_EVTCHN = 2
    IOREQ_PFN = 5
    BUFIOREQ_PFN = 6
    VIRIDIAN = 9
    IDENT_PT = 12
    """Guest physical address of a page table that maps 4 GiB to themselves. Processors of Intel
    without "unrestricted guest" run on it while the guest's paging is off."""
    CONSOLE_PFN = 17
    CONSOLE_EVTCHN = 18
    ACPI_IOPORTS_LOCATION = 19
    PAGING_RING_PFN = 27
    MONITOR_RING_PFN = 28
    SHARING_RING_PFN = 29
    IOREQ_SERVER_PFN = 32
    NR_IOREQ_SERVER_PAGES = 33
    VM_GENERATION_ID_ADDR = 34
    X87_FIP_WIDTH = 36
    VM86_TSS_SIZED = 37
    """Guest physical address in the low half, bytes in the high one."""
    MCA_CAP = 38


SAVED = (
    Param.STORE_PFN,
    Param.IOREQ_PFN,
    Param.BUFIOREQ_PFN,
    Param.PAGING_RING_PFN,
    Param.MONITOR_RING_PFN,
    Param.SHARING_RING_PFN,
    Param.VM86_TSS_SIZED,
    Param.CONSOLE_PFN,
    Param.ACPI_IOPORTS_LOCATION,
    Param.VIRIDIAN,
    Param.IDENT_PT,
    Param.VM_GENERATION_ID_ADDR,
    Param.IOREQ_SERVER_PFN,
    Param.NR_IOREQ_SERVER_PAGES,
    Param.X87_FIP_WIDTH,
    Param.MCA_CAP,
)
"""What libxc saves of them, in its order, unless it is 0 (write_hvm_params). A restore sets all;
those of event channels it sets to the channels that libxl made for the new domain."""

CLEARED = (Param.STORE_PFN, Param.CONSOLE_PFN, Param.IOREQ_PFN, Param.BUFIOREQ_PFN)
"""Those whose page a restore fills with zeros when it comes to the parameter (handle_hvm_params).
It goes on if there is no such page then."""

_FRAMES = (
    *CLEARED,
    Param.PAGING_RING_PFN,
    Param.MONITOR_RING_PFN,
    Param.SHARING_RING_PFN,
)
_ADDRESSES = (Param.IDENT_PT, Param.VM_GENERATION_ID_ADDR)
# hvm_set_param(): Xen has a bit of an unsigned long for each, and cuts a longer TSS short.
_MAX_IOREQ_PAGES = 64
_MAX_TSS = 0x68 + 0x100 // 8 + 0x10000 // 8 + 1


def special_pfns(params: Mapping[int, int]) -> dict[int, Param]:
    """The guest frames that the tools, Xen or the processor use, each with its parameter.

    :param params: values of HVM parameters by index; 0 is none
    """
    frames: dict[int, Param] = {}

    def add(first: int, count: int, param: Param) -> None:
        frames.update(dict.fromkeys(range(first, first + count), param))

    for param in _FRAMES:
        if params.get(param):
            add(params[param], 1, param)
    for param in _ADDRESSES:
        if params.get(param):
            add(params[param] // PAGE_SIZE, 1, param)
    if params.get(Param.IOREQ_SERVER_PFN):
        count = min(params.get(Param.NR_IOREQ_SERVER_PAGES, 0), _MAX_IOREQ_PAGES)
        add(params[Param.IOREQ_SERVER_PFN], count, Param.IOREQ_SERVER_PFN)
    if params.get(Param.VM86_TSS_SIZED):
        size, start = divmod(params[Param.VM86_TSS_SIZED], 1 << 32)
        first = start // PAGE_SIZE
        last = (start + max(min(size, _MAX_TSS), 1) - 1) // PAGE_SIZE
        add(first, last - first + 1, Param.VM86_TSS_SIZED)
    return frames


@dataclasses.dataclass(frozen=True)
class Tsc:
    """The time stamp counter, as XEN_DOMCTL_gettscinfo gives it (xen/arch/x86/time.c).

    :param mode: 0 native where that is the same to the guest, else emulated; 1 always emulated;
        2 never
    :param khz: the guest's frequency; 0 in mode 2
    :param nsec: time since the guest's counter was 0; 0 in mode 2
    :param incarnation: how often it was set
    """

    mode: int
    khz: int
    nsec: int
    incarnation: int


@dataclasses.dataclass(frozen=True)
class State:
    """The state of a guest; one that exists has been checked.

    :param xen_version: major and minor, of the Xen that it was read from
    :param cpuid: array of struct xen_cpuid_leaf
    :param msrs: array of struct xen_msr_entry
    :param hvm_context: what XEN_DOMCTL_gethvmcontext gives
    :param hvm_params: values of :data:`SAVED` parameters by index; not 0
    :param pages: contents by guest frame, of those that are to be there when the state is restored
    :param emulator: state of the QEMU that is the guest's device model; None if it has none (PVH)
    :param emulator_xenstore: what that QEMU has in xenstore, keys and values with a NUL after each
    :raises InvalidStream: it is not one; the message says what is wrong
    """

    xen_version: tuple[int, int]
    cpuid: bytes
    msrs: bytes
    tsc: Tsc
    hvm_context: bytes
    hvm_params: Mapping[int, int]
    pages: Mapping[int, bytes] = dataclasses.field(default_factory=dict)
    emulator: bytes | None = None
    emulator_xenstore: bytes | None = None

    def __post_init__(self) -> None:
        # libxc has 0 for the unknown release before it had a version.
        if not 0 < self.xen_version[0] < 1 << 16 or not 0 <= self.xen_version[1] < 1 << 16:
            raise exception.InvalidStream(
                f"There is no Xen {self.xen_version[0]}.{self.xen_version[1]}"
            )
        if not self.cpuid:
            raise exception.InvalidStream("The state has no CPUID leaves")
        _check_array(self.cpuid, CPUID_LEAF, _MAX_LEAVES, "CPUID leaves")
        _check_array(self.msrs, MSR_ENTRY, _MAX_MSRS, "MSRs")
        if self.tsc.mode not in (0, 1, 2) or self.tsc.nsec >= 1 << 63:
            raise exception.InvalidStream(
                f"The time stamp counter has mode {self.tsc.mode} and {self.tsc.nsec} ns"
            )
        _check_context(self.hvm_context)
        _check_params(self.hvm_params)
        if len(self.pages) > MAX_PAGES:
            raise exception.InvalidStream(f"The state carries {len(self.pages)} pages")
        for pfn, content in self.pages.items():
            if not 0 <= pfn < MAX_FRAMES:
                raise exception.InvalidStream(f"The state carries a page for frame {pfn:#x}")
            if len(content) != PAGE_SIZE:
                raise exception.InvalidStream(f"Frame {pfn:#x} has {len(content)} bytes")
        if self.emulator is not None and (
            not self.emulator.startswith(_EMULATOR) or len(self.emulator) > _MAX_EMULATOR
        ):
            raise exception.InvalidStream(
                f"The state of the device model, {len(self.emulator)} bytes, is not QEMU's"
            )
        if self.emulator_xenstore is not None:
            if self.emulator is None:
                raise exception.InvalidStream("There is xenstore data, but no device model")
            if len(self.emulator_xenstore) > _MAX_XENSTORE or not _PHYSMAP.fullmatch(
                self.emulator_xenstore
            ):
                raise exception.InvalidStream("The device model's xenstore data is ill-formed")


def _check_array(data: bytes, size: int, most: int, what: str) -> None:
    if len(data) % size or len(data) > size * most:
        raise exception.InvalidStream(f"The {what} have {len(data)} bytes")


def _check_context(data: bytes) -> None:
    """Check that the entries of a context follow each other up to its end.

    What is in them is for Xen to check, as it does (hvm_load).
    """
    if len(data) > MAX_CONTEXT:
        raise exception.InvalidStream(f"The HVM context has {len(data)} bytes")
    if len(data) < _HEADER.size:
        raise exception.InvalidStream(f"The HVM context is truncated: {len(data)} bytes")
    kind, _, _, magic, version = _HEADER.unpack_from(data)
    if (kind, magic, version) != (_TYPE_HEADER, _MAGIC, _VERSION):
        raise exception.InvalidStream("The HVM context has no header")
    position = processors = 0
    while kind != _TYPE_END:
        if position + _DESCRIPTOR.size > len(data):
            raise exception.InvalidStream("The HVM context does not end")
        kind, instance, length = _DESCRIPTOR.unpack_from(data, position)
        if (length == 0) != (kind == _TYPE_END):
            raise exception.InvalidStream(
                f"Entry {kind}/{instance} of the HVM context has {length} bytes"
            )
        position += _DESCRIPTOR.size + length
        processors += kind == _TYPE_CPU
    if position != len(data):
        raise exception.InvalidStream(
            f"The HVM context has {len(data) - position} bytes after its end"
        )
    if not processors:
        raise exception.InvalidStream("The HVM context has no state of a processor")


def _check_params(params: Mapping[int, int]) -> None:
    for index, value in params.items():
        if index not in SAVED:
            raise exception.InvalidStream(f"The HVM parameter {index} is none that is saved")
        if not 0 < value < 1 << 64:
            raise exception.InvalidStream(f"The HVM parameter {index} cannot be {value:#x}")
    for param in (Param.STORE_PFN, Param.CONSOLE_PFN):
        if param not in params:
            raise exception.InvalidStream(f"The HVM parameter {param.name} is missing")
    for pfn, param in special_pfns(params).items():
        if pfn >= MAX_FRAMES:
            raise exception.InvalidStream(f"The HVM parameter {param.name} means frame {pfn:#x}")
