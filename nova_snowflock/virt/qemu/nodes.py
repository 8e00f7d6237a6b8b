# SPDX-License-Identifier: Apache-2.0
"""The files of a running guest's disks: in its XML, in QEMU, and by name.

QEMU opens a file again by its name whenever a layer begins or ceases to be written
(block/file-posix.c, raw_reconfigure_getfd): when a snapshot is laid on it, and when one is merged
into it. Whatever has the name then is taken for a file that was renamed meanwhile, and nobody
notices before the data is gone. So QEMU is told of a new name, by :func:`relocate`, while both
names are true.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import os
import re
from typing import Any

from lxml import etree

from nova_snowflock import exception
from nova_snowflock.virt.qemu import device_xml
from nova_snowflock.virt.qemu import monitor
from nova_snowflock.virt.qemu import qcow2

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
        reason = device_xml.disk_refusal(element)
        if reason is not None:
            raise exception.CannotFork(reason)
    return list(forkable(root))


def forkable(root: etree._Element) -> Iterator[Disk]:
    """Those of the guest's writable disks that are of a kind that can be forked."""
    for element in root.iterfind("devices/disk"):
        if device_xml.disk_refusal(element) is None and device_xml.is_forked(element):
            driver, source = element.find("driver"), element.find("source")
            assert driver is not None
            assert source is not None
            yield Disk(
                device_xml.disk_target(element),
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


def _file_in_use(known: dict[str, dict[str, Any]], disk: Disk) -> str:
    """The name that QEMU knows the disk's topmost file by.

    :param known: QEMU's nodes, by their names
    :raises DiskError: libvirt does not name the nodes of QEMU's block graph as this module expects
    """
    node = known.get(_spare(disk)) or known.get(_storage(disk.indexes[0]))
    if node is None or _format(disk.indexes[0]) not in known:
        raise exception.DiskError(
            f"libvirt has not named the files of the disk {disk.target} in QEMU as expected"
        )
    return os.path.normpath(str(node["file"]))


def relocate(qemu: monitor.Monitor, pid: int, disk: Disk, path: str) -> None:
    """Have QEMU know the disk's topmost file by another of its names. The guest may run.

    The file must have the old name, too, until this is done.

    :param pid: of QEMU
    :raises DiskError: that is not the name of the file that QEMU has open
    :raises MonitorError: QEMU refuses. What was half done is completed by the next call
    """
    known = _nodes(qemu)
    top, storage, spare = _format(disk.indexes[0]), _storage(disk.indexes[0]), _spare(disk)
    if spare in known:
        # Left by a call that was interrupted, who knows when. QEMU keeps it only if it is in use.
        with contextlib.suppress(exception.MonitorError):
            qemu.command("blockdev-del", {"node-name": spare})
            del known[spare]
    if spare not in known and _file_in_use(known, disk) == path:
        return
    if not _is_written(pid, path):
        raise exception.DiskError(f"QEMU has another file than {path} open for {disk.target}")
    cache = {name: known[top]["cache"][name] for name in ("direct", "no-flush")}
    file: dict[str, Any] = {
        "driver": "file",
        "filename": path,
        "auto-read-only": True,
        "discard": "unmap",
        "cache": cache,
    }
    if disk.aio is not None:
        file["aio"] = disk.aio
    node: dict[str, Any] = {
        "driver": known[top]["drv"],
        "node-name": top,
        "read-only": False,
        "cache": cache,
        "detect-zeroes": known[top]["detect_zeroes"],
    }
    if disk.discard is not None:
        node["discard"] = disk.discard
    if node["driver"] == qcow2.QCOW2:
        node["backing"] = None
        if len(disk.indexes) > 1:
            below = _format(disk.indexes[1])
            node["backing"] = below if below in known else _storage(disk.indexes[1])

    def add(name: str, **options: str) -> None:
        # QEMU asks for a file's length when it opens it, and then goes by what it writes to that
        # node itself (block.c, refresh_total_sectors). What the guest writes by the old node behind
        # the end, before the new one is in use, would read as zeros, and be merged as such.
        if node["driver"] == qcow2.QCOW2:
            qcow2.make_room(path, known[top]["image"]["virtual-size"])
        qemu.command("blockdev-add", {**file, "node-name": name, **options})

    # libvirt goes by the node's name, so the new one must have that of the old. Both cannot be
    # there at once, so another stands in, which leaves the file's lock to them.
    if spare not in known:
        add(spare, locking="off")
    qemu.command("blockdev-reopen", {"options": [{**node, "file": spare}]})
    if storage in known:
        qemu.command("blockdev-del", {"node-name": storage})
    add(storage)
    qemu.command("blockdev-reopen", {"options": [{**node, "file": storage}]})
    qemu.command("blockdev-del", {"node-name": spare})


def repair(qemu: monitor.Monitor, pid: int, disk: Disk) -> None:
    """Have what QEMU writes to be what the disk's name stands for, whatever was interrupted.

    :raises DiskError: it cannot be made so
    """
    path = _file_in_use(_nodes(qemu), disk)
    if path == disk.path:
        relocate(qemu, pid, disk, path)
        return
    if not disk.is_layer(path):
        raise exception.DiskError(f"QEMU uses {path} for {disk.target}, libvirt {disk.path}")
    if not os.path.exists(path):
        give_name(disk.path, path)
    if not _is_written(pid, path):
        raise exception.DiskError(f"QEMU has another file than {path} open for {disk.target}")
    give_name(path, disk.path)
    relocate(qemu, pid, disk, disk.path)
    if path not in disk.known_as:
        os.unlink(path)


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


def _format(index: int) -> str:
    return f"libvirt-{index}-format"


def _storage(index: int) -> str:
    return f"libvirt-{index}-storage"


def _spare(disk: Disk) -> str:
    return f"snowflock-{disk.indexes[0]}"


def _nodes(qemu: monitor.Monitor) -> dict[str, dict[str, Any]]:
    nodes = qemu.command("query-named-block-nodes", {"flat": True})
    return {node["node-name"]: node for node in nodes}


def _is_written(pid: int, path: str) -> bool:
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
