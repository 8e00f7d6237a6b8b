# SPDX-License-Identifier: Apache-2.0
"""A Xen guest's state as bytes: from the helper, in a descriptor, and what libvirt restores.

A descriptor has libxl's migration stream, version 2 (docs/specs/libxl-migration-stream.pandoc and
tools/libs/light/libxl_stream_write.c of Xen 4.17), a big endian header and records as in libxc's::

    header                  u64 ident, u32 version, u32 options
    LIBXC_CONTEXT           empty; libxc's stream follows
    EMULATOR_XENSTORE_DATA  u32 emulator, u32 index, keys and values   -- with a device model only
    EMULATOR_CONTEXT        u32 emulator, u32 index, QEMU's state      -- with a device model only
    END                     empty

libvirt restores that stream with its own header and the domain's XML before it (src/libxl of
libvirt 9.0: struct _libxlSavefileHeader in libxl_conf.h, libxlDomainSaveImageOpen). Another XML
cannot be given to a restore: libxlDomainRestoreFlags refuses it.

The helper writes such records too, in any order but for END, which is the last::

    1 XEN_VERSION   u32 major, u32 minor
    2 CPUID         array of struct xen_cpuid_leaf
    3 MSRS          array of struct xen_msr_entry
    4 TSC           as X86_TSC_INFO
    5 HVM_CONTEXT   what XEN_DOMCTL_gethvmcontext gives
    6 HVM_PARAMS    pairs of u64 index, u64 value
    7 PAGE          u64 frame, a page             -- any number
    8 PRESENT       pairs of u64 frame, u64 count -- may be missing
    0 END           empty
"""

import dataclasses
import struct

from nova_snowflock import descriptor
from nova_snowflock import exception
from nova_snowflock.virt.xen import libxc
from nova_snowflock.virt.xen import state as xen_state

MAX_STREAM = descriptor.MAX_DEVICE_STATE

_IDENT = int.from_bytes(b"LibxlFmt")
_VERSION = 2
_LITTLE_ENDIAN = 0
_HEADER = struct.Struct(">QII")
_END = 0
_LIBXC_CONTEXT = 1
_EMULATOR_XENSTORE = 2
_EMULATOR_CONTEXT = 3
_QEMU = struct.pack("<II", 2, 0)  # EMULATOR_QEMU_UPSTREAM, the first

# Magic, version (which is that of libxl's stream), length of the XML with its NUL, 10 unused words.
_SAVE_HEADER = struct.Struct("<16sII40x")
_SAVE_MAGIC = b"libvirt-xml\n \0 \r"
_SAVE_VERSION = 2
_MAX_XML = 16 << 20

_HELPER_VERSION = 1
_HELPER_CPUID = 2
_HELPER_MSRS = 3
_HELPER_TSC = 4
_HELPER_CONTEXT = 5
_HELPER_PARAMS = 6
_HELPER_PAGE = 7
_HELPER_PRESENT = 8
_HELPER_NEEDED = (
    _HELPER_VERSION,
    _HELPER_CPUID,
    _HELPER_MSRS,
    _HELPER_TSC,
    _HELPER_CONTEXT,
    _HELPER_PARAMS,
)
_PAIR = struct.Struct("<II")
_RANGE = struct.Struct("<QQ")
_FRAME_SIZE = 8
_MAX_RANGES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Frozen:
    """What a helper has read from a stopped guest.

    :param state: without that of a device model
    :param present: the guest's frames that there are, ascending; none if the helper did not say
    """

    state: xen_state.State
    present: tuple[range, ...]


def compose(state: xen_state.State) -> bytes:
    """libxl's stream of a guest, which a descriptor carries.

    It has records of an emulator if, and only if, the state has a device model's: libxl restores
    a PVH guest only without, an HVM guest only with EMULATOR_CONTEXT.
    """
    parts = [
        _HEADER.pack(_IDENT, _VERSION, _LITTLE_ENDIAN),
        libxc.record(_LIBXC_CONTEXT),
        libxc.compose(state),
    ]
    if state.emulator_xenstore is not None:
        parts.append(libxc.record(_EMULATOR_XENSTORE, _QEMU, state.emulator_xenstore))
    if state.emulator is not None:
        parts.append(libxc.record(_EMULATOR_CONTEXT, _QEMU, state.emulator))
    parts.append(libxc.record(_END))
    return b"".join(parts)


