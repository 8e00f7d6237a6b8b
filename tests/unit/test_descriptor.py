# SPDX-License-Identifier: Apache-2.0
"""The descriptor: what goes in comes out, and nothing else is taken."""

from collections.abc import Callable
import dataclasses
import hashlib
import json
import random
import struct
from typing import Any
import zlib

import pytest

from nova_snowflock import descriptor
from nova_snowflock import exception
from nova_snowflock.memtap import pagemap

MEMORY_MAP = pagemap.PageMap(b"\1\0\1\1" * (1 << 15)).encode()
DISK_MAP = pagemap.PageMap(b"\1\0").encode()
SAMPLE = descriptor.Descriptor(
    image="6f0c4e9e-3a39-4c0b-9a4e-1f6f2d2f7d10",
    hypervisor="qemu",
    hypervisor_version="7.2.22",
    machine_type="pc-q35-7.2",
    cpu="<cpu mode='maximum'/>",
    vcpus=2,
    ram_blocks=(
        descriptor.RamBlock("snowflock-ram", 512 << 20),
        descriptor.RamBlock("0000:00:01.0/vga.vram", 8 << 20),
    ),
    files=(
        descriptor.File(1, "memory", 512 << 20, MEMORY_MAP),
        descriptor.File(2, "disk", 5000, DISK_MAP),
    ),
    servers=("10.77.0.1:40000", "[fd00::1]:40000"),
    group="239.255.3.4:5710",
    created="2026-01-02T03:04:05.678+00:00",
    domain="<domain type='qemu'>\N{SNOWFLAKE}</domain>",
    device_state=bytes(100000) + b"state",
    disks=(descriptor.Disk("vda", 2, "qcow2", 10 << 30, "/instances/_base/0a1b"),),
)
HEADER = struct.Struct(">8sHHIII")
START = HEADER.size + 32


def pack(manifest: bytes, state: bytes, maps: bytes, version: int = 1, flags: int = 0) -> bytes:
    header = HEADER.pack(b"SNOWFLCK", version, flags, len(manifest), len(state), len(maps))
    body = manifest + state + maps
    return header + hashlib.sha256(header + body).digest() + body


