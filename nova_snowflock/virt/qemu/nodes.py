# SPDX-License-Identifier: Apache-2.0
"""The layers of a guest's disks as libvirt has QEMU name them, and what libvirt does to them."""

from collections.abc import Sequence
import contextlib
import functools
import os
from typing import Any

import libvirt

from nova_snowflock import exception
from nova_snowflock.virt import libvirt_xml
from nova_snowflock.virt.disks import blocks
from nova_snowflock.virt.disks import files
from nova_snowflock.virt.disks import qcow2
from nova_snowflock.virt.qemu import guest as qemu_guest
from nova_snowflock.virt.qemu import monitor

_JOBS = (
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT,
    libvirt.VIR_DOMAIN_BLOCK_JOB_TYPE_PULL,
)


class Blocks(blocks.Blocks):
    """Through libvirt, which keeps account of what is done."""

    def __init__(self, domain: libvirt.virDomain) -> None:
        super().__init__(domain)
        self._qemu = monitor.Monitor(domain)

    @functools.cached_property
    def pid(self) -> int:
        return qemu_guest.qemu_pid(self.domain)

    def examine(self, disk: files.Disk, chain: Sequence[qcow2.Layer]) -> None:
        if len(chain) != len(disk.indexes):
            raise exception.DiskError(
                f"its disk {disk.target} has {len(chain)} layers, of which libvirt knows "
                f"{len(disk.indexes)}"
            )
        if self.domain.blockJobInfo(disk.target):
            raise exception.DiskError(f"libvirt is busy with a job on its disk {disk.target}")

    def file_in_use(self, disk: files.Disk) -> str:
        return _file_in_use(self._nodes(), disk)

    def relocate(self, disk: files.Disk, path: str) -> None:
        known = self._nodes()
        top, storage, spare = _format(disk.indexes[0]), _storage(disk.indexes[0]), _spare(disk)
        if spare in known:
            # Left by a call that was interrupted, who knows when. QEMU keeps it only if it is in
            # use.
            with contextlib.suppress(exception.MonitorError):
                self._qemu.command("blockdev-del", {"node-name": spare})
                del known[spare]
        if spare not in known and _file_in_use(known, disk) == path:
            return
        self.check_written(disk, path)
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
            # QEMU asks for a file's length when it opens it, and then goes by what it writes to
            # that node itself (block.c, refresh_total_sectors). What the guest writes by the old
            # node behind the end, before the new one is in use, would read as zeros, and be merged
            # as such.
            if node["driver"] == qcow2.QCOW2:
                qcow2.make_room(path, known[top]["image"]["virtual-size"])
            self._qemu.command("blockdev-add", {**file, "node-name": name, **options})

        # libvirt goes by the node's name, so the new one must have that of the old. Both cannot be
        # there at once, so another stands in, which leaves the file's lock to them.
        if spare not in known:
            add(spare, locking="off")
        self._qemu.command("blockdev-reopen", {"options": [{**node, "file": spare}]})
        if storage in known:
            self._qemu.command("blockdev-del", {"node-name": storage})
        add(storage)
        self._qemu.command("blockdev-reopen", {"options": [{**node, "file": storage}]})
        self._qemu.command("blockdev-del", {"node-name": spare})

    def begin_merge(self, disk: files.Disk, chain: Sequence[qcow2.Layer], depth: int) -> None:
        base = f"{disk.target}[{disk.indexes[depth]}]"
        active = libvirt.VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
        self.domain.blockCommit(disk.target, base, None, 0, active)

    def end_merge(self, disk: files.Disk) -> None:
        self.domain.blockJobAbort(disk.target, libvirt.VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT)

    def begin_copy(self, disk: files.Disk, chain: Sequence[qcow2.Layer], depth: int | None) -> None:
        if depth is None:
            self.domain.blockPull(disk.target)
        else:
            self.domain.blockRebase(disk.target, f"{disk.target}[{disk.indexes[depth]}]")

    def job(self, disk: files.Disk) -> blocks.Job | None:
        if not self.domain.blockJobInfo(disk.target):
            return None
        root = libvirt_xml.parse(self.domain.XMLDesc())
        mirrors = root.iterfind(f"devices/disk/target[@dev='{disk.target}']/../mirror")
        ready = any(mirror.get("ready") == "yes" for mirror in mirrors)
        return blocks.Job.READY if ready else blocks.Job.WORKING

    def cancel(self, disk: files.Disk) -> None:
        with contextlib.suppress(libvirt.libvirtError):
            if self.domain.blockJobInfo(disk.target).get("type") in _JOBS:
                self.domain.blockJobAbort(disk.target)

    def _nodes(self) -> dict[str, dict[str, Any]]:
        nodes = self._qemu.command("query-named-block-nodes", {"flat": True})
        return {node["node-name"]: node for node in nodes}


def _file_in_use(known: dict[str, dict[str, Any]], disk: files.Disk) -> str:
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


def _format(index: int) -> str:
    return f"libvirt-{index}-format"


def _storage(index: int) -> str:
    return f"libvirt-{index}-storage"


def _spare(disk: files.Disk) -> str:
    return f"snowflock-{disk.indexes[0]}"