def parse(data: bytes, xen_version: tuple[int, int]) -> xen_state.State:
    """The state in libxl's stream.

    :param xen_version: major and minor, of this host: no other's state can be restored
    :raises InvalidStream: it is not one; the message says what is wrong
    """
    reader = _reader(data)
    ident, version, options = _HEADER.unpack(reader.take(_HEADER.size))
    if ident != _IDENT:
        raise exception.InvalidStream("This is not a libxl stream: its magic is wrong")
    if version != _VERSION or options != _LITTLE_ENDIAN:
        raise exception.InvalidStream(
            f"The libxl stream is of version {version} with options {options:#x}"
        )
    if reader.record() != (_LIBXC_CONTEXT, b""):
        raise exception.InvalidStream("The libxl stream does not begin with libxc's")
    state = libxc.parse(reader, xen_version)
    emulator = xenstore = None
    kind, content = reader.record()
    if kind == _EMULATOR_XENSTORE:
        xenstore = _emulator_data(content)
        kind, content = reader.record()
    if kind == _EMULATOR_CONTEXT:
        emulator = _emulator_data(content)
        kind, content = reader.record()
    if (kind, content) != (_END, b""):
        raise exception.InvalidStream(
            f"The libxl stream has a record of type {kind:#x} and {len(content)} bytes at its end"
        )
    _expect_end(reader)
    return dataclasses.replace(state, emulator=emulator, emulator_xenstore=xenstore)


def save_file(state: xen_state.State, xml: str) -> bytes:
    """The file that libvirt restores a guest from.

    :param xml: the domain's, as it is to be restored: a clone's own
    :raises InvalidStream: libvirt could not read the XML
    """
    data = xml.encode()
    if not data or b"\0" in data or len(data) >= _MAX_XML:
        raise exception.InvalidStream(f"The XML of {len(data)} bytes cannot be in a save file")
    return b"".join(
        (_SAVE_HEADER.pack(_SAVE_MAGIC, _SAVE_VERSION, len(data) + 1), data, b"\0", compose(state))
    )


def read_helper(data: bytes) -> Frozen:
    """What the helper wrote of a stopped guest.

    :raises InvalidStream: it is not that; the message says what is wrong
    """
    reader = _reader(data)
    contents: dict[int, bytes] = {}
    pages: dict[int, bytes] = {}
    while _END not in contents:
        kind, content = reader.record()
        if kind == _HELPER_PAGE:
            _add_page(content, pages)
        elif kind in contents or kind not in (*_HELPER_NEEDED, _HELPER_PRESENT, _END):
            raise exception.InvalidStream(f"The record {kind} of the helper is twice or unknown")
        else:
            contents[kind] = content
    if contents[_END]:
        raise exception.InvalidStream("The last record of the helper is not empty")
    _expect_end(reader)
    for kind in _HELPER_NEEDED:
        if kind not in contents:
            raise exception.InvalidStream(f"The record {kind} of the helper is missing")
    if len(contents[_HELPER_VERSION]) != _PAIR.size:
        raise exception.InvalidStream("The helper did not say what Xen there is")
    major, minor = _PAIR.unpack(contents[_HELPER_VERSION])
    return Frozen(
        xen_state.State(
            xen_version=(major, minor),
            cpuid=contents[_HELPER_CPUID],
            msrs=contents[_HELPER_MSRS],
            tsc=libxc.unpack_tsc(contents[_HELPER_TSC]),
            hvm_context=contents[_HELPER_CONTEXT],
            hvm_params=libxc.unpack_params(contents[_HELPER_PARAMS]),
            pages=pages,
        ),
        _ranges(contents.get(_HELPER_PRESENT, b"")),
    )


def _reader(data: bytes) -> libxc.Reader:
    if len(data) > MAX_STREAM:
        raise exception.InvalidStream(f"The stream has {len(data)} bytes, more than {MAX_STREAM}")
    return libxc.Reader(data)


def _expect_end(reader: libxc.Reader) -> None:
    if reader.left:
        raise exception.InvalidStream(f"The stream has {reader.left} bytes after its end")


def _emulator_data(content: bytes) -> bytes:
    if content[: len(_QEMU)] != _QEMU:
        raise exception.InvalidStream("The stream is of another device model than QEMU")
    return content[len(_QEMU) :]


def _add_page(content: bytes, pages: dict[int, bytes]) -> None:
    pfn = int.from_bytes(content[:_FRAME_SIZE], "little")
    if len(content) != _FRAME_SIZE + xen_state.PAGE_SIZE or pfn in pages:
        raise exception.InvalidStream(
            f"The helper's page of {len(content)} bytes for frame {pfn:#x} is none, or twice"
        )
    pages[pfn] = content[_FRAME_SIZE:]


def _ranges(content: bytes) -> tuple[range, ...]:
    if len(content) % _RANGE.size or len(content) > _RANGE.size * _MAX_RANGES:
        raise exception.InvalidStream(f"The list of frames has {len(content)} bytes")
    ranges = []
    end = 0
    for first, count in _RANGE.iter_unpack(content):
        if first < end or not count or first + count > xen_state.MAX_FRAMES:
            raise exception.InvalidStream(
                f"The list of frames has {count} at {first:#x}, after {end:#x}"
            )
        end = first + count
        ranges.append(range(first, end))
    return tuple(ranges)
