# SPDX-License-Identifier: Apache-2.0
"""libxc's migration stream, version 3, of a domain of type HVM.

Sources, of Xen 4.17: docs/specs/libxc-migration-stream.pandoc, and xg_sr_stream_format.h,
xg_sr_common.c, xg_sr_save.c and xg_sr_save_x86_hvm.c in tools/libs/guest. The image header is big
endian, all else little endian on x86::

    image header    u64 marker, u32 id, u32 version, u16 options, 6 bytes 0
    domain header   u32 type, u16 page shift, u16 0, u32 major, u32 minor version of Xen
    record          u32 type, u32 length, content, zeros to a multiple of 8

The records are X86_CPUID_POLICY, X86_MSR_POLICY, STATIC_DATA_END, any number of PAGE_DATA,
X86_TSC_INFO, HVM_CONTEXT, HVM_PARAMS and END, in the order that libxc has them in. libxl's stream,
and what the helper writes, are of such records too.
"""

import struct

from nova_snowflock import exception
from nova_snowflock.virt.xen import state as xen_state

_MARKER = (1 << 64) - 1
_ID = 0x58454E46  # "XENF"
_VERSION = 3
_LITTLE_ENDIAN = 0
_TYPE_HVM = 2
_PAGE_SHIFT = 12

_END = 0x00
_PAGE_DATA = 0x01
_TSC_INFO = 0x08
_HVM_CONTEXT = 0x09
_HVM_PARAMS = 0x0A
_STATIC_DATA_END = 0x10
_CPUID_POLICY = 0x11
_MSR_POLICY = 0x12
_ORDER = (
    _CPUID_POLICY,
    _MSR_POLICY,
    _STATIC_DATA_END,
    _PAGE_DATA,
    _TSC_INFO,
    _HVM_CONTEXT,
    _HVM_PARAMS,
    _END,
)
_NAMES = {
    _END: "END",
    _PAGE_DATA: "PAGE_DATA",
    _TSC_INFO: "X86_TSC_INFO",
    _HVM_CONTEXT: "HVM_CONTEXT",
    _HVM_PARAMS: "HVM_PARAMS",
    _STATIC_DATA_END: "STATIC_DATA_END",
    _CPUID_POLICY: "X86_CPUID_POLICY",
    _MSR_POLICY: "X86_MSR_POLICY",
}
# libxc writes no record that would be empty.
_MAY_BE_MISSING = {_MSR_POLICY, _PAGE_DATA}

_IMAGE_HEADER = struct.Struct(">QIIHHI")
_DOMAIN_HEADER = struct.Struct("<IHHII")
_RECORD = struct.Struct("<II")
_COUNT = struct.Struct("<II")
_PFN = struct.Struct("<Q")
_PARAM = struct.Struct("<QQ")
_TSC = struct.Struct("<IIQII")

# Pages in a record: MAX_BATCH_SIZE of xg_sr_common.h.
_BATCH = 1024


class Reader:
    """Takes a stream apart from front to back; InvalidStream where it is not what it must be."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._position

    def take(self, length: int) -> bytes:
        if length > self.left:
            raise exception.InvalidStream(
                f"The stream is truncated: {length} bytes wanted at {self._position}, "
                f"{self.left} left"
            )
        self._position += length
        return self._data[self._position - length : self._position]

    def record(self) -> tuple[int, bytes]:
        """The next record's type and content."""
        kind, length = _RECORD.unpack(self.take(_RECORD.size))
        content = self.take(length)
        if any(self.take(-length % 8)):
            raise exception.InvalidStream(f"What pads the record before {self._position} is not 0")
        return kind, content


def record(kind: int, *parts: bytes) -> bytes:
    """A record whose content is the parts together."""
    length = sum(len(part) for part in parts)
    return b"".join((_RECORD.pack(kind, length), *parts, bytes(-length % 8)))


def pack_tsc(tsc: xen_state.Tsc) -> bytes:
    """The content of X86_TSC_INFO."""
    return _TSC.pack(tsc.mode, tsc.khz, tsc.nsec, tsc.incarnation, 0)


def unpack_tsc(data: bytes) -> xen_state.Tsc:
    """What is in the content of X86_TSC_INFO.

    :raises InvalidStream: it has another length
    """
    if len(data) != _TSC.size:
        raise exception.InvalidStream(f"The time stamp counter's record has {len(data)} bytes")
    mode, khz, nsec, incarnation, _ = _TSC.unpack(data)
    return xen_state.Tsc(mode, khz, nsec, incarnation)


def unpack_params(data: bytes) -> dict[int, int]:
    """HVM parameters from pairs of index and value.

    :raises InvalidStream: these are not pairs, or too many, or two of them have the same index
    """
    if len(data) % _PARAM.size or len(data) > _PARAM.size * len(xen_state.SAVED):
        raise exception.InvalidStream(f"The HVM parameters have {len(data)} bytes")
    pairs = list(_PARAM.iter_unpack(data))
    params = dict(pairs)
    if len(params) != len(pairs):
        raise exception.InvalidStream("The HVM parameters have an index twice")
    return params


