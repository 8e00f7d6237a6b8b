# SPDX-License-Identifier: Apache-2.0
"""A fork's part in the disks of its parent: freezing what there is, and going on above it."""

import abc
from collections.abc import Callable, Sequence
import contextlib
import dataclasses
import os
from typing import Generic, TypeVar

from nova_snowflock import descriptor
from nova_snowflock import exception
from nova_snowflock.virt.disks import blocks as disk_blocks
from nova_snowflock.virt.disks import files
from nova_snowflock.virt.disks import layers
from nova_snowflock.virt.disks import merge
from nova_snowflock.virt.disks import qcow2

# As many descriptors as a message to the memory server carries (unix(7), SCM_RIGHTS, and its own
# limit) and files a descriptor has, less those of the memory.
MAX_LAYERS = descriptor.MAX_FILES - descriptor.FIRST_LAYER


_Blocks = TypeVar("_Blocks", bound=disk_blocks.Blocks)


class Fork(abc.ABC, Generic[_Blocks]):
    """The disks of a guest that is about to be forked.

    Made, prepared and renamed while it runs; :func:`undo` at any time. ``switched`` is whether it
    may write to new layers. Before a file of the guest's, :attr:`tips` more are in each disk.
    """

    tips = 0
    """Layers that are yet to be made of each disk."""

    def __init__(
        self,
        blocks: _Blocks,
        disks: Sequence[files.Disk],
        image: str,
        shared: Callable[[str], bool],
        run_path: str,
    ) -> None:
        """
        :param shared: as of :meth:`hypervisor.Hypervisor.prepare`
        :param run_path: where the mounts of other images are
        :raises DiskError: the disks are not what libvirt thinks, or have too many layers
        """
        self._blocks = blocks
        self._disks = disks
        self._image = image
        self._sources: dict[str, str] = {}
        self.switched = False
        self.layers = layers.Layers(
            image,
            blocks.domain.UUIDString(),
            False,
            tuple(self._plan(disk, shared, run_path) for disk in disks),
        )
        if len(self.layers.files) > MAX_LAYERS:
            raise exception.DiskError(
                f"its disks have {len(self.layers.files)} layers together, of which an image "
                f"takes {MAX_LAYERS}: release earlier images"
            )

    def _plan(
        self, disk: files.Disk, shared: Callable[[str], bool], run_path: str
    ) -> layers.DiskLayers:
        chain = disk.chain()
        self._blocks.examine(disk, chain)
        base = next((layer.path for layer in chain[1:] if shared(layer.path)), None)
        own = chain if base is None else [*_before(chain, base)]
        directory = layers.directory(disk.path, self._image)
        names = [f"{disk.target}-{number}" for number in range(self.tips + len(own))]
        backings = [*names[1:], base]
        planned = []
        for name, below in zip(names[: self.tips], backings, strict=False):
            path = os.path.join(directory, name)
            planned.append(layers.LayerFile(name, path, qcow2.QCOW2, True, below))
        for name, below, layer in zip(names[self.tips :], backings[self.tips :], own, strict=True):
            # A clone's lower layers are files of the image that it came from.
            is_own = not layer.path.startswith(f"{run_path}/")
            path = os.path.join(directory, name) if is_own else layer.path
            if is_own:
                self._sources[path] = layer.path
            planned.append(layers.LayerFile(name, path, layer.format, is_own, below))
        return layers.DiskLayers(disk.target, disk.path, chain[0].size, base, tuple(planned))

    def prepare(self, store_path: str) -> None:
        """Have the layers kept, and the parent's next ones ready.

        :raises SnowFlockError: something failed; to be undone
        """
        if not self._disks:
            return
        self.layers.save(store_path)
        self.layers.make_links(self._sources)
        for disk, disk_layers in zip(self._disks, self.layers.disks, strict=True):
            frozen, following = disk.frozen_path(self._image), disk.next_path(self._image)
            os.link(disk.path, frozen)
            self._blocks.relocate(disk, frozen)
            qcow2.create_overlay(following, os.path.basename(frozen), disk.format, disk_layers.size)
            original = os.stat(disk.path)
            os.chown(following, original.st_uid, original.st_gid)
            os.chmod(following, original.st_mode & 0o7777)
            files.sync(following)

    def rename(self) -> None:
        """Give the new layers the names that the old ones had. The guest writes to those yet.

        :raises OSError: a file is gone
        """
        for disk in self._disks:
            os.rename(disk.next_path(self._image), disk.path)
            files.sync(os.path.dirname(disk.path))

    @abc.abstractmethod
    def switch(self) -> None:
        """Have the guest write to new layers, under the names that the old ones had."""

    def record(self, store_path: str) -> None:
        """Note that the guest has switched for good."""
        dataclasses.replace(self.layers, captured=True).save(store_path)


def undo(image_layers: layers.Layers, blocks: disk_blocks.Blocks | None) -> None:
    """Have the files of a parent that has not switched be as before it was prepared.

    One that has switched keeps its new layers; they are merged later.

    :param blocks: the parent's, if that still exists
    :raises SnowFlockError: QEMU refuses
    """
    if blocks is not None and blocks.domain.isActive():
        merge.repair(blocks)
    for known in image_layers.disks:
        frozen = files.frozen_path(known.path, image_layers.image)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(files.next_path(known.path, image_layers.image))
        with contextlib.suppress(FileNotFoundError):
            if os.path.samefile(frozen, known.path):
                os.unlink(frozen)


def _before(chain: list[qcow2.Layer], base: str) -> list[qcow2.Layer]:
    return chain[: next(number for number, layer in enumerate(chain) if layer.path == base)]
