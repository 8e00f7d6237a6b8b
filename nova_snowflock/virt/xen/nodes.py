# SPDX-License-Identifier: Apache-2.0
"""The layers of a guest's disks in a QEMU of libxl's, which names them itself.

So they are told by their files: QEMU has one node for each layer. What is added here is named, too,
and closed when nobody uses it any more, as are the nodes of layers that were merged away.
"""

from collections.abc import Sequence
import contextlib
import functools
import json
import os
import secrets
import time
from typing import Any

import libvirt

from nova_snowflock import exception
from nova_snowflock.virt.disks import blocks
from nova_snowflock.virt.disks import files
from nova_snowflock.virt.disks import qcow2
from nova_snowflock.virt.xen import qmp

_DESCRIBED, _UNNAMED = "json:", "#"
_PATIENCE = 60.0
_LOOK_AGAIN = 0.005


class Blocks(blocks.Blocks):
    """Through QEMU's own monitor; neither libxl nor libvirt knows of layers."""

    def __init__(self, domain: libvirt.virDomain, monitor: qmp.Monitor | None = None) -> None:
        super().__init__(domain)
        self._monitor = monitor

    @functools.cached_property
    def _qemu(self) -> qmp.Monitor:
        return self._monitor or qmp.Monitor(self.domain.ID())

    @functools.cached_property
    def pid(self) -> int:
        return self._qemu.pid()

    def examine(self, disk: files.Disk, chain: Sequence[qcow2.Layer]) -> None:
        if self._qemu.command("query-block-jobs"):
            raise exception.DiskError("QEMU is busy with a job on one of its disks")
        for layer in chain:
            self._layer(layer)

    def file_in_use(self, disk: files.Disk) -> str:
        return _file(self._top(disk))

    def relocate(self, disk: files.Disk, path: str) -> None:
        try:
            top = self._top(disk)
            if _file(top) == path:
                return
            self.check_written(disk, path)
            # QEMU asks for a file's length when it opens it, and then goes by what it writes to
            # that node itself, as in virt/qemu/nodes.py.
            qcow2.make_room(path, top["image"]["virtual-size"])
            replaced = self._node("file", _file(top))
            file = self._add(_file_options(path))
            below = disk.chain()[1:2]
            self._reopen(disk, top, file, self._layer(below[0]) if below else None, replaced)
        finally:
            self._close_unused()

    def _reopen(
        self, disk: files.Disk, top: dict[str, Any], file: str, below: str | None, replaced: str
    ) -> None:
        """Have the topmost layer use other nodes.

        :param file: of its file
        :param below: of the layer below it
        :param replaced: that it does not use any more
        """
        options = {
            **_layer_options(disk),
            "node-name": top["node-name"],
            "file": file,
            "backing": below,
            "detect-zeroes": top["detect_zeroes"],
        }
        # What nobody uses is closed at once, for which QEMU 7.2 does not take the lock of the
        # IOThread that it is in, as disks of Xen are (block.c, bdrv_reopen_multiple), and aborts.
        # So somebody uses it until it is closed by hand: a filter whose child is not its "file",
        # which would be read without that lock, too (bdrv_open_inherit).
        self._add({"driver": "blkdebug", "image": replaced})
        self._qemu.command("blockdev-reopen", {"options": [options]})

    def add_overlay(self, disk: files.Disk) -> tuple[str, str]:
        """Have QEMU open the file that has the disk's name, to be laid on the one that it has.

        :returns: the nodes of both, for :meth:`lay`
        """
        options = {**_layer_options(disk), "file": _file_options(disk.path), "backing": None}
        return self._top(disk)["node-name"], self._add(options)

    def _add(self, options: dict[str, Any]) -> str:
        name = f"snowflock-{secrets.token_hex(8)}"
        self._qemu.command("blockdev-add", {**options, "node-name": name})
        return name

    def lay(self, overlays: Sequence[tuple[str, str]]) -> None:
        """Have the guest write to overlays of its disks from now on, or to none of them."""
        actions = [
            {"type": "blockdev-snapshot", "data": {"node": node, "overlay": overlay}}
            for node, overlay in overlays
        ]
        self._qemu.command("transaction", {"actions": actions})

    def begin_merge(self, disk: files.Disk, chain: Sequence[qcow2.Layer], depth: int) -> None:
        self._name(disk, chain, depth)
        self._begin("block-commit", disk, chain[depth])

    def _name(self, disk: files.Disk, chain: Sequence[qcow2.Layer], depth: int) -> None:
        """Have named nodes down to a layer.

        QEMU does not reopen one that it opened because another file names it, so :meth:`relocate`
        could not when it is the topmost.
        """
        if not any(self._layer(layer).startswith(_UNNAMED) for layer in chain[1 : depth + 1]):
            return
        replaced = self._layer(chain[1])
        below: str | None = None
        for layer in reversed(chain[1:]):
            options: dict[str, Any] = {"driver": layer.format, "file": _file_options(layer.path)}
            if layer.format == qcow2.QCOW2:
                options |= {**_layer_options(disk), "backing": below}
            below = self._add({**options, "read-only": True})
        file = self._node("file", disk.path)
        self._reopen(disk, self._top(disk), file, below, replaced)
        self._close_unused()

    def end_merge(self, disk: files.Disk) -> None:
        merged = self._top(disk)["node-name"]
        self._qemu.command("block-job-complete", {"device": _job(disk)})
        deadline = time.monotonic() + _PATIENCE
        while self.job(disk) is not None:
            if time.monotonic() > deadline:
                raise exception.DiskError(f"QEMU does not end the merge of {disk.target}")
            time.sleep(_LOOK_AGAIN)
        if self._top(disk)["node-name"] == merged:
            raise exception.DiskError(f"QEMU did not merge {disk.target}; its log says why")

    def begin_copy(self, disk: files.Disk, chain: Sequence[qcow2.Layer], depth: int | None) -> None:
        self._begin("block-stream", disk, None if depth is None else chain[depth])

    def _begin(self, command: str, disk: files.Disk, base: qcow2.Layer | None) -> None:
        arguments = {"job-id": _job(disk), "device": self._top(disk)["node-name"]}
        if base is not None:
            arguments["base-node"] = self._layer(base)
        self._qemu.command(command, arguments)

    def job(self, disk: files.Disk) -> blocks.Job | None:
        for job in self._qemu.command("query-block-jobs"):
            if job["device"] == _job(disk):
                return blocks.Job.READY if job["ready"] else blocks.Job.WORKING
        self._close_unused()
        return None

    def cancel(self, disk: files.Disk) -> None:
        with contextlib.suppress(exception.MonitorError):
            self._qemu.command("block-job-cancel", {"device": _job(disk)})

    def _top(self, disk: files.Disk) -> dict[str, Any]:
        """What the guest's device reads and writes."""
        for device in self._qemu.command("query-block"):
            node: dict[str, Any] | None = device.get("inserted")
            if node is not None and (_file(node) == disk.path or disk.is_layer(_file(node))):
                return node
        raise exception.DiskError(f"QEMU does not have the disk {disk.target} open")

    def _layer(self, layer: qcow2.Layer) -> str:
        """The name of a layer's node."""
        return self._node(layer.format, layer.path)

    def _node(self, driver: str, path: str) -> str:
        for node in self._nodes():
            if node["drv"] == driver and _file(node) == path:
                return str(node["node-name"])
        raise exception.DiskError(f"QEMU does not have the disk's file {path} open")

    def _nodes(self) -> list[dict[str, Any]]:
        return list(self._qemu.command("query-named-block-nodes", {"flat": True}))

    def _close_unused(self) -> None:
        """QEMU refuses to close what is in use, or not to be closed by hand."""
        closed = True
        while closed:
            closed = False
            for node in self._nodes():
                with contextlib.suppress(exception.MonitorError):
                    self._qemu.command("blockdev-del", {"node-name": node["node-name"]})
                    closed = True


def _file(node: dict[str, Any]) -> str:
    name = str(node["file"])
    # A layer that was added without what is below it has a name that says what is now.
    if name.startswith(_DESCRIBED):
        name = str(json.loads(name.removeprefix(_DESCRIBED))["file"]["filename"])
    return os.path.normpath(name)


def _file_options(path: str) -> dict[str, Any]:
    """As libxl's QEMU opens a disk itself (hw/block/xen-block.c, xen_block_drive_create)."""
    return {
        "driver": "file",
        "filename": path,
        "locking": "off",
        "auto-read-only": True,
        "discard": "unmap",
    }


def _layer_options(disk: files.Disk) -> dict[str, Any]:
    return {"driver": qcow2.QCOW2, "discard": disk.discard or "unmap"}


def _job(disk: files.Disk) -> str:
    return f"snowflock-{disk.target}"
