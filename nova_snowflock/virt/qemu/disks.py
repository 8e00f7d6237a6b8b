# SPDX-License-Identifier: Apache-2.0
"""A fork's part in the disks of its parent: freezing what there is, and going on above it."""

from collections.abc import Callable
import contextlib
import dataclasses
import os

import libvirt
from lxml import etree

from nova_snowflock import descriptor
from nova_snowflock import exception
from nova_snowflock.virt import libvirt_xml
from nova_snowflock.virt.qemu import device_xml
from nova_snowflock.virt.qemu import guest as qemu_guest
from nova_snowflock.virt.qemu import layers
from nova_snowflock.virt.qemu import merge
from nova_snowflock.virt.qemu import nodes
from nova_snowflock.virt.qemu import qcow2
from nova_snowflock.virt.qemu import sparse

# As many descriptors as a message to the memory server carries (unix(7), SCM_RIGHTS, and its own
# limit) and files a descriptor has, less those of the memory.
MAX_LAYERS = descriptor.MAX_FILES - descriptor.FIRST_LAYER

_SNAPSHOT = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
)


class DiskFork:
    """The disks of a guest that is about to be forked.

    Made, prepared and switched while it runs; :meth:`copy_tips` while it is stopped; :func:`undo`
    at any time. ``switched`` is whether it may write to new layers, ``copied`` the bytes in tips.
    """

    def __init__(
        self, guest: qemu_guest.Guest, image: str, shared: Callable[[str], bool], run_path: str
    ) -> None:
        """
        :param shared: as of :meth:`hypervisor.Hypervisor.prepare`
        :param run_path: where the mounts of other images are
        :raises DiskError: the disks are not what libvirt thinks, or have too many layers
        """
        self._guest = guest
        self._image = image
        self._sources: dict[str, str] = {}
        self.switched = False
        self.copied = 0
        self.layers = layers.Layers(
            image,
            guest.domain.UUIDString(),
            False,
            tuple(self._plan(disk, shared, run_path) for disk in guest.disks),
        )
        if len(self.layers.files) > MAX_LAYERS:
            raise exception.DiskError(
                f"its disks have {len(self.layers.files)} layers together, of which an image "
                f"takes {MAX_LAYERS}: release earlier images"
            )
        self._snapshot_xml = self._describe_snapshot()

    def _plan(
        self, disk: nodes.Disk, shared: Callable[[str], bool], run_path: str
    ) -> layers.DiskLayers:
        chain = disk.chain()
        if len(chain) != len(disk.indexes):
            raise exception.DiskError(
                f"its disk {disk.target} has {len(chain)} layers, of which libvirt knows "
                f"{len(disk.indexes)}"
            )
        if self._guest.domain.blockJobInfo(disk.target):
            raise exception.DiskError(f"libvirt is busy with a job on its disk {disk.target}")
        size = chain[0].size
        base = next((layer.path for layer in chain[1:] if shared(layer.path)), None)
        own = chain if base is None else [*_before(chain, base)]
        directory = layers.directory(disk.path, self._image)
        names = [f"{disk.target}-{number}" for number in range(len(own) + 1)]
        tip = os.path.join(directory, names[0])
        files = [layers.LayerFile(names[0], tip, qcow2.QCOW2, True, names[1])]
        for name, below, layer in zip(names[1:], [*names[2:], base], own, strict=True):
            # A clone's lower layers are files of the image that it came from.
            is_own = not layer.path.startswith(f"{run_path}/")
            path = os.path.join(directory, name) if is_own else layer.path
            if is_own:
                self._sources[path] = layer.path
            files.append(layers.LayerFile(name, path, layer.format, is_own, below))
        return layers.DiskLayers(disk.target, disk.path, size, base, tuple(files))

    def _describe_snapshot(self) -> str:
        root = etree.Element("domainsnapshot")
        described = etree.SubElement(root, "disks")
        forked = {disk.target: disk for disk in self._guest.disks}
        for element in libvirt_xml.parse(self._guest.xml).iterfind("devices/disk"):
            target = device_xml.disk_target(element)
            disk = etree.SubElement(described, "disk", name=target, snapshot="no")
            if target in forked:
                disk.set("snapshot", "external")
                etree.SubElement(disk, "driver", type=qcow2.QCOW2)
                etree.SubElement(disk, "source", file=forked[target].path)
        return etree.tostring(root, encoding="unicode")

    def prepare(self, store_path: str) -> None:
        """Have the layers kept, and the parent's next ones ready.

        :raises SnowFlockError: something failed; to be undone
        """
        if not self._guest.disks:
            return
        self.layers.save(store_path)
        self.layers.make_links(self._sources)
        for disk, disk_layers in zip(self._guest.disks, self.layers.disks, strict=True):
            frozen, following = disk.frozen_path(self._image), disk.next_path(self._image)
            os.link(disk.path, frozen)
            nodes.relocate(self._guest.qemu, self._guest.pid, disk, frozen)
            qcow2.create_overlay(following, os.path.basename(frozen), disk.format, disk_layers.size)
            original = os.stat(disk.path)
            os.chown(following, original.st_uid, original.st_gid)
            os.chmod(following, original.st_mode & 0o7777)
            nodes.sync(following)

    def switch(self) -> None:
        """Have the guest write to new layers, under the names that the old ones had. It may run.

        :raises OSError: a file is gone
        :raises libvirt.libvirtError: libvirt refuses
        """
        for disk in self._guest.disks:
            os.rename(disk.next_path(self._image), disk.path)
            nodes.sync(os.path.dirname(disk.path))
        # libvirt may also fail when QEMU has done it.
        self.switched = True
        self._guest.domain.snapshotCreateXML(self._snapshot_xml, _SNAPSHOT)

    def copy_tips(self) -> None:
        """Copy the new layers of the guest, which has stopped since: the image's tips.

        They have what the guest wrote between the two, so they are small.

        :raises DiskError: it failed
        """
        for disk, disk_layers in zip(self._guest.disks, self.layers.disks, strict=True):
            tip = disk_layers.files[0].path
            try:
                # QEMU has written all that it held back when the guest stopped.
                self.copied += sparse.copy(disk.path, tip)
            except OSError as error:
                raise exception.DiskError(
                    f"What was last written to its disk {disk.target} cannot be copied to {tip}: "
                    f"{error.strerror}"
                ) from error

    def record(self, store_path: str) -> None:
        """Note that the guest has switched for good."""
        dataclasses.replace(self.layers, captured=True).save(store_path)


def undo(image_layers: layers.Layers, domain: libvirt.virDomain | None) -> None:
    """Have the files of a parent that has not switched be as before it was prepared.

    One that has switched keeps its new layers; they are merged later.

    :param domain: the parent's, if it still exists
    :raises SnowFlockError: QEMU refuses
    """
    if domain is not None and domain.isActive():
        merge.repair(domain)
    for known in image_layers.disks:
        frozen = nodes.frozen_path(known.path, image_layers.image)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(nodes.next_path(known.path, image_layers.image))
        with contextlib.suppress(FileNotFoundError):
            if os.path.samefile(frozen, known.path):
                os.unlink(frozen)


def _before(chain: list[qcow2.Layer], base: str) -> list[qcow2.Layer]:
    return chain[: next(number for number, layer in enumerate(chain) if layer.path == base)]
