# SPDX-License-Identifier: Apache-2.0
"""The files of a guest's disks: by its XML, and by name."""

from collections.abc import Iterator
import contextlib
import dataclasses
import os
import re

from lxml import etree

from nova_snowflock import exception
from nova_snowflock.virt.disks import disk_xml
from nova_snowflock.virt.disks import qcow2

_IMAGE = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_NEXT = ".next"


@dataclasses.dataclass(frozen=True)
class Disk:
    """A disk that its guest can write to.

    :param target: its target device
    :param path: of its topmost file, which is the one that the cloud knows
    :param known_as: every name by which libvirt knows one of its files. A domain that was started
        while the disk had layers has read their names in the files, and keeps that of the one that
        they are merged into: it must stay a name of it
    :param format: that file's
    :param indexes: libvirt's numbers of its layers, the topmost first; none if it does not run
    :param aio: libvirt's attribute ``io``, if given
    :param discard: libvirt's attribute ``discard``, if given
    """

    target: str
    path: str
    known_as: frozenset[str]
    format: str
    indexes: tuple[int, ...]
    aio: str | None
    discard: str | None

    def chain(self) -> list[qcow2.Layer]:
        """Its files as they name each other, the topmost first.

        :raises DiskError: they make no chain
        """
        return qcow2.chain(self.path, self.format)

    def frozen_path(self, image: str) -> str:
        """:func:`frozen_path` of its path."""
        return frozen_path(self.path, image)

    def next_path(self, image: str) -> str:
        """:func:`next_path` of its path."""
        return next_path(self.path, image)

    def is_layer(self, path: str) -> bool:
        """Whether a path is a :meth:`frozen_path` of it."""
        return path != self.path == _disk_of(path)

    def leftovers(self) -> Iterator[str]:
        """Every file beside its topmost that forks and merges have made."""
        directory = os.path.dirname(self.path)
        for name in os.listdir(directory):
            path = os.path.join(directory, name)
            if path == f"{self.path}{_NEXT}" or self.is_layer(path.removesuffix(_NEXT)):
                yield path


def frozen_path(path: str, image: str) -> str:
    """Where the topmost file of the disk at a path goes when an image is captured."""
    return f"{path}.{image}"


def next_path(path: str, image: str) -> str:
    """What takes its place then."""
    return frozen_path(path, image) + _NEXT


def disk_path(path: str) -> str:
    """The path of the disk that a path is a :func:`frozen_path` of; any other path as it is."""
    disk = _disk_of(path)
    # Whatever is done to its files, there is always one with the disk's name.
    if disk == path or not os.path.exists(disk):
        return path
    # Others name files alike, such as the snapshots of a volume: those are not below it.
    return disk if not os.path.exists(path) or _is_part(path, disk) else path


def _is_part(path: str, disk: str) -> bool:
    """Whether a file is a disk's topmost, or a layer below that."""
    if os.path.samefile(path, disk):
        return True
    with contextlib.suppress(exception.DiskError):
        for layer, _ in qcow2.walk(disk, qcow2.QCOW2):
            if os.path.dirname(layer) != os.path.dirname(disk):
                break  # what forks have frozen is all beside it
            if os.path.exists(layer) and os.path.samefile(layer, path):
                return True
    return False


def _disk_of(path: str) -> str:
    """What :func:`disk_path` is if that is there."""
    disk, _, image = path.rpartition(".")
    return disk if _IMAGE.fullmatch(image) else path


def writable(root: etree._Element) -> list[Disk]:
    """The guest's writable disks, by its live XML or, if it does not run, the inactive one.

    :raises CannotFork: one is of a kind that cannot be forked
    """
    for element in root.iterfind("devices/disk"):
        reason = disk_xml.refusal(element)
        if reason is not None:
            raise exception.CannotFork(reason)
    return list(forkable(root))


def forkable(root: etree._Element) -> Iterator[Disk]:
    """Those of the guest's writable disks that are of a kind that can be forked."""
    for element in root.iterfind("devices/disk"):
        if disk_xml.refusal(element) is None and disk_xml.is_forked(element):
            driver, source = element.find("driver"), element.find("source")
            assert driver is not None
            assert source is not None
            yield Disk(
                disk_xml.target(element),
                disk_path(os.path.normpath(str(source.get("file")))),
                frozenset(str(file.get("file")) for file in element.iter("source")),
                str(driver.get("type")),
                tuple(_indexes(element)),
                driver.get("io"),
                driver.get("discard"),
            )


def _indexes(disk: etree._Element) -> Iterator[int]:
    source = disk.find("source")
    if source is None or source.get("index") is None:
        return
    yield int(str(source.get("index")))
    layer = disk.find("backingStore")
    while layer is not None and layer.get("index") is not None:
        yield int(str(layer.get("index")))
        layer = layer.find("backingStore")


def give_name(path: str, name: str) -> None:
    """Have a file under a second name, in place of what may have that."""
    if os.path.exists(name) and os.path.samefile(path, name):
        return
    temporary = f"{name}{_NEXT}"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    os.link(path, temporary)
    os.rename(temporary, name)
    sync(os.path.dirname(name))


def sync(path: str) -> None:
    """Have a file, or the names in a directory, survive a loss of power."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def is_written(pid: int, path: str) -> bool:
    """Whether the process has the file open for writing."""
    try:
        wanted = os.stat(path)
    except FileNotFoundError:
        return False
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(f"/proc/{pid}/fd/{fd}"), wanted):
                with open(f"/proc/{pid}/fdinfo/{fd}", encoding="ascii") as info:
                    flags = next(line for line in info if line.startswith("flags:"))
                if int(flags.split()[1], 8) & os.O_ACCMODE == os.O_RDWR:
                    return True
    return False
