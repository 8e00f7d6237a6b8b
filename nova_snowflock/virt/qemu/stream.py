# SPDX-License-Identifier: Apache-2.0
"""QEMU's migration stream: the device state a parent saves, and the stream a clone starts from.

Sources of the format, the same from QEMU 2.4 to 9: migration/savevm.c (header, sections, footers,
description), migration/ram.c (the section ``ram``, version 4). All numbers are big endian::

    header          u32 magic, u32 version
    configuration   u8 0x07, u32 length, machine type
    section         u8 kind, u32 id, [u8 length, name, u32 instance, u32 version], content,
                    u8 0x7e, u32 id       -- [] in kinds START and FULL
    end             u8 0x00
    description     u8 0x06, u32 length, JSON

A clone's stream has, in this order: header, configuration, ``ram`` START with the list of blocks,
``ram`` END with the pages it carries, the parent's device sections as they were saved, end,
description. It carries pages of the small RAM blocks only: the guest's memory is in the image.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import struct

from nova_snowflock import descriptor
from nova_snowflock import exception

_MAGIC = 0x5145564D  # "QEVM"
_VERSION = 3
_EOF = 0x00
_SECTION_START = 0x01
_SECTION_END = 0x03
_SECTION_FULL = 0x04
_DESCRIPTION = 0x06
_CONFIGURATION = 0x07
_FOOTER = 0x7E

_RAM = b"ram"
_RAM_VERSION = 4
# QEMU numbers the sections it writes from 0; this one is not among them.
_RAM_ID = 0x534E4F57
_FLAG_MEM_SIZE = 0x04
_FLAG_PAGE = 0x08
_FLAG_EOS = 0x10
_PAGE_SIZE = descriptor.PAGE_SIZE

# QEMU's own lists the fields of every device, for tools; it complains if there is none.
_NO_DESCRIPTION = b'{"page_size":4096,"devices":[]}'

_HEADER = struct.Struct(">II")
_U64 = struct.Struct(">Q")
_ID = struct.Struct(">BI")


@dataclasses.dataclass(frozen=True)
class Page:
    """A page of a RAM block.

    :param offset: bytes from the start of the block, a multiple of the page size
    :param content: a whole page
    """

    block: str
    offset: int
    content: bytes


@dataclasses.dataclass(frozen=True)
class Section:
    """A device section.

    :param start: its place in the stream, header and footer included
    :param end: where the next one begins
    """

    name: str
    instance: int
    start: int
    end: int


@dataclasses.dataclass(frozen=True)
class Incoming:
    """What a stream for a clone has.

    :param pages: how many it carries
    """

    machine_type: str
    ram_blocks: tuple[descriptor.RamBlock, ...]
    pages: int
    sections: tuple[Section, ...]


def compose(
    machine_type: str,
    ram_blocks: Sequence[descriptor.RamBlock],
    pages: Iterable[Page],
    device_state: bytes,
) -> bytes:
    """The stream of a clone.

    :param ram_blocks: all that the clone's QEMU has
    :param pages: those that it carries
    :param device_state: what xen-save-devices-state wrote
    :raises InvalidStream: ``device_state`` is not that
    """
    sections = parse_device_state(device_state)
    name = machine_type.encode()
    total = sum(block.size for block in ram_blocks)
    parts = [
        _HEADER.pack(_MAGIC, _VERSION),
        _ID.pack(_CONFIGURATION, len(name)),
        name,
        _ID.pack(_SECTION_START, _RAM_ID),
        _counted(_RAM),
        _HEADER.pack(0, _RAM_VERSION),
        _U64.pack(total | _FLAG_MEM_SIZE),
    ]
    for block in ram_blocks:
        parts += [_counted(block.name.encode()), _U64.pack(block.size)]
    footer = _ID.pack(_FOOTER, _RAM_ID)
    parts += [_U64.pack(_FLAG_EOS), footer, _ID.pack(_SECTION_END, _RAM_ID)]
    for page in pages:
        parts += [
            _U64.pack(page.offset | _FLAG_PAGE),
            _counted(page.block.encode()),
            page.content,
        ]
    parts += [_U64.pack(_FLAG_EOS), footer]
    parts.append(device_state[sections[0].start : sections[-1].end])
    parts += [bytes([_EOF]), _ID.pack(_DESCRIPTION, len(_NO_DESCRIPTION)), _NO_DESCRIPTION]
    return b"".join(parts)


def parse_device_state(data: bytes) -> tuple[Section, ...]:
    """The sections of what xen-save-devices-state wrote.

    :raises InvalidStream: ``data`` is not that
    """
    reader = _Reader(data)
    _read_header(reader)
    sections = _read_sections(reader)
    if reader.left:
        raise exception.InvalidStream(f"The device state has {reader.left} bytes after its end")
    return sections


def parse(data: bytes) -> Incoming:
    """What the stream of a clone has.

    :raises InvalidStream: it is not one; the message says what is wrong
    """
    reader = _Reader(data)
    _read_header(reader)
    reader.expect(_CONFIGURATION, "configuration section")
    machine_type = reader.text(reader.u32())
    ram_blocks = _read_ram_start(reader)
    pages = _read_ram_end(reader, {block.name: block.size for block in ram_blocks})
    sections = _read_sections(reader)
    reader.expect(_DESCRIPTION, "description")
    reader.take(reader.u32())
    if reader.left:
        raise exception.InvalidStream(f"The stream has {reader.left} bytes after its end")
    return Incoming(machine_type, ram_blocks, pages, sections)


class _Reader:
    """Takes a stream apart from front to back; InvalidStream where it ends too soon."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.position = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.position

    def take(self, length: int) -> bytes:
        if length > self.left:
            raise exception.InvalidStream(
                f"The stream is truncated: {length} bytes wanted at {self.position}, "
                f"{self.left} left"
            )
        self.position += length
        return self.data[self.position - length : self.position]

    def u8(self) -> int:
        return self.take(1)[0]

    def u32(self) -> int:
        return int.from_bytes(self.take(4))

    def u64(self) -> int:
        return int.from_bytes(self.take(8))

    def text(self, length: int) -> str:
        start = self.position
        value = self.take(length)
        if not value or not all(0x20 < byte < 0x7F for byte in value):
            raise exception.InvalidStream(f"The stream has no proper name at {start}")
        return value.decode()

    def expect(self, value: int, what: str) -> None:
        if self.u8() != value:
            raise exception.InvalidStream(f"The stream has no {what} at {self.position - 1}")


