# SPDX-License-Identifier: Apache-2.0
"""The migration stream: what a clone gets is what QEMU's own would be, and bad ones are refused."""

import itertools
import random
import struct

import pytest

from nova_snowflock import descriptor
from nova_snowflock import exception
from nova_snowflock.virt.qemu import stream
from tests.unit import virt

BLOCKS = (
    descriptor.RamBlock("snowflock-ram", 1 << 29),
    descriptor.RamBlock("0000:00:01.0/vga.vram", 1 << 23),
)
PAGES = (
    stream.Page(BLOCKS[1].name, 0, b"\x01" * 4096),
    stream.Page(BLOCKS[1].name, 0x5000, b"\x02" * 4096),
)


@pytest.fixture(scope="module")
def state() -> bytes:
    return virt.device_state()


@pytest.fixture(scope="module")
def composed(state: bytes) -> bytes:
    return stream.compose("pc-q35-7.2", BLOCKS, PAGES, state)


def test_device_state_of_a_real_guest(state: bytes) -> None:
    sections = stream.parse_device_state(state)
    names = [section.name for section in sections]
    assert len(sections) == 48
    assert (sections[0].start, sections[-1].end) == (8, len(state) - 1)
    assert names.count("cpu") == 1
    assert names[-1] == "globalstate"
    assert "0000:00:01.0/virtio-vga" in names
    assert all(a.end == b.start for a, b in itertools.pairwise(sections))


def test_composed_stream_parses(composed: bytes, state: bytes) -> None:
    incoming = stream.parse(composed)
    assert incoming.machine_type == "pc-q35-7.2"
    assert incoming.ram_blocks == BLOCKS
    assert incoming.pages == len(PAGES)
    assert [(section.name, section.instance) for section in incoming.sections] == [
        (section.name, section.instance) for section in stream.parse_device_state(state)
    ]


def test_composed_stream_byte_for_byte(composed: bytes, state: bytes) -> None:
    section = struct.pack(">I", 0x534E4F57)
    footer = b"\x7e" + section
    ram = (
        b"\x01" + section + b"\x03ram" + struct.pack(">II", 0, 4)
        + struct.pack(">Q", (1 << 29) + (1 << 23) | 4)
        + b"\x0dsnowflock-ram" + struct.pack(">Q", 1 << 29)
        + b"\x150000:00:01.0/vga.vram" + struct.pack(">Q", 1 << 23)
        + struct.pack(">Q", 0x10) + footer
        + b"\x03" + section
        + struct.pack(">Q", 8) + b"\x150000:00:01.0/vga.vram" + b"\x01" * 4096
        + struct.pack(">Q", 0x5008) + b"\x150000:00:01.0/vga.vram" + b"\x02" * 4096
        + struct.pack(">Q", 0x10) + footer
    )  # fmt: skip
    head = b"QEVM" + struct.pack(">I", 3) + b"\x07" + struct.pack(">I", 10) + b"pc-q35-7.2"
    description = b'{"page_size":4096,"devices":[]}'
    tail = b"\x06" + struct.pack(">I", len(description)) + description
    assert composed == head + ram + state[8:] + tail


def test_every_truncation_is_refused(composed: bytes) -> None:
    for length in [*range(300), *range(300, len(composed), 1009), len(composed) - 1]:
        with pytest.raises(exception.InvalidStream):
            stream.parse(composed[:length])


def test_truncated_device_state_is_refused(state: bytes) -> None:
    for length in [*range(300), *range(300, len(state), 1009), len(state) - 1]:
        with pytest.raises(exception.InvalidStream):
            stream.parse_device_state(state[:length])


def test_random_changes_never_crash(composed: bytes) -> None:
    source = random.Random(3)
    for _ in range(500):
        changed = bytearray(composed[:9500] + composed[-2000:])
        for _ in range(source.randrange(1, 8)):
            changed[source.randrange(len(changed))] = source.randrange(256)
        try:
            stream.parse(bytes(changed))
        except exception.InvalidStream:
            continue


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"XXXX\0\0\0\3", "magic"),
        (b"QEVM\0\0\0\2", "version 2"),
        (b"QEVM\0\0\0\3\0", "no state of a processor"),
        (b"QEVM\0\0\0\3\x02", "unknown kind 2"),
        (b"QEVM\0\0\0\3\x04\0\0\0\1\3cpu\0\0\0\0\0\0\0\1", "section cpu does not end"),
    ],
)
def test_refused_with_what_is_wrong(data: bytes, reason: str) -> None:
    with pytest.raises(exception.InvalidStream, match=reason):
        stream.parse_device_state(data)


def test_bytes_after_the_end_are_refused(state: bytes, composed: bytes) -> None:
    with pytest.raises(exception.InvalidStream):
        stream.parse_device_state(state + b"\0")
    with pytest.raises(exception.InvalidStream, match="1 bytes after"):
        stream.parse(composed + b"\0")


def test_pages_outside_their_block_are_refused(state: bytes) -> None:
    for page in (
        stream.Page(BLOCKS[1].name, BLOCKS[1].size, bytes(4096)),
        stream.Page("unknown", 0, bytes(4096)),
    ):
        with pytest.raises(exception.InvalidStream, match="has no page"):
            stream.parse(stream.compose("pc-q35-7.2", BLOCKS, [page], state))
