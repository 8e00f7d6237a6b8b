# SPDX-License-Identifier: Apache-2.0
"""A Xen guest's state as bytes: the same as the specifications', and bad ones are refused."""

from collections.abc import Callable
import dataclasses
import os
import pathlib
import random
import struct
import subprocess
import sys

import pytest

from nova_snowflock import exception
from nova_snowflock.virt.xen import state as xen_state
from nova_snowflock.virt.xen import stream
from tests.unit.virt.xen import golden
from tests.unit.virt.xen.test_state import PVH

HVM = dataclasses.replace(PVH, emulator=golden.QEMU, emulator_xenstore=golden.XENSTORE)
TAIL = golden.record(0)
QEMU_UPSTREAM = struct.pack("<II", 2, 0)
PAGE = bytes(4096)
VERIFIERS = sorted(pathlib.Path("/usr/lib").glob("xen-*/bin/verify-stream-v2"))


def parse(data: bytes) -> xen_state.State:
    return stream.parse(data, golden.VERSION)


def test_pvh_guest_byte_for_byte() -> None:
    assert stream.compose(PVH) == golden.libxl()


def test_hvm_guest_byte_for_byte() -> None:
    assert stream.compose(HVM) == golden.libxl(tail=golden.HVM_TAIL)


def test_save_file_byte_for_byte() -> None:
    xml = "<domain>\N{SNOWFLAKE}</domain>"
    header = b"libvirt-xml\x0a\x20\x00\x20\x0d" + struct.pack("<II", 2, 20 + 1) + bytes(40)
    data = header + xml.encode() + b"\0" + golden.libxl()
    assert len(header) == 64
    assert stream.save_file(PVH, xml) == data


@pytest.mark.parametrize("xml", ["", "<domain/>\0", "x" * (16 << 20)])
def test_xml_that_libvirt_would_not_read(xml: str) -> None:
    with pytest.raises(exception.InvalidStream, match="cannot be in a save file"):
        stream.save_file(PVH, xml)


@pytest.mark.parametrize("state", [PVH, HVM, dataclasses.replace(PVH, msrs=b"", pages={})])
def test_round_trip(state: xen_state.State) -> None:
    assert parse(stream.compose(state)) == state


