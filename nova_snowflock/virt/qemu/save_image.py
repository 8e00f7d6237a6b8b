# SPDX-License-Identifier: Apache-2.0
"""libvirt's save image: what virDomainRestoreFlags() starts a guest from.

A header (src/qemu/qemu_saveimage.h, struct _virQEMUSaveHeader, version 2, in the byte order of the
host), the domain's XML with a NUL after it, and QEMU's migration stream.
"""

import dataclasses
import struct
import sys

from nova_snowflock import exception

MAGIC = b"LibvirtQemudSave"
VERSION = 2
_RAW = 0
# Magic, version, length of the XML with its NUL, was running, compression, offset of the migration
# cookie (none), 14 unused words.
_HEADER = struct.Struct("=16s5I56x")
_MAX_XML = 16 << 20


@dataclasses.dataclass(frozen=True)
class SaveImage:
    """A save image that is not compressed.

    :param xml: the domain's
    :param running: whether the guest is to run when it is restored
    :param stream: QEMU's migration stream
    """

    xml: str
    running: bool
    stream: bytes


def header(xml: str, *, running: bool) -> bytes:
    """What comes before the stream."""
    data = xml.encode() + b"\0"
    return _HEADER.pack(MAGIC, VERSION, len(data), running, _RAW, 0) + data


def parse(data: bytes) -> SaveImage:
    """The save image in ``data``.

    :raises InvalidStream: it is not one; the message says what is wrong
    """
    if len(data) < _HEADER.size:
        raise exception.InvalidStream(f"The save image is truncated: {len(data)} bytes")
    magic, version, length, running, compression, _ = _HEADER.unpack_from(data)
    if magic != MAGIC:
        raise exception.InvalidStream("This is not a libvirt save image: its magic is wrong")
    if version != VERSION:
        raise exception.InvalidStream(
            f"The save image is of version {version}, or not of a {sys.byteorder}-endian host; "
            f"known is version {VERSION}"
        )
    if compression != _RAW:
        raise exception.InvalidStream(f"The save image is compressed (format {compression})")
    start = _HEADER.size + length
    if not 0 < length <= _MAX_XML or start > len(data):
        raise exception.InvalidStream(f"The save image's XML of {length} bytes is not all there")
    text, _, _ = data[_HEADER.size : start].partition(b"\0")
    try:
        return SaveImage(text.decode(), bool(running), data[start:])
    except UnicodeDecodeError as error:
        raise exception.InvalidStream("The save image's XML is not UTF-8") from error