def compose(state: xen_state.State) -> bytes:
    """The stream of a guest."""
    parts = [
        _IMAGE_HEADER.pack(_MARKER, _ID, _VERSION, _LITTLE_ENDIAN, 0, 0),
        _DOMAIN_HEADER.pack(_TYPE_HVM, _PAGE_SHIFT, 0, *state.xen_version),
        record(_CPUID_POLICY, state.cpuid),
    ]
    if state.msrs:
        parts.append(record(_MSR_POLICY, state.msrs))
    parts.append(record(_STATIC_DATA_END))
    pfns = sorted(state.pages)
    for start in range(0, len(pfns), _BATCH):
        batch = pfns[start : start + _BATCH]
        parts.append(
            record(
                _PAGE_DATA,
                _COUNT.pack(len(batch), 0),
                *(_PFN.pack(pfn) for pfn in batch),
                *(state.pages[pfn] for pfn in batch),
            )
        )
    params = [index for index in xen_state.SAVED if index in state.hvm_params]
    parts += [
        record(_TSC_INFO, pack_tsc(state.tsc)),
        record(_HVM_CONTEXT, state.hvm_context),
        record(
            _HVM_PARAMS,
            _COUNT.pack(len(params), 0),
            *(_PARAM.pack(index, state.hvm_params[index]) for index in params),
        ),
        record(_END),
    ]
    return b"".join(parts)


def parse(reader: Reader, xen_version: tuple[int, int]) -> xen_state.State:
    """Read a stream up to and with its end.

    Its records must be those of :func:`compose`, in that order. Optional ones, which libxc would
    ignore, are not: there are none in Xen 4.17.

    :param xen_version: major and minor, of the Xen that it must be of
    :raises InvalidStream: it is not one; the message says what is wrong
    """
    _read_headers(reader, xen_version)
    contents: dict[int, bytes] = {}
    pages: dict[int, bytes] = {}
    place = -1
    while _END not in contents:
        kind, content = reader.record()
        if kind not in _ORDER:
            raise exception.InvalidStream(f"The stream has a record of unknown type {kind:#x}")
        if _ORDER.index(kind) < place or (kind in contents and kind != _PAGE_DATA):
            raise exception.InvalidStream(f"The record {_NAMES[kind]} is twice or out of place")
        place = _ORDER.index(kind)
        contents[kind] = content
        if kind == _PAGE_DATA:
            _read_pages(content, pages)
        elif kind in (_STATIC_DATA_END, _END) and content:
            raise exception.InvalidStream(f"The record {_NAMES[kind]} is not empty")
    for kind in _ORDER:
        if kind not in contents and kind not in _MAY_BE_MISSING:
            raise exception.InvalidStream(f"The record {_NAMES[kind]} is missing")
    return xen_state.State(
        xen_version=xen_version,
        cpuid=contents[_CPUID_POLICY],
        msrs=contents.get(_MSR_POLICY, b""),
        tsc=unpack_tsc(contents[_TSC_INFO]),
        hvm_context=contents[_HVM_CONTEXT],
        hvm_params=_read_params(contents[_HVM_PARAMS]),
        pages=pages,
    )


def _read_headers(reader: Reader, xen_version: tuple[int, int]) -> None:
    marker, ident, version, options, _, _ = _IMAGE_HEADER.unpack(reader.take(_IMAGE_HEADER.size))
    if (marker, ident) != (_MARKER, _ID):
        raise exception.InvalidStream("This is not a libxc stream: its magic is wrong")
    if version != _VERSION or options != _LITTLE_ENDIAN:
        raise exception.InvalidStream(
            f"The libxc stream is of version {version} with options {options:#x}"
        )
    kind, shift, _, major, minor = _DOMAIN_HEADER.unpack(reader.take(_DOMAIN_HEADER.size))
    if (kind, shift) != (_TYPE_HVM, _PAGE_SHIFT):
        raise exception.InvalidStream(
            f"The libxc stream is of a domain of type {kind} with pages of 2^{shift} bytes"
        )
    if (major, minor) != xen_version:
        raise exception.InvalidStream(
            f"The stream is of Xen {major}.{minor}, this host has {xen_version[0]}.{xen_version[1]}"
        )


def _read_pages(content: bytes, pages: dict[int, bytes]) -> None:
    """Add the pages of a record.

    The types of a PV guest's page tables, and of pages without a content, are in the highest bits
    of a frame number: such frames are too high.
    """
    if len(content) < _COUNT.size:
        raise exception.InvalidStream("The record PAGE_DATA is truncated")
    count, _ = _COUNT.unpack_from(content)
    start = _COUNT.size + _PFN.size * count
    if count == 0 or len(content) != start + xen_state.PAGE_SIZE * count:
        raise exception.InvalidStream(f"A record of {len(content)} bytes has not {count} pages")
    if len(pages) + count > xen_state.MAX_PAGES:
        raise exception.InvalidStream(f"The stream carries more than {xen_state.MAX_PAGES} pages")
    for number, (pfn,) in enumerate(_PFN.iter_unpack(content[_COUNT.size : start])):
        place = start + xen_state.PAGE_SIZE * number
        if pfn in pages:
            raise exception.InvalidStream(f"The stream has frame {pfn:#x} twice")
        pages[pfn] = content[place : place + xen_state.PAGE_SIZE]


def _read_params(content: bytes) -> dict[int, int]:
    params = unpack_params(content[_COUNT.size :])
    if content[: _COUNT.size] != _COUNT.pack(len(params), 0):
        raise exception.InvalidStream(f"The record HVM_PARAMS has not {len(params)} parameters")
    return params