def test_many_pages_are_in_records_as_large_as_libxcs() -> None:
    pages = {pfn: struct.pack("<I", pfn) * 1024 for pfn in range(1500)}
    first = {pfn: pages[pfn] for pfn in range(1024)}
    second = {pfn: pages[pfn] for pfn in range(1024, 1500)}
    records = golden.page_data(first) + golden.page_data(second)
    state = dataclasses.replace(PVH, pages=dict(reversed(pages.items())))
    data = stream.compose(state)
    assert data == golden.libxl(golden.libxc(pages=records))
    assert parse(data) == state


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (b"LibxlFmu" + golden.libxl()[8:], "not a libxl stream"),
        (b"LibxlFmt\0\0\0\1\0\0\0\0", "libxl stream is of version 1"),
        (b"LibxlFmt\0\0\0\2\0\0\0\2", "version 2 with options 0x2"),
        (b"LibxlFmt\0\0\0\2\0\0\0\0" + golden.record(0), "does not begin with libxc"),
        (golden.libxl() + b"\0", "1 bytes after its end"),
        (golden.libxl(tail=golden.record(4) + golden.record(0)), "type 0x4 and 0 bytes"),
        (golden.libxl(tail=golden.record(0, b"x")), "type 0x0 and 1 bytes"),
        (golden.libxl(tail=golden.record(3, bytes(8)) + golden.record(0)), "another device model"),
        (golden.libxl(tail=golden.record(3, b"\2") + golden.record(0)), "another device model"),
        (
            golden.libxl(tail=golden.record(2, QEMU_UPSTREAM + golden.XENSTORE) + TAIL),
            "no device model",
        ),
        (golden.libxl(tail=golden.record(3, QEMU_UPSTREAM) + TAIL), "is not QEMU's"),
        (golden.libxl(tail=golden.HVM_TAIL[:-8] * 2 + TAIL), "type 0x2 and"),
    ],
)
def test_libxl_refused_with_what_is_wrong(data: bytes, reason: str) -> None:
    with pytest.raises(exception.InvalidStream, match=reason):
        parse(data)


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"\xfe" + golden.IMAGE_HEADER[1:] + golden.DOMAIN_HEADER, "not a libxc stream"),
        (golden.IMAGE_HEADER.replace(b"XENF", b"XENE"), "not a libxc stream"),
        (golden.IMAGE_HEADER.replace(b"\3", b"\2"), "libxc stream is of version 2"),
        (golden.IMAGE_HEADER[:16] + b"\0\1" + bytes(6), "options 0x1"),
        (golden.IMAGE_HEADER + struct.pack("<IHHII", 1, 12, 0, 4, 17), "domain of type 1"),
        (golden.IMAGE_HEADER + struct.pack("<IHHII", 2, 14, 0, 4, 17), r"2\^14 bytes"),
        (golden.IMAGE_HEADER + struct.pack("<IHHII", 2, 12, 0, 4, 18), "4.18, this host has 4.17"),
        (golden.IMAGE_HEADER + struct.pack("<IHHII", 2, 12, 0, 0, 2), "Xen 0.2, this host"),
    ],
)
def test_libxc_header_refused_with_what_is_wrong(header: bytes, reason: str) -> None:
    rest = golden.libxc()[len(header) :]
    with pytest.raises(exception.InvalidStream, match=reason):
        parse(golden.libxl(header + rest))


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        *(
            ({name: b""}, f"record {full} is missing")
            for name, full in {
                "cpuid": "X86_CPUID_POLICY",
                "static": "STATIC_DATA_END",
                "tsc": "X86_TSC_INFO",
                "context": "HVM_CONTEXT",
                "params": "HVM_PARAMS",
            }.items()
        ),
        *(
            ({name: golden.RECORDS[name] * 2}, f"record {full} is twice")
            for name, full in {"cpuid": "X86_CPUID_POLICY", "params": "HVM_PARAMS"}.items()
        ),
        ({"cpuid": golden.RECORDS["static"], "static": golden.RECORDS["cpuid"]}, "out of place"),
        ({"params": golden.RECORDS["params"] + golden.RECORDS["pages"]}, "PAGE_DATA is .* out of"),
        ({"tsc": golden.record(2, bytes(8))}, "unknown type 0x2"),
        ({"tsc": golden.record(0x0E)}, "unknown type 0xe"),
        ({"tsc": golden.record(0x7FFFFFFF)}, "unknown type 0x7fffffff"),
        ({"tsc": golden.record(0x80000001)}, "unknown type 0x80000001"),
        ({"static": golden.record(0x10, b"x")}, "STATIC_DATA_END is not empty"),
        ({"end": golden.record(0, bytes(8))}, "END is not empty"),
        ({"tsc": golden.record(8, golden.TSC + bytes(8))}, "counter's record has 32"),
        ({"context": struct.pack("<II", 9, 0xFFFFFFF0)}, "truncated: 4294967280 bytes wanted"),
        ({"cpuid": struct.pack("<II", 0x11, 25) + bytes(31) + b"\1"}, "What pads .* is not 0"),
        ({"params": golden.record(10)}, "HVM_PARAMS has not 0"),
        ({"params": golden.record(10, golden.HVM_PARAMS[:-16])}, "HVM_PARAMS has not 7"),
        ({"params": golden.record(10, golden.HVM_PARAMS + b"x")}, "parameters have 129 bytes"),
        (
            {
                "params": golden.record(
                    10, b"\x09" + golden.HVM_PARAMS[1:] + golden.HVM_PARAMS[8:24]
                )
            },
            "an index twice",
        ),
        ({"pages": golden.record(1, bytes(7))}, "PAGE_DATA is truncated"),
        ({"pages": golden.record(1, bytes(8))}, "8 bytes has not 0 pages"),
        ({"pages": golden.record(1, b"\xff" * 8 + PAGE)}, "has not 4294967295 pages"),
        ({"pages": golden.record(1, struct.pack("<IIQ", 1, 0, 5) + PAGE[1:])}, "has not 1 pages"),
        ({"pages": golden.page_data({1: PAGE}) * 2}, "frame 0x1 twice"),
        ({"pages": golden.page_data({1 << 30: PAGE})}, "page for frame 0x40000000"),
        ({"pages": golden.page_data({(1 << 52) - 1: PAGE})}, "page for frame 0xfffffffffffff"),
        # A pinned page table; a frame without content.
        ({"pages": golden.page_data({0xC << 60 | 5: PAGE})}, "page for frame 0xc0"),
        ({"pages": golden.record(1, struct.pack("<IIQ", 1, 0, 0xF << 60))}, "has not 1 pages"),
    ],
)
def test_libxc_refused_with_what_is_wrong(changed: dict[str, bytes], reason: str) -> None:
    with pytest.raises(exception.InvalidStream, match=reason):
        parse(golden.libxl(golden.libxc(**changed)))


def test_too_many_pages_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xen_state, "MAX_PAGES", 3)
    pages = golden.page_data({1: PAGE, 2: PAGE}) + golden.page_data({3: PAGE, 4: PAGE})
    with pytest.raises(exception.InvalidStream, match="more than 3 pages"):
        parse(golden.libxl(golden.libxc(pages=pages)))


@pytest.mark.parametrize("read", [parse, stream.read_helper])
def test_too_much_is_refused(
    monkeypatch: pytest.MonkeyPatch, read: Callable[[bytes], object]
) -> None:
    monkeypatch.setattr(stream, "MAX_STREAM", 1000)
    with pytest.raises(exception.InvalidStream, match="1001 bytes, more than 1000"):
        read(bytes(1001))