def with_manifest(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The sample with its manifest changed, its lengths and digest right."""
    data = SAMPLE.encode()
    _, _, _, manifest, state, _ = HEADER.unpack_from(data)
    root = json.loads(data[START : START + manifest])
    change(root)
    end = START + manifest + state
    return pack(json.dumps(root).encode(), data[START + manifest : end], data[end:])


def test_round_trip() -> None:
    assert descriptor.Descriptor.decode(SAMPLE.encode()) == SAMPLE


def test_encoding_is_canonical() -> None:
    assert descriptor.Descriptor.decode(SAMPLE.encode()).encode() == SAMPLE.encode()


def test_without_disks() -> None:
    diskless = dataclasses.replace(SAMPLE, disks=())
    assert descriptor.Descriptor.decode(diskless.encode()).disks == ()


def test_disk_without_base() -> None:
    disk = dataclasses.replace(SAMPLE.disks[0], base=None)
    image = dataclasses.replace(SAMPLE, disks=(disk,))
    assert descriptor.Descriptor.decode(image.encode()).disks == (disk,)


def test_without_group() -> None:
    unicast = dataclasses.replace(SAMPLE, group=None)
    assert descriptor.Descriptor.decode(unicast.encode()).group is None


def test_file_by_number() -> None:
    assert SAMPLE.file(2).pages == 2
    with pytest.raises(KeyError):
        SAMPLE.file(3)


def test_zeros_cost_nothing() -> None:
    assert len(SAMPLE.encode()) < 3000


def test_every_truncation_is_refused() -> None:
    data = SAMPLE.encode()
    for length in range(len(data)):
        with pytest.raises(exception.InvalidDescriptor, match="truncated"):
            descriptor.Descriptor.decode(data[:length])


def test_every_altered_byte_is_refused() -> None:
    data = SAMPLE.encode()
    for position in range(len(data)):
        altered = bytearray(data)
        altered[position] ^= 0x40
        with pytest.raises(exception.InvalidDescriptor):
            descriptor.Descriptor.decode(bytes(altered))


def test_alteration_is_named() -> None:
    data = bytearray(SAMPLE.encode())
    data[-1] ^= 1
    with pytest.raises(exception.InvalidDescriptor, match="altered"):
        descriptor.Descriptor.decode(bytes(data))


def test_random_bytes_are_refused() -> None:
    source = random.Random(2)
    for _ in range(1000):
        body = source.randbytes(source.randrange(300))
        for data in (body, SAMPLE.encode()[:START] + body):
            with pytest.raises(exception.InvalidDescriptor):
                descriptor.Descriptor.decode(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"something else entirely", "magic"),
        (pack(b"{}", zlib.compress(b""), b"", version=2), "version 2"),
        (pack(b"{}", zlib.compress(b""), b"", flags=1), "flags"),
        (SAMPLE.encode() + b"x", "1 bytes after"),
        (pack(b"not json", zlib.compress(b""), b""), "not JSON"),
        (pack(b"\xff", zlib.compress(b""), b""), "not JSON"),
        (pack(b"[" * 100000, zlib.compress(b""), b""), "not JSON"),
        (pack(b"[]", zlib.compress(b""), b""), "manifest is not an object"),
        (pack(b"{}", zlib.compress(b""), b""), "lacks 'hypervisor'"),
    ],
)
def test_refused_with_what_is_wrong(data: bytes, reason: str) -> None:
    with pytest.raises(exception.InvalidDescriptor, match=reason):
        descriptor.Descriptor.decode(data)


@pytest.mark.parametrize("key", sorted(json.loads(SAMPLE.encode()[START:].split(b"x\x9c")[0])))
def test_every_key_is_wanted_and_typed(key: str) -> None:
    with pytest.raises(exception.InvalidDescriptor, match=f"lacks '{key}'"):
        descriptor.Descriptor.decode(with_manifest(lambda root: root.pop(key)))
    with pytest.raises(exception.InvalidDescriptor, match=key):
        descriptor.Descriptor.decode(with_manifest(lambda root: root.update({key: 1.5})))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda root: root.update(surprise=1), "unknown key 'surprise'"),
        (lambda root: root["hypervisor"].update(surprise=1), "unknown key 'surprise'"),
        (lambda root: root["files"][0].update(surprise=1), "unknown key 'surprise'"),
        (lambda root: root.update(image="../../etc"), "not a UUID"),
        (lambda root: root.update(image=SAMPLE.image.upper()), "not a UUID"),
        (lambda root: root.update(vcpus=True), "vcpus is not an integer"),
        (lambda root: root.update(vcpus=0), "vcpus is not an integer"),
        (lambda root: root.update(created="yesterday"), "not a UTC time"),
        (lambda root: root.update(created="2026-01-02T03:04:05+02:00"), "not a UTC time"),
        (lambda root: root.update(created="2026-01-02T03:04:05"), "not a UTC time"),
        (lambda root: root.update(servers=[]), "servers"),
        (lambda root: root.update(servers=[1]), "servers"),
        (lambda root: root.update(servers=["example.org:1"]), "not an address and port"),
        (lambda root: root.update(servers=["10.0.0.1:0"]), "not an address and port"),
        (lambda root: root.update(servers=["10.0.0.1"]), "not an address and port"),
        (lambda root: root.update(servers=["239.1.2.3:4"]), "not an address and port"),
        (lambda root: root.update(group="10.0.0.1:5710"), "not a multicast address"),
        (lambda root: root["ram_blocks"][0].update(size=4097), "multiple of 4096"),
        (lambda root: root["ram_blocks"][0].update(size=0), "size is not an integer"),
        (lambda root: root["ram_blocks"][0].update(name="a b"), "name is not of the form"),
        (lambda root: root["ram_blocks"][0].update(name="x" * 256), "name is not of the form"),
        (lambda root: root["ram_blocks"].append(root["ram_blocks"][0]), "one thing twice"),
        (lambda root: root["files"][0].update(number=0), "number is not an integer"),
        (lambda root: root["files"][0].update(number=2), "one thing twice"),
        (lambda root: root["files"][0].update(name="disk"), "one thing twice"),
        (lambda root: root["files"][0].update(size=1 << 45), "size is not an integer"),
        (lambda root: root["files"][0].update(size=1 << 20), "page map of file 1 is invalid"),
        (lambda root: root["files"][0].update(name="../memory"), "name is not of the form"),
        (lambda root: root["files"][0].update(name=".."), "name is not of the form"),
        (lambda root: root["files"][0]["page_map"].update(offset=1), "does not match its SHA-256"),
        (lambda root: root["files"][0]["page_map"].update(length=9999), "length is not an integer"),
        (lambda root: root["files"][0]["page_map"].update(offset=-1), "offset is not an integer"),
        (lambda root: root["disks"][0].update(surprise=1), "unknown key 'surprise'"),
        (lambda root: root["disks"].append(root["disks"][0]), "one thing twice"),
        (lambda root: root["disks"][0].update(target="../vda"), "target is not of the form"),
        (lambda root: root["disks"][0].update(file=1), "file is not an integer"),
        (lambda root: root["disks"][0].update(file=3), "no file 3"),
        (lambda root: root["disks"][0].update(format="vmdk"), "unknown format"),
        (lambda root: root["disks"][0].update(size=0), "size is not an integer"),
        (lambda root: root["disks"][0].update(base="disk"), "no absolute path"),
        (lambda root: root["disks"][0].update(base="/a/../b"), "no absolute path"),
        (lambda root: root["disks"][0].update(base=""), "base is not a string or null"),
        (lambda root: root["disks"][0].pop("base"), "lacks 'base'"),
    ],
)
def test_manifest_is_checked(change: Callable[[dict[str, Any]], object], reason: str) -> None:
    with pytest.raises(exception.InvalidDescriptor, match=reason):
        descriptor.Descriptor.decode(with_manifest(change))


@pytest.mark.parametrize("page_map", [b"", b"no map", DISK_MAP[:-1], DISK_MAP + b"x", MEMORY_MAP])
def test_page_map_is_checked(page_map: bytes) -> None:
    disk = dataclasses.replace(SAMPLE.file(2), page_map=page_map)
    altered = dataclasses.replace(SAMPLE, files=(SAMPLE.file(1), disk))
    with pytest.raises(exception.InvalidDescriptor, match="page map of file 2 is invalid"):
        descriptor.Descriptor.decode(altered.encode())


def with_state(state: bytes) -> bytes:
    data = SAMPLE.encode()
    _, _, _, manifest, length, _ = HEADER.unpack_from(data)
    end = START + manifest
    return pack(data[START:end], state, data[end + length :])


def test_device_state_does_not_decompress() -> None:
    with pytest.raises(exception.InvalidDescriptor, match="does not decompress"):
        descriptor.Descriptor.decode(with_state(b"nothing"))


def test_device_state_ends_too_soon_or_late() -> None:
    state = zlib.compress(b"state")
    for wrong in (state[:-1], state + b"x"):
        with pytest.raises(exception.InvalidDescriptor, match="does not end where it must"):
            descriptor.Descriptor.decode(with_state(wrong))


def test_device_state_bomb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(descriptor, "MAX_DEVICE_STATE", 1 << 20)
    bomb = zlib.compress(bytes((1 << 20) + 1))
    with pytest.raises(exception.InvalidDescriptor, match="more than 1048576 bytes"):
        descriptor.Descriptor.decode(with_state(bomb))
