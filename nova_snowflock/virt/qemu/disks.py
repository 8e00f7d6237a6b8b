# SPDX-License-Identifier: Apache-2.0
"""The disks of a guest that is forked, frozen by libvirt's snapshots."""

from collections.abc import Callable

import libvirt
from lxml import etree

from nova_snowflock import exception
from nova_snowflock.virt import libvirt_xml
from nova_snowflock.virt.disks import disk_xml
from nova_snowflock.virt.disks import fork
from nova_snowflock.virt.disks import qcow2
from nova_snowflock.virt.qemu import guest as qemu_guest
from nova_snowflock.virt.qemu import nodes
from nova_snowflock.virt.qemu import sparse

_SNAPSHOT = (
    libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_DISK_ONLY
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_REUSE_EXT
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_NO_METADATA
    | libvirt.VIR_DOMAIN_SNAPSHOT_CREATE_ATOMIC
)


class DiskFork(fork.Fork[nodes.Blocks]):
    """As a snapshot takes libvirt long, the guest switches before it is stopped.

    What it writes between the two is in the image's tips, copies of its new layers that
    :meth:`copy_tips` makes while it is stopped. ``copied`` is the bytes in these.
    """

    tips = 1

    def __init__(
        self, guest: qemu_guest.Guest, image: str, shared: Callable[[str], bool], run_path: str
    ) -> None:
        self._guest = guest
        super().__init__(nodes.Blocks(guest.domain), guest.disks, image, shared, run_path)
        self.copied = 0
        self._snapshot_xml = self._describe_snapshot()

    def _describe_snapshot(self) -> str:
        root = etree.Element("domainsnapshot")
        described = etree.SubElement(root, "disks")
        forked = {disk.target: disk for disk in self._guest.disks}
        for element in libvirt_xml.parse(self._guest.xml).iterfind("devices/disk"):
            target = disk_xml.target(element)
            disk = etree.SubElement(described, "disk", name=target, snapshot="no")
            if target in forked:
                disk.set("snapshot", "external")
                etree.SubElement(disk, "driver", type=qcow2.QCOW2)
                etree.SubElement(disk, "source", file=forked[target].path)
        return etree.tostring(root, encoding="unicode")

    def switch(self) -> None:
        """It may run.

        :raises OSError: a file is gone
        :raises libvirt.libvirtError: libvirt refuses
        """
        self.rename()
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
