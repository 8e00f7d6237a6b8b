# SPDX-License-Identifier: Apache-2.0
"""The descriptor: what a clone host must hold before a clone may run.

The format is defined in docs/descriptor.rst. A decoded descriptor has been checked completely:
whoever holds a :class:`Descriptor` need not doubt the type or range of anything in it. It never
contains the image's key.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import datetime
import hashlib
import ipaddress
import json
import os.path
import re
import struct
from typing import Any, Self
import uuid
import zlib

from nova_snowflock import endpoint
from nova_snowflock import exception
from nova_snowflock import memtap
from nova_snowflock.memtap import pagemap

MAGIC = b"SNOWFLCK"
VERSION = 1
PAGE_SIZE = memtap.PAGE_SIZE

DESCRIPTOR_FILE = 0
"""Number of the descriptor itself among the files that a memory server serves."""
MEMORY_FILE = 1
"""Number of the guest's memory. Disk layers come after it."""
FIRST_LAYER = 2
"""Number of the first layer of the first disk."""

MAX_DEVICE_STATE = 256 << 20
"""Bytes. Far beyond what QEMU writes (about 80 KiB plus the used pages of the small RAM blocks),
far below what would hurt a host."""
MAX_MANIFEST = 4 << 20
MAX_FILES = 64
MAX_FILE_SIZE = 4 << 40
"""Bytes, also of all files together. Bounds what page maps, a few bytes when they are compressed,
may inflate to."""
MAX_RAM_BLOCKS = 1024
MAX_SERVERS = 64
MAX_DISKS = 32
DISK_FORMATS = ("qcow2", "raw")

_HEADER = struct.Struct(">8sHHIII")
_DIGEST_SIZE = hashlib.sha256().digest_size
# QEMU's migration stream gives a RAM block's name one byte for its length.
_BLOCK_NAME = re.compile(r"[\x21-\x7e]{1,255}")
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_TARGET = re.compile(r"[a-z]{2,8}")


@dataclasses.dataclass(frozen=True)
class RamBlock:
    """A RAM block of the guest, as a clone's QEMU must have it.

    :param size: bytes, a multiple of :data:`PAGE_SIZE`
    """

    name: str
    size: int


