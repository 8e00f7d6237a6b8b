# SPDX-License-Identifier: Apache-2.0
"""A guest's state as the specifications have it, put together without what is tested.

The parameters are those that libxc gives every HVM and PVH guest (tools/libs/guest/xg_dom_x86.c).
"""

import struct

VERSION = (4, 17)
STORE, IOREQ, BUFIOREQ, CONSOLE, IDENT_PT = 0xFEFFC, 0xFEFFD, 0xFEFFB, 0xFEFFF, 0xFEFFE
PARAMS = (
    (1, STORE),
    (5, IOREQ),
    (6, BUFIOREQ),
    (27, 0xFEFF8),
    (28, 0xFEFF9),
    (29, 0xFEFFA),
    (17, CONSOLE),
    (12, IDENT_PT << 12),
)
CPUID = struct.pack("<6I", 0, 0xFFFFFFFF, 0xD, 0x756E6547, 0x6C65746E, 0x49656E69) + bytes(24)
MSRS = struct.pack("<IIQ", 0xCE, 0, 0x80000000) + struct.pack("<IIQ", 0x10A, 0, 0)
TSC = struct.pack("<IIQII", 0, 2_400_000, 77_000_000_000, 1, 0)
# Header, two processors, the end.
CONTEXT = (
    struct.pack("<HHI", 1, 0, 24)
    + struct.pack("<IIQII", 0x54381286, 1, 2**64 - 1, 0x306C3, 2_400_000)
    + struct.pack("<HHI", 2, 0, 1032) + b"\x05" * 1032
    + struct.pack("<HHI", 2, 1, 1032) + b"\x06" * 1032
    + struct.pack("<HHI", 0, 0, 0)
)  # fmt: skip
PAGES = {STORE: bytes(4096), IDENT_PT: b"\xe7\x00\x40\x00" * 1024}
XENSTORE = (
    b"physmap/f0000000/start_addr\0f1000000\0"
    b"physmap/f0000000/size\x00800000\0"
    b"physmap/f0000000/name\0vga.vram\0"
)
QEMU = b"QEVM\0\0\0\3 and so on"


def record(kind: int, content: bytes = b"") -> bytes:
    return struct.pack("<II", kind, len(content)) + content + bytes(-len(content) % 8)


def page_data(pages: dict[int, bytes]) -> bytes:
    pfns = struct.pack(f"<{len(pages)}Q", *pages)
    return record(1, struct.pack("<II", len(pages), 0) + pfns + b"".join(pages.values()))


IMAGE_HEADER = b"\xff" * 8 + b"XENF" + b"\0\0\0\3" + bytes(8)
DOMAIN_HEADER = struct.pack("<IHHII", 2, 12, 0, 4, 17)
HVM_PARAMS = struct.pack("<II", len(PARAMS), 0) + b"".join(
    struct.pack("<QQ", index, value) for index, value in PARAMS
)
RECORDS = {
    "cpuid": record(0x11, CPUID),
    "msrs": record(0x12, MSRS),
    "static": record(0x10),
    "pages": page_data(PAGES),
    "tsc": record(8, TSC),
    "context": record(9, CONTEXT),
    "params": record(10, HVM_PARAMS),
    "end": record(0),
}
"""libxc's, in its order."""


def libxc(**changed: bytes) -> bytes:
    """libxc's stream; with other bytes instead of some of its records."""
    return IMAGE_HEADER + DOMAIN_HEADER + b"".join((RECORDS | changed).values())


def libxl(inner: bytes | None = None, tail: bytes = record(0)) -> bytes:
    """libxl's stream, of a PVH guest; with another libxc stream, or other records after it."""
    inner = libxc() if inner is None else inner
    return b"LibxlFmt" + b"\0\0\0\2" + b"\0\0\0\0" + record(1) + inner + tail


HVM_TAIL = (
    record(2, struct.pack("<II", 2, 0) + XENSTORE)
    + record(3, struct.pack("<II", 2, 0) + QEMU)
    + record(0)
)
HELPER = {
    1: record(1, struct.pack("<II", 4, 17)),
    2: record(2, CPUID),
    3: record(3, MSRS),
    4: record(4, TSC),
    5: record(5, CONTEXT),
    6: record(6, HVM_PARAMS[8:]),
    7: b"".join(record(7, struct.pack("<Q", pfn) + page) for pfn, page in PAGES.items()),
    8: record(8, struct.pack("<4Q", 0, 0xA0, 0x100, 0x7F00)),
    0: record(0),
}
"""The helper's records by type."""


def helper(changed: dict[int, bytes] | None = None) -> bytes:
    """What the helper wrote; with other bytes instead of some of its records."""
    return b"".join((HELPER | (changed or {})).values())
