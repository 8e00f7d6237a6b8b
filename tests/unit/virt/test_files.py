# SPDX-License-Identifier: Apache-2.0
"""A guest's disks by its XML, and the files that forks make beside them."""

import os
import pathlib

from lxml import etree
import pytest

from nova_snowflock import exception
from nova_snowflock.virt.disks import files
from nova_snowflock.virt.disks import qcow2

IMAGE = "6f0c4e9e-3a39-4c0b-9a4e-1f6f2d2f7d10"
CHAIN = frozenset({"/i/1/disk", "/i/_base/b"})
EPHEMERAL = frozenset({"/i/1/disk.eph0"})
LIVE = """\
<domain><devices>
  <disk type='file' device='disk'>
    <driver name='qemu' type='qcow2' cache='none' io='native' discard='unmap'/>
    <source file='/i/1/disk' index='7'/>
    <backingStore type='file' index='2'><format type='qcow2'/><source file='/i/1/disk'/>
      <backingStore type='file' index='3'><format type='raw'/><source file='/i/_base/b'/>
        <backingStore/></backingStore></backingStore>
    <target dev='vda' bus='virtio'/>
  </disk>
  <disk type='file' device='disk'>
    <driver name='qemu' type='raw'/><source file='/i/1/disk.eph0' index='1'/><backingStore/>
    <target dev='vdb' bus='virtio'/>
  </disk>
  <disk type='file' device='cdrom'><source file='/i/1/disk.config' index='9'/>
    <target dev='sda' bus='sata'/><readonly/></disk>
</devices></domain>
"""


def test_writable_disks() -> None:
    assert files.writable(etree.fromstring(LIVE)) == [
        files.Disk("vda", "/i/1/disk", CHAIN, "qcow2", (7, 2, 3), "native", "unmap"),
        files.Disk("vdb", "/i/1/disk.eph0", EPHEMERAL, "raw", (1,), None, None),
    ]


def test_disk_that_was_merged_into_a_layer_libvirt_has_started_from(tmp_path: pathlib.Path) -> None:
    path = str(tmp_path / "disk.eph0")
    layer = f"{path}.{IMAGE}"
    root = etree.fromstring(LIVE.replace("/i/1/disk.eph0", layer))
    # So far it is but a name that somebody gave a disk.
    assert files.writable(root)[1].path == layer
    pathlib.Path(path).touch()
    disk = files.writable(root)[1]
    assert (disk.path, disk.known_as) == (path, frozenset({layer}))


def test_disk_that_cannot_be_forked() -> None:
    root = etree.fromstring(LIVE.replace("type='file' device='disk'", "type='block'", 1))
    with pytest.raises(exception.CannotFork, match="vda is a volume of type block"):
        files.writable(root)


def test_files_beside_a_disk(tmp_path: pathlib.Path) -> None:
    disk = files.Disk("vda", str(tmp_path / "disk"), frozenset(), "qcow2", (), None, None)
    made = {f"disk.{IMAGE}", f"disk.{IMAGE}.next", "disk.next"}
    others = {"disk", "disk.info", "disk.eph0", f"disk.eph0.{IMAGE}", f"disk.{IMAGE}.x", "disk.1"}
    for name in made | others:
        (tmp_path / name).touch()
    assert {os.path.basename(path) for path in disk.leftovers()} == made
    assert disk.is_layer(disk.frozen_path(IMAGE))
    assert not disk.is_layer(disk.next_path(IMAGE))


def test_second_name(tmp_path: pathlib.Path) -> None:
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    pathlib.Path(first).write_text("first")
    pathlib.Path(second).write_text("second")
    (tmp_path / "second.next").touch()  # of one that was killed
    for _ in range(2):
        files.give_name(first, second)
        assert os.path.samefile(first, second)
        assert sorted(os.listdir(tmp_path)) == ["first", "second"]


def test_snapshot_of_a_volume_is_no_frozen_layer(tmp_path: pathlib.Path) -> None:
    """Cinder's NFS drivers name it as frozen layers are, but it is above, not below."""
    volume = str(tmp_path / "volume-1")
    snapshot = files.frozen_path(volume, IMAGE)
    qcow2.create_overlay(volume, "base", "raw", 1 << 20)
    qcow2.create_overlay(snapshot, os.path.basename(volume), "qcow2", 1 << 20)
    assert files.disk_path(snapshot) == snapshot
    assert not files.Disk("vdc", snapshot, frozenset(), "qcow2", (), None, None).is_layer(volume)
    # What a fork has frozen is below what took its name.
    os.rename(volume, f"{volume}.old")
    os.rename(snapshot, volume)
    os.rename(f"{volume}.old", snapshot)
    qcow2_header = tmp_path / "disk"
    qcow2.create_overlay(str(qcow2_header), os.path.basename(snapshot), "qcow2", 1 << 20)
    os.rename(qcow2_header, volume)
    assert files.disk_path(snapshot) == volume