def test_helper() -> None:
    frozen = stream.read_helper(golden.helper())
    assert frozen.state == PVH
    assert frozen.present == (range(0xA0), range(0x100, 0x8000))


def test_helper_in_another_order_and_without_what_may_be_missing() -> None:
    kinds = (6, 5, 4, 3, 2, 1, 0)
    frozen = stream.read_helper(b"".join(golden.HELPER[kind] for kind in kinds))
    assert frozen == stream.Frozen(dataclasses.replace(PVH, pages={}), ())


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        *(({kind: b""}, f"record {kind} of the helper is missing") for kind in range(1, 7)),
        *(
            ({kind: golden.HELPER[kind] * 2}, f"record {kind} of the helper is twice")
            for kind in (*range(1, 7), 8)
        ),
        ({0: b""}, "truncated"),
        ({0: golden.record(0, b"x")}, "last record of the helper is not empty"),
        ({0: golden.record(0) * 2}, "8 bytes after its end"),
        ({1: golden.record(9)}, "record 9 of the helper is twice or unknown"),
        ({1: golden.record(1, bytes(4))}, "did not say what Xen"),
        ({1: golden.record(1, bytes(8))}, "no Xen 0.0"),
        ({4: golden.record(4, golden.TSC[:-8])}, "counter's record has 16"),
        ({6: golden.record(6, golden.HVM_PARAMS)}, "parameters have 136 bytes"),
        ({6: golden.record(6, golden.HVM_PARAMS[8:] * 2)}, "an index twice"),
        ({6: golden.record(6, golden.HVM_PARAMS[8:] * 3)}, "parameters have 384 bytes"),
        ({7: golden.record(7, bytes(8))}, "page of 8 bytes for frame 0x0"),
        ({7: golden.record(7, b"\1")}, "page of 1 bytes"),
        ({7: golden.record(7, bytes(4104)) * 2}, "page of 4104 bytes for frame 0x0 is none, or"),
        ({7: golden.record(7, b"\xff" * 8 + PAGE)}, "page for frame 0xffffffffffffffff"),
        ({8: golden.record(8, bytes(8))}, "list of frames has 8 bytes"),
        ({8: golden.record(8, bytes(16))}, "0 at 0x0, after 0x0"),
        ({8: golden.record(8, struct.pack("<4Q", 5, 5, 9, 1))}, "1 at 0x9, after 0xa"),
        ({8: golden.record(8, struct.pack("<2Q", 2**64 - 1, 2**64 - 1))}, "frames has"),
        ({8: golden.record(8, bytes(16) * ((1 << 20) + 1))}, "list of frames has 16777232"),
    ],
)
def test_helper_refused_with_what_is_wrong(changed: dict[int, bytes], reason: str) -> None:
    with pytest.raises(exception.InvalidStream, match=reason):
        stream.read_helper(golden.helper(changed))


READERS = pytest.mark.parametrize(
    ("read", "data"),
    [
        (parse, golden.libxl(golden.libxc(pages=b""), golden.HVM_TAIL)),
        (stream.read_helper, golden.helper({7: b""})),
    ],
    ids=["libxl", "helper"],
)


@READERS
def test_every_truncation_is_refused(read: Callable[[bytes], object], data: bytes) -> None:
    read(data)
    for length in range(len(data)):
        with pytest.raises(exception.InvalidStream):
            read(data[:length])


@READERS
@pytest.mark.timeout(60)
def test_random_changes_never_crash(read: Callable[[bytes], object], data: bytes) -> None:
    source = random.Random(7)
    fields = [*range(0, len(data), 4)]
    refused = 0
    for _ in range(4000):
        changed = bytearray(data)
        for _ in range(source.randrange(1, 4)):
            kind = source.randrange(4)
            place = source.choice(fields)
            if kind == 0:
                changed[source.randrange(len(changed))] = source.randrange(256)
            elif kind == 1:
                changed[place : place + 4] = source.randbytes(4)
            elif kind == 2:
                changed[place : place + 4] = source.choice([b"\xff", b"\0"]) * 4
            else:
                del changed[place : place + 8 * source.randrange(1, 9)]
        try:
            read(bytes(changed))
        except exception.InvalidStream:
            refused += 1
    assert refused > 1000


@pytest.mark.skipif(not VERIFIERS, reason="Xen's tools are not installed")
@pytest.mark.parametrize(
    # Xen 4.17's takes no xenstore data: under Python 3 it looks for its last NUL as for a string.
    "state",
    [PVH, dataclasses.replace(HVM, emulator_xenstore=None)],
    ids=["pvh", "hvm"],
)
def test_xen_takes_it_for_a_stream(state: xen_state.State) -> None:
    path = str(VERIFIERS[-1].parents[1] / "lib" / "python")
    subprocess.run(
        [sys.executable, VERIFIERS[-1], "--format=libxl"],
        input=stream.compose(state),
        env=os.environ | {"PYTHONPATH": path},
        check=True,
    )
