# SPDX-License-Identifier: Apache-2.0
"""Disk images: what their headers say, the chain that they form, and making new ones.

The format is QEMU's (docs/interop/qcow2.txt). Formats are never guessed: what a raw disk holds is
up to its guest, and that may look like the header of a qcow2 file that names a file of the host.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import errno
import os
import struct
import subprocess

from nova_snowflock import exception

_MAGIC = b"QFI\xfb"
# Version, offset and size of the backing file's name, bits of a cluster, virtual size, encryption.
_HEADER = struct.Struct(">4sIQIIQI")
_INCOMPATIBLE = struct.Struct(">Q")
_INCOMPATIBLE_OFFSET = 72
_HEADER_LENGTH = struct.Struct(">I")
_HEADER_LENGTH_OFFSET = 100
_V2_LENGTH = 72
_BACKING = struct.Struct(">QI")
_BACKING_OFFSET = 8
# Of a new file: entries of the level 1 table and its offset, the refcount table's offset and
# clusters, snapshots, features, the size of a refcount, the header's length.
_REST = struct.Struct(">IQQIIQQQQII")
_NEW_HEADER = struct.Struct(_HEADER.format + _REST.format[1:])
_OFFSET = struct.Struct(">Q")
_REFCOUNT = struct.Struct(">H")
_REFCOUNT_ORDER = 4  # 16 bits
_CLUSTER_BITS = 16
_SECTOR = 512
_EXTENSION = struct.Struct(">II")
_END = 0
_BACKING_FORMAT = 0xE2792ACA
_CORRUPT, _DATA_FILE = 1 << 1, 1 << 2
_MAX_CLUSTER_BITS = 21
_MAX_NAME = 1023
_USUAL_CLUSTER = 1 << 16
_BITS_OFFSET = 23  # the lowest byte of four
_MAX_LAYERS = 256
_ROOM = 1 << 30

QCOW2 = "qcow2"
RAW = "raw"


@dataclasses.dataclass(frozen=True)
class Header:
    """The header of a qcow2 file.

    :param data: the first cluster
    :param size: bytes that a guest sees
    :param backing: name of its backing file, as it is written there
    :param backing_format: that file's, if the header tells
    """

    data: bytes
    size: int
    backing: str | None
    backing_format: str | None

    def naming(self, name: str) -> bytes:
        """The beginning of the file, changed so that it names another backing file.

        :raises DiskError: there is no room for the name
        """
        offset, length = _BACKING.unpack_from(self.data, _BACKING_OFFSET)
        encoded = os.fsencode(name)
        if len(encoded) > length:
            # The name is the last that is in the cluster.
            offset = len(self.data) - len(encoded)
            if len(encoded) > _MAX_NAME or self.data[offset:].strip(b"\0"):
                raise exception.DiskError(f"A qcow2 header has no room for the name {name}")
        changed = bytearray(self.data[: offset + len(encoded)])
        changed[offset:] = encoded
        _BACKING.pack_into(changed, _BACKING_OFFSET, offset, len(encoded))
        return bytes(changed)


@dataclasses.dataclass(frozen=True)
class Layer:
    """A file of a disk.

    :param path: absolute
    :param format: :data:`QCOW2` or :data:`RAW`
    :param size: bytes that a guest sees
    :param header: of a qcow2 file
    """

    path: str
    format: str
    size: int
    header: Header | None = None


def parse(data: bytes) -> Header:
    """The header in the first bytes of a qcow2 file, which must include its first cluster.

    :raises DiskError: it is not one, or of a kind that cannot be forked
    """
    if len(data) < _HEADER.size or data[:4] != _MAGIC:
        raise exception.DiskError("it is not a qcow2 file")
    _, version, offset, length, bits, size, encryption = _HEADER.unpack_from(data)
    if version not in (2, 3) or not 9 <= bits <= _MAX_CLUSTER_BITS:
        raise exception.DiskError(f"it is of the unknown qcow2 version {version}")
    data = data[: 1 << bits]
    extensions, features = _V2_LENGTH, 0
    try:
        if version == 3:
            (features,) = _INCOMPATIBLE.unpack_from(data, _INCOMPATIBLE_OFFSET)
            (extensions,) = _HEADER_LENGTH.unpack_from(data, _HEADER_LENGTH_OFFSET)
        found = _extensions(data, extensions, offset or len(data))
    except struct.error as error:
        raise exception.DiskError("its qcow2 header is truncated") from error
    if encryption:
        raise exception.DiskError("it is encrypted")
    if features & _DATA_FILE:
        raise exception.DiskError("its data is in another file than its qcow2 header")
    if features & _CORRUPT:
        raise exception.DiskError("it is marked as corrupt")
    backing = None
    if offset:
        name = data[offset : offset + length]
        if not 0 < length <= _MAX_NAME or len(name) != length or b"\0" in name:
            raise exception.DiskError("its qcow2 header has no proper name of a backing file")
        backing = os.fsdecode(name)
    backing_format = found.get(_BACKING_FORMAT, b"").decode("ascii", "replace") or None
    return Header(data, size, backing, backing_format)


def _extensions(data: bytes, start: int, end: int) -> dict[int, bytes]:
    found = {}
    while start + _EXTENSION.size <= end:
        kind, length = _EXTENSION.unpack_from(data, start)
        if kind == _END:
            break
        start += _EXTENSION.size
        found[kind] = data[start : start + length]
        start += -(-length // 8) * 8
    return found


def _first_cluster(fd: int) -> bytes:
    # Usually it is not larger, and the file may be one that comes over the network.
    start = os.pread(fd, _USUAL_CLUSTER, 0)
    if len(start) == _USUAL_CLUSTER and start[_BITS_OFFSET] > _USUAL_CLUSTER.bit_length() - 1:
        return os.pread(fd, 1 << _MAX_CLUSTER_BITS, 0)
    return start


def read_layer(path: str, layer_format: str) -> Layer:
    """:raises DiskError: the file is missing or cannot be a layer of a forked disk"""
    try:
        with open(path, "rb", buffering=0) as file:
            if layer_format == QCOW2:
                header = parse(_first_cluster(file.fileno()))
                return Layer(path, layer_format, header.size, header)
            return Layer(path, layer_format, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise exception.DiskError(f"the disk's file {path}: {error.strerror}") from error
    except exception.DiskError as error:
        raise exception.DiskError(f"the disk's file {path}: {error}") from error


def backing_path(layer: Layer) -> str | None:
    """Absolute path of a layer's backing file.

    :raises DiskError: it is not a plain file
    """
    name = layer.header.backing if layer.header else None
    if name is None:
        return None
    if ":" in name.partition("/")[0]:
        raise exception.DiskError(f"the disk's file {layer.path} is based on {name}, no plain file")
    return os.path.normpath(os.path.join(os.path.dirname(layer.path), name))


def chain(path: str, top_format: str) -> list[Layer]:
    """The files of a disk, the topmost first.

    :raises DiskError: one is missing, or of a kind that cannot be forked
    """
    return [read_layer(*found) for found in walk(path, top_format)]


def walk(path: str, top_format: str) -> Iterator[tuple[str, str]]:
    """Path and format of the files of a disk, each before it is opened to find the next.

    :raises DiskError: one is missing, or of a kind that cannot be forked
    """
    for _ in range(_MAX_LAYERS):
        yield path, top_format
        layer = read_layer(path, top_format)
        below = backing_path(layer)
        if below is None:
            return
        below_format = layer.header.backing_format if layer.header else None
        if below_format not in (QCOW2, RAW):
            raise exception.DiskError(
                f"the disk's file {path} says of its backing file the format {below_format}, not "
                "qcow2 or raw"
            )
        path, top_format = below, below_format
    raise exception.DiskError(f"the disk has more than {_MAX_LAYERS} layers, the last {path}")


def create_overlay(path: str, backing: str, backing_format: str, size: int) -> None:
    """Make an empty qcow2 file on top of another, at which this does not look.

    Written here, as starting qemu-img takes longer than all that a clone's disk takes otherwise.

    :param backing: name of that, as the header shall have it
    :param size: bytes that the guest sees
    :raises DiskError: the path exists, or the file could not be made
    """
    length, parts = _empty(backing, backing_format, size)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "wb") as file:
                file.truncate(length)
                for offset, data in parts.items():
                    file.seek(offset)
                    file.write(data)
        except BaseException:
            os.unlink(path)
            raise
    except OSError as error:
        raise exception.DiskError(f"The file {path} cannot be made: {error.strerror}") from error


def _empty(backing: str, backing_format: str, size: int) -> tuple[int, dict[int, bytes]]:
    """A qcow2 file (version 3) in which everything is as in its backing file.

    Its length, and what is not zero in it, by offset.

    Its clusters: header, refcount table, refcount block, and the level 1 table, all unallocated.
    """
    name, kind = os.fsencode(backing), backing_format.encode()
    if len(name) > _MAX_NAME:
        raise exception.DiskError(f"The name {backing} is too long for a qcow2 header")
    cluster = 1 << _CLUSTER_BITS
    size = -(-size // _SECTOR) * _SECTOR  # as QEMU sees a raw file
    # Eight bytes an entry, at both levels.
    entries = -(-size // (cluster * (cluster // 8)))
    table = -(-entries * 8 // cluster)
    extensions = _EXTENSION.pack(_BACKING_FORMAT, len(kind)) + kind.ljust(8, b"\0")
    extensions += _EXTENSION.pack(_END, 0)
    start = _NEW_HEADER.size + len(extensions)
    first = _HEADER.pack(_MAGIC, 3, start, len(name), _CLUSTER_BITS, size, 0) + _REST.pack(
        entries, 3 * cluster, cluster, 1, 0, 0, 0, 0, 0, _REFCOUNT_ORDER, _NEW_HEADER.size
    )
    clusters = 3 + table
    return clusters * cluster, {
        0: first + extensions + name,
        cluster: _OFFSET.pack(2 * cluster),
        2 * cluster: _REFCOUNT.pack(1) * clusters,
    }


def make_room(path: str, size: int) -> None:
    """Have a file that its guest writes to end in a hole, so that it does not get longer for a
    while: until another half a GiB is in it, or never if its disk takes less than that.

    :param size: bytes that the guest sees
    :raises DiskError: it cannot be made longer
    """
    # Data, and the tables for that. Of clusters as small as they can be those take a fiftieth.
    most = size + size // 32 + _ROOM // 16
    try:
        with open(path, "rb+", buffering=0) as file:
            end = os.fstat(file.fileno()).st_size
            if end < most and not _is_hole(file.fileno(), max(0, end - _ROOM // 2)):
                # It may grow meanwhile. This neither makes it shorter, nor writes to it.
                os.posix_fallocate(file.fileno(), min(end + _ROOM, most) - _SECTOR, _SECTOR)
    except OSError as error:
        raise exception.DiskError(
            f"The file {path} cannot be made longer: {error.strerror}"
        ) from error


def _is_hole(fd: int, start: int) -> bool:
    """Whether there is no data in a file from an offset on."""
    try:
        os.lseek(fd, start, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return True
        raise
    return False


def commit(top: str, base: str) -> None:
    """Write what the layers of a disk that nobody uses have above ``base`` into that.

    :raises DiskError: it failed; the disk reads as before
    """
    qemu_img("commit", "-q", "-f", QCOW2, "-b", base, top)


def qemu_img(*arguments: str) -> None:
    """:raises DiskError: it failed; the message is its own"""
    command: Sequence[str] = ("qemu-img", *arguments)
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise exception.DiskError(f"qemu-img cannot be run: {error.strerror}") from error
    except subprocess.CalledProcessError as error:
        raise exception.DiskError(
            f"qemu-img {arguments[0]} failed: {(error.stderr or error.stdout).strip()}"
        ) from error
