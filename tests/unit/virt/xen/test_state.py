# SPDX-License-Identifier: Apache-2.0
"""The state of a Xen guest: what is one, and which frames are special."""

import dataclasses
import struct
from typing import Any

import pytest

from nova_snowflock import exception
from nova_snowflock.virt.xen import state as xen_state
from tests.unit.virt.xen import golden

Param = xen_state.Param
PVH = xen_state.State(
    xen_version=golden.VERSION,
    cpuid=golden.CPUID,
    msrs=golden.MSRS,
    tsc=xen_state.Tsc(0, 2_400_000, 77_000_000_000, 1),
    hvm_context=golden.CONTEXT,
    hvm_params=dict(golden.PARAMS),
    pages=golden.PAGES,
)
END = struct.pack("<HHI", 0, 0, 0)
HEADER = golden.CONTEXT[:32]


def with_param(param: Param, value: int) -> dict[int, int]:
    return dict(golden.PARAMS) | {param: value}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"xen_version": (0, 2)}, "no Xen 0.2"),
        ({"xen_version": (4, 1 << 16)}, "no Xen 4.65536"),
        ({"cpuid": b""}, "no CPUID leaves"),
        ({"cpuid": bytes(25)}, "CPUID leaves have 25"),
        ({"cpuid": bytes(24 * 4097)}, "CPUID leaves have 98328"),
        ({"msrs": bytes(15)}, "MSRs have 15"),
        ({"tsc": xen_state.Tsc(3, 0, 0, 0)}, "mode 3"),
        ({"tsc": xen_state.Tsc(1, 1, 1 << 63, 0)}, "9223372036854775808 ns"),
        ({"hvm_context": b""}, "context is truncated"),
        ({"hvm_context": bytes(8 << 20) + b"\0"}, "context has 8388609"),
        ({"hvm_context": bytes(100)}, "no header"),
        ({"hvm_context": golden.CONTEXT.replace(b"\x86", b"\x87", 1)}, "no header"),
        ({"hvm_context": golden.CONTEXT[:-8]}, "does not end"),
        ({"hvm_context": golden.CONTEXT[:-20]}, "does not end"),
        ({"hvm_context": golden.CONTEXT + bytes(8)}, "8 bytes after"),
        ({"hvm_context": HEADER + END}, "no state of a processor"),
        ({"hvm_context": HEADER + struct.pack("<HHI", 2, 0, 0) + END}, "Entry 2/0"),
        ({"hvm_context": HEADER + struct.pack("<HHI", 0, 0, 8) + bytes(8)}, "Entry 0/0"),
        ({"hvm_params": with_param(Param.CALLBACK_IRQ, 1)}, "parameter 0 is none"),
        ({"hvm_params": {39: 1}}, "parameter 39 is none"),
        ({"hvm_params": with_param(Param.VIRIDIAN, 0)}, "parameter 9 cannot be 0"),
        ({"hvm_params": with_param(Param.VIRIDIAN, 1 << 64)}, "parameter 9 cannot be"),
        ({"hvm_params": {Param.CONSOLE_PFN: 1}}, "STORE_PFN is missing"),
        ({"hvm_params": {Param.STORE_PFN: 1}}, "CONSOLE_PFN is missing"),
        ({"hvm_params": with_param(Param.STORE_PFN, 1 << 40)}, "STORE_PFN means frame 0x100"),
        ({"hvm_params": with_param(Param.IDENT_PT, 1 << 42)}, "IDENT_PT means frame 0x40000000"),
        ({"pages": {1 << 30: bytes(4096)}}, "page for frame 0x40000000"),
        ({"pages": {-1: bytes(4096)}}, "page for frame -0x1"),
        ({"pages": {5: bytes(4095)}}, "Frame 0x5 has 4095"),
        ({"pages": dict.fromkeys(range(1 << 14 | 1), bytes(4096))}, "carries 16385 pages"),
        ({"emulator": b""}, "is not QEMU's"),
        ({"emulator": golden.QEMU + bytes(16 << 20)}, "is not QEMU's"),
        ({"emulator_xenstore": golden.XENSTORE}, "but no device model"),
    ],
)
def test_refused_with_what_is_wrong(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(exception.InvalidStream, match=reason):
        dataclasses.replace(PVH, **changes)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        golden.XENSTORE[:-1],
        golden.XENSTORE + b"\0",
        golden.XENSTORE * 1000,
        b"physmap/1/size\0",
        b"state\0running\0",
        b"/local/domain/0/name\0x\0",
        b"physmap/../size\x001\0",
        b"physmap/1/size\0\n\0",
    ],
)
def test_no_other_xenstore_data(data: bytes) -> None:
    with pytest.raises(exception.InvalidStream, match="xenstore data is ill-formed"):
        dataclasses.replace(PVH, emulator=golden.QEMU, emulator_xenstore=data)


def test_special_frames_of_a_pvh_guest() -> None:
    assert xen_state.special_pfns(dict(golden.PARAMS)) == {
        0xFEFF8: Param.PAGING_RING_PFN,
        0xFEFF9: Param.MONITOR_RING_PFN,
        0xFEFFA: Param.SHARING_RING_PFN,
        0xFEFFB: Param.BUFIOREQ_PFN,
        0xFEFFC: Param.STORE_PFN,
        0xFEFFD: Param.IOREQ_PFN,
        0xFEFFE: Param.IDENT_PT,
        0xFEFFF: Param.CONSOLE_PFN,
    }


def test_special_frames_that_are_ranges_or_addresses() -> None:
    frames = xen_state.special_pfns(
        {
            Param.IOREQ_SERVER_PFN: 0xFEFF0,
            Param.NR_IOREQ_SERVER_PAGES: 3,
            Param.VM86_TSS_SIZED: 0x2069 << 32 | 0xFC000FFF,
            Param.VM_GENERATION_ID_ADDR: 0xFC00A040,
            Param.STORE_PFN: 0,
            Param.VIRIDIAN: 5,
        }
    )
    servers = dict.fromkeys((0xFEFF0, 0xFEFF1, 0xFEFF2), Param.IOREQ_SERVER_PFN)
    tss = dict.fromkeys((0xFC000, 0xFC001, 0xFC002, 0xFC003), Param.VM86_TSS_SIZED)
    assert frames == servers | tss | {0xFC00A: Param.VM_GENERATION_ID_ADDR}


def test_special_ranges_are_bounded() -> None:
    most = 2**64 - 1
    frames = xen_state.special_pfns(
        {
            Param.IOREQ_SERVER_PFN: 1,
            Param.NR_IOREQ_SERVER_PAGES: most,
            Param.VM86_TSS_SIZED: most,
        }
    )
    assert len(frames) == 64 + 4


def test_what_is_cleared_is_saved() -> None:
    assert set(xen_state.CLEARED) < set(xen_state.SAVED)
    assert len(set(xen_state.SAVED)) == len(xen_state.SAVED) == 16