def _counted(name: bytes) -> bytes:
    return bytes([len(name)]) + name


def _read_header(reader: _Reader) -> None:
    magic, version = _HEADER.unpack(reader.take(_HEADER.size))
    if magic != _MAGIC:
        raise exception.InvalidStream("This is not a QEMU migration stream: its magic is wrong")
    if version != _VERSION:
        raise exception.InvalidStream(f"The QEMU migration stream is of version {version}")


def _read_ram_start(reader: _Reader) -> tuple[descriptor.RamBlock, ...]:
    reader.expect(_SECTION_START, "start of the RAM section")
    section = reader.u32()
    if reader.text(reader.u8()) != _RAM.decode() or reader.u32() or reader.u32() != _RAM_VERSION:
        raise exception.InvalidStream(f"The first section is not RAM of version {_RAM_VERSION}")
    total = reader.u64()
    if total % _PAGE_SIZE != _FLAG_MEM_SIZE:
        raise exception.InvalidStream("The RAM section does not begin with its blocks")
    total -= _FLAG_MEM_SIZE
    blocks = []
    while total > 0:
        block = descriptor.RamBlock(reader.text(reader.u8()), reader.u64())
        if block.size == 0 or block.size % _PAGE_SIZE:
            raise exception.InvalidStream(f"The RAM block {block.name} is not of whole pages")
        blocks.append(block)
        total -= block.size
    if total or len({block.name for block in blocks}) != len(blocks):
        raise exception.InvalidStream("The RAM section's blocks do not add up")
    _read_ram_footer(reader, section)
    return tuple(blocks)


def _read_ram_end(reader: _Reader, sizes: dict[str, int]) -> int:
    reader.expect(_SECTION_END, "end of the RAM section")
    section = reader.u32()
    pages = 0
    while reader.data[reader.position : reader.position + 8] != _U64.pack(_FLAG_EOS):
        place = reader.u64()
        name = reader.text(reader.u8())
        if place % _PAGE_SIZE != _FLAG_PAGE or place >= sizes.get(name, 0):
            raise exception.InvalidStream(f"The RAM section has no page of {name} at {place:#x}")
        reader.take(_PAGE_SIZE)
        pages += 1
    _read_ram_footer(reader, section)
    return pages


def _read_ram_footer(reader: _Reader, section: int) -> None:
    if reader.u64() != _FLAG_EOS:
        raise exception.InvalidStream("The RAM section does not end where it must")
    reader.expect(_FOOTER, "section footer")
    if reader.u32() != section:
        raise exception.InvalidStream("The RAM section's footer is another section's")


def _read_sections(reader: _Reader) -> tuple[Section, ...]:
    """Read device sections up to and with the end of the stream.

    The length of a section's content is known only to its device: a section ends at its footer
    where another section, or the end, follows.
    """
    sections = []
    while (kind := reader.u8()) != _EOF:
        if kind != _SECTION_FULL:
            raise exception.InvalidStream(
                f"The stream has a section of unknown kind {kind} at {reader.position - 1}"
            )
        start = reader.position - 1
        footer = _ID.pack(_FOOTER, reader.u32())
        name = reader.text(reader.u8())
        instance, _version = reader.u32(), reader.u32()
        end = reader.position - 1
        while True:
            end = reader.data.find(footer, end + 1)
            if end < 0:
                raise exception.InvalidStream(f"The section {name} does not end")
            if _follows(reader.data, end + len(footer)):
                break
        reader.position = end + len(footer)
        sections.append(Section(name, instance, start, reader.position))
    if not any(section.name == "cpu" for section in sections):
        raise exception.InvalidStream("The stream has no state of a processor")
    return tuple(sections)


def _follows(data: bytes, position: int) -> bool:
    """Whether a section, or the end of the stream, begins here."""
    rest = data[position : position + 6]
    if not rest:
        return False
    if rest[0] == _EOF:
        return len(rest) == 1 or rest[1] == _DESCRIPTION
    name = data[position + 6 : position + 6 + rest[5]] if len(rest) == 6 else b""
    return rest[0] == _SECTION_FULL and len(name) == rest[5] > 0 and name.isascii()
