# SPDX-License-Identifier: Apache-2.0
"""The disks of a guest that is forked, frozen while it is suspended.

What it had asked of them by then, and has no answer to, its clones ask again (the kernel's
drivers/block/xen-blkfront.c, blkif_recover): it does not matter whether QEMU has done it.
"""

from collections.abc import Sequence

from nova_snowflock.virt.disks import files
from nova_snowflock.virt.disks import fork
from nova_snowflock.virt.xen import nodes


class DiskFork(fork.Fork[nodes.Blocks]):
    """Has QEMU open the new layers before the stop; the switch is one command then."""

    _overlays: Sequence[tuple[str, str]] = ()

    def prepare(self, store_path: str) -> None:
        super().prepare(store_path)
        self.rename()
        self._overlays = [self._blocks.add_overlay(disk) for disk in self._disks]

    def flush(self) -> None:
        """QEMU has what it lays a layer on be written. Little shall be left of that by then."""
        for disk in self._disks:
            files.sync(disk.frozen_path(self._image))

    def switch(self) -> None:
        """It must be suspended.

        :raises MonitorError: QEMU refuses; it writes to its old layers, or there is no QEMU
        """
        if self._overlays:
            # QEMU may also have done it when nobody hears of it.
            self.switched = True
            self._blocks.lay(self._overlays)