@dataclasses.dataclass(frozen=True)
class File:
    """A file of the image.

    :param number: from :data:`MEMORY_FILE` on
    :param name: what memtap presents it as
    :param size: bytes; the last page may be cut short
    :param page_map: an encoded :class:`pagemap.PageMap` of :attr:`pages` pages
    """

    number: int
    name: str
    size: int
    page_map: bytes

    @property
    def pages(self) -> int:
        return -(-self.size // PAGE_SIZE)


@dataclasses.dataclass(frozen=True)
class Disk:
    """A disk of the guest that a clone has an own, writable layer of.

    :param target: the target device in the domain's XML, such as ``vda``
    :param file: number of the file that is its topmost layer in the image
    :param format: that file's, one of :data:`DISK_FORMATS`
    :param size: bytes that the guest sees
    :param base: absolute path of the file below its layers that a clone host must have; None if
        they need none
    """

    target: str
    file: int
    format: str
    size: int
    base: str | None


@dataclasses.dataclass(frozen=True)
class Descriptor:
    """What a clone host knows of an image; docs/descriptor.rst says more of each.

    :param image: the image's UUID
    :param hypervisor: name of the back end that made it, and the only one that can use it
    :param hypervisor_version: version of what the back end drives
    :param machine_type: versioned machine type
    :param cpu: libvirt's ``<cpu>`` element of the running parent
    :param vcpus: number of virtual processors
    :param ram_blocks: a clone's, the guest's memory first
    :param files: what the memory server serves beside the descriptor
    :param servers: ``address:port`` of each memory server
    :param group: ``address:port`` of the multicast group, or None for unicast only
    :param created: ISO 8601, UTC
    :param domain: the libvirt XML that clones derive from
    :param device_state: what a clone starts from, in the back end's own format
    :param disks: the disks whose layers are among the files
    """

    image: str
    hypervisor: str
    hypervisor_version: str
    machine_type: str
    cpu: str
    vcpus: int
    ram_blocks: tuple[RamBlock, ...]
    files: tuple[File, ...]
    servers: tuple[str, ...]
    group: str | None
    created: str
    domain: str
    device_state: bytes
    disks: tuple[Disk, ...] = ()

    def file(self, number: int) -> File:
        """The file of that number.

        :raises KeyError: the image has none
        """
        for file in self.files:
            if file.number == number:
                return file
        raise KeyError(number)

    def encode(self) -> bytes:
        """The bytes that :meth:`decode` takes."""
        files: list[dict[str, Any]] = []
        page_maps = b""
        for file in self.files:
            place = {
                "offset": len(page_maps),
                "length": len(file.page_map),
                "sha256": hashlib.sha256(file.page_map).hexdigest(),
            }
            files.append(
                {"number": file.number, "name": file.name, "size": file.size, "page_map": place}
            )
            page_maps += file.page_map
        manifest = json.dumps(
            {
                "image": self.image,
                "hypervisor": {"name": self.hypervisor, "version": self.hypervisor_version},
                "machine_type": self.machine_type,
                "cpu": self.cpu,
                "vcpus": self.vcpus,
                "ram_blocks": [dataclasses.asdict(block) for block in self.ram_blocks],
                "files": files,
                "disks": [dataclasses.asdict(disk) for disk in self.disks],
                "servers": list(self.servers),
                "group": self.group,
                "created": self.created,
                "domain": self.domain,
            },
            sort_keys=True,
            separators=(",", ":"),
            ensure_ascii=False,
        ).encode()
        state = zlib.compress(self.device_state)
        header = _HEADER.pack(MAGIC, VERSION, 0, len(manifest), len(state), len(page_maps))
        body = manifest + state + page_maps
        return header + hashlib.sha256(header + body).digest() + body

    @classmethod
    def decode(cls, data: bytes) -> Self:
        """The descriptor in ``data``, checked.

        :raises InvalidDescriptor: the message says what is wrong
        """
        manifest_bytes, state, page_maps = _open(data)
        try:
            root = json.loads(manifest_bytes.decode())
        except (ValueError, RecursionError) as error:
            raise exception.InvalidDescriptor(
                f"The descriptor's manifest is not JSON: {error}"
            ) from error
        manifest = _Object(root, "manifest")
        hypervisor = manifest.object("hypervisor")
        group = manifest.optional_string("group")
        if group is not None:
            _check_endpoint(group, "group", multicast=True)
        servers = tuple(manifest.strings("servers", MAX_SERVERS))
        for server in servers:
            _check_endpoint(server, "servers", multicast=False)
        result = cls(
            image=_check_uuid(manifest.string("image")),
            hypervisor=hypervisor.string("name"),
            hypervisor_version=hypervisor.string("version"),
            machine_type=manifest.string("machine_type"),
            cpu=manifest.string("cpu"),
            vcpus=manifest.integer("vcpus", 1, 8192),
            ram_blocks=tuple(
                RamBlock(block.match("name", _BLOCK_NAME), _page_multiple(block, "size"))
                for block in manifest.objects("ram_blocks", MAX_RAM_BLOCKS)
            ),
            files=tuple(_decode_files(manifest.objects("files", MAX_FILES), page_maps)),
            disks=tuple(
                _decode_disk(disk) for disk in manifest.objects("disks", MAX_DISKS, least=0)
            ),
            servers=servers,
            group=group,
            created=_check_time(manifest.string("created")),
            domain=manifest.string("domain"),
            device_state=_decompress(state),
        )
        hypervisor.finish()
        manifest.finish()
        _check_unique("ram_blocks", [block.name for block in result.ram_blocks])
        _check_unique("files", [file.number for file in result.files])
        _check_unique("files", [file.name for file in result.files])
        _check_unique("disks", [disk.target for disk in result.disks])
        _check_unique("disks", [disk.file for disk in result.disks])
        for disk in result.disks:
            if not any(file.number == disk.file for file in result.files):
                raise exception.InvalidDescriptor(
                    f"The descriptor has no file {disk.file}, which its disk {disk.target} is in"
                )
        return result


def _open(data: bytes) -> tuple[bytes, bytes, bytes]:
    """Manifest, compressed device state and page maps in a container, which is checked."""
    start = _HEADER.size + _DIGEST_SIZE
    if data[: len(MAGIC)] != MAGIC[: len(data)]:
        raise exception.InvalidDescriptor("This is not a descriptor: its magic is wrong")
    if len(data) < start:
        raise exception.InvalidDescriptor(
            f"The descriptor is truncated: {len(data)} bytes, its header alone has {start}"
        )
    _, version, flags, *lengths = _HEADER.unpack_from(data)
    if version != VERSION:
        raise exception.InvalidDescriptor(
            f"The descriptor is of version {version}; this host knows version {VERSION}"
        )
    if flags:
        raise exception.InvalidDescriptor(f"The descriptor has unknown flags {flags:#06x}")
    expected = start + sum(lengths)
    if len(data) < expected:
        raise exception.InvalidDescriptor(
            f"The descriptor is truncated: {len(data)} of {expected} bytes"
        )
    if len(data) > expected:
        raise exception.InvalidDescriptor(
            f"The descriptor has {len(data) - expected} bytes after its end"
        )
    if lengths[0] > MAX_MANIFEST:
        raise exception.InvalidDescriptor(
            f"The descriptor's manifest has {lengths[0]} bytes, more than {MAX_MANIFEST}"
        )
    digest = hashlib.sha256(data[: _HEADER.size] + data[start:]).digest()
    if digest != data[_HEADER.size : start]:
        raise exception.InvalidDescriptor("The descriptor was altered: its SHA-256 does not match")
    manifest_end = start + lengths[0]
    state_end = manifest_end + lengths[1]
    return data[start:manifest_end], data[manifest_end:state_end], data[state_end:]


def _decompress(state: bytes) -> bytes:
    inflater = zlib.decompressobj()
    try:
        plain = inflater.decompress(state, MAX_DEVICE_STATE + 1)
    except zlib.error as error:
        raise exception.InvalidDescriptor(
            f"The descriptor's device state does not decompress: {error}"
        ) from error
    if len(plain) > MAX_DEVICE_STATE:
        raise exception.InvalidDescriptor(
            f"The descriptor's device state has more than {MAX_DEVICE_STATE} bytes"
        )
    if not inflater.eof or inflater.unused_data:
        raise exception.InvalidDescriptor(
            "The descriptor's device state does not end where it must"
        )
    return plain


class _Object:
    """A JSON object whose keys are taken out one by one, each checked as it is taken."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise exception.InvalidDescriptor(f"The descriptor's {where} is not an object")
        self._left = dict(value)
        self._where = where

    def _take(self, key: str) -> Any:
        try:
            return self._left.pop(key)
        except KeyError:
            raise exception.InvalidDescriptor(
                f"The descriptor's {self._where} lacks {key!r}"
            ) from None

    def _wrong(self, key: str, what: str) -> exception.InvalidDescriptor:
        return exception.InvalidDescriptor(f"The descriptor's {self._where}.{key} is not {what}")

    def string(self, key: str) -> str:
        value = self._take(key)
        if not isinstance(value, str) or not value:
            raise self._wrong(key, "a string with content")
        return value

    def optional_string(self, key: str) -> str | None:
        value = self._take(key)
        if value is not None and (not isinstance(value, str) or not value):
            raise self._wrong(key, "a string or null")
        return value

    def match(self, key: str, pattern: re.Pattern[str]) -> str:
        value = self.string(key)
        if not pattern.fullmatch(value):
            raise self._wrong(key, f"of the form {pattern.pattern}")
        return value

    def integer(self, key: str, low: int, high: int) -> int:
        value = self._take(key)
        if type(value) is not int or not low <= value <= high:
            raise self._wrong(key, f"an integer from {low} to {high}")
        return value

    def object(self, key: str) -> "_Object":
        return _Object(self._take(key), f"{self._where}.{key}")

    def _list(self, key: str, most: int, least: int = 1) -> list[Any]:
        value = self._take(key)
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise self._wrong(key, f"a list of {least} to {most} entries")
        return value

    def strings(self, key: str, most: int) -> list[str]:
        values = self._list(key, most)
        if not all(isinstance(value, str) for value in values):
            raise self._wrong(key, "a list of strings")
        return values

    def objects(self, key: str, most: int, least: int = 1) -> Iterator["_Object"]:
        for index, value in enumerate(self._list(key, most, least)):
            entry = _Object(value, f"{self._where}.{key}[{index}]")
            yield entry
            entry.finish()

    def finish(self) -> None:
        """Refuse keys this version does not define: what they mean must not be left out."""
        if self._left:
            raise exception.InvalidDescriptor(
                f"The descriptor's {self._where} has an unknown key {min(self._left)!r}"
            )


def _decode_files(entries: Iterator[_Object], page_maps: bytes) -> Iterator[File]:
    total = 0
    for entry in entries:
        file = _decode_file(entry, page_maps, MAX_FILE_SIZE - total)
        total += file.size
        yield file


def _decode_file(entry: _Object, page_maps: bytes, most: int) -> File:
    number = entry.integer("number", MEMORY_FILE, MAX_FILES)
    name = entry.match("name", _FILE_NAME)
    size = entry.integer("size", 1, most)
    place = entry.object("page_map")
    offset = place.integer("offset", 0, len(page_maps))
    length = place.integer("length", 0, len(page_maps) - offset)
    page_map = page_maps[offset : offset + length]
    if place.string("sha256") != hashlib.sha256(page_map).hexdigest():
        raise exception.InvalidDescriptor(
            f"The descriptor's page map of file {number} does not match its SHA-256"
        )
    place.finish()
    file = File(number, name, size, page_map)
    try:
        pagemap.PageMap.decode(page_map, file.pages)
    except exception.InvalidPageMap as error:
        raise exception.InvalidDescriptor(
            f"The descriptor's page map of file {number} is invalid: {error}"
        ) from error
    return file


def _decode_disk(entry: _Object) -> Disk:
    disk = Disk(
        target=entry.match("target", _TARGET),
        file=entry.integer("file", FIRST_LAYER, MAX_FILES),
        format=entry.string("format"),
        size=entry.integer("size", 1, 1 << 62),
        base=entry.optional_string("base"),
    )
    if disk.format not in DISK_FORMATS:
        raise exception.InvalidDescriptor(
            f"The descriptor's disk {disk.target} is of the unknown format {disk.format!r}"
        )
    # It becomes part of what root looks at on the clone's host.
    if disk.base is not None and (
        not disk.base.startswith("/") or os.path.normpath(disk.base) != disk.base
    ):
        raise exception.InvalidDescriptor(
            f"The descriptor's disk {disk.target} is based on {disk.base!r}, no absolute path"
        )
    return disk


def _page_multiple(entry: _Object, key: str) -> int:
    value = entry.integer(key, PAGE_SIZE, 1 << 62)
    if value % PAGE_SIZE:
        raise exception.InvalidDescriptor(
            f"The descriptor's {key} {value} of a RAM block is not a multiple of {PAGE_SIZE}"
        )
    return value


def _check_uuid(value: str) -> str:
    # The image's UUID becomes part of paths.
    try:
        if str(uuid.UUID(value)) == value:
            return value
    except ValueError:
        pass
    raise exception.InvalidDescriptor(f"The descriptor's image {value!r} is not a UUID")


def _check_time(value: str) -> str:
    try:
        if datetime.datetime.fromisoformat(value).utcoffset() == datetime.timedelta(0):
            return value
    except ValueError:
        pass
    raise exception.InvalidDescriptor(f"The descriptor's created {value!r} is not a UTC time")


def _check_endpoint(value: str, key: str, *, multicast: bool) -> None:
    try:
        host, port = endpoint.parse(value)
        if port and ipaddress.ip_address(host).is_multicast == multicast:
            return
    except ValueError:
        pass
    kind = "a multicast address" if multicast else "an address"
    raise exception.InvalidDescriptor(
        f"The descriptor's {key} has {value!r}, which is not {kind} and port"
    )


def _check_unique(key: str, values: Sequence[Any]) -> None:
    if len(set(values)) != len(values):
        raise exception.InvalidDescriptor(f"The descriptor's {key} name one thing twice")
