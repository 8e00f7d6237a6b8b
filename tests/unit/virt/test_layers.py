# SPDX-License-Identifier: Apache-2.0
"""The record of an image's layers, and what it does with files."""

import os
import pathlib

import pytest

from nova_snowflock import exception
from nova_snowflock.virt.disks import layers
from nova_snowflock.virt.disks import qcow2
from nova_snowflock.virt.qemu import sparse

IMAGE = "6f0c4e9e-3a39-4c0b-9a4e-1f6f2d2f7d10"


@pytest.fixture
def image(tmp_path: pathlib.Path) -> layers.Layers:
    instance = tmp_path / "instances" / "parent"
    instance.mkdir(parents=True)
    qcow2.qemu_img("create", "-q", "-f", "raw", str(instance / "lower"), "1M")
    top = str(instance / "disk")
    qcow2.create_overlay(top, "lower", "raw", 1 << 20)
    directory = layers.directory(top, IMAGE)
    files = (
        layers.LayerFile("vda-0", f"{directory}/vda-0", "qcow2", True, "vda-1"),
        layers.LayerFile("vda-1", f"{directory}/vda-1", "raw", True, None),
    )
    found = layers.Layers(
        IMAGE, "domain", False, (layers.DiskLayers("vda", top, 1 << 20, None, files),)
    )
    found.save(str(tmp_path / "store"))
    found.make_links({files[1].path: str(instance / "lower")})
    sparse.copy(top, files[0].path)
    return found


def test_record_is_found(tmp_path: pathlib.Path, image: layers.Layers) -> None:
    store = str(tmp_path / "store")
    assert layers.find(store, IMAGE) == image
    assert layers.images(store) == [IMAGE]
    assert layers.all_files(store) == image.files


def test_nothing_is_found(tmp_path: pathlib.Path) -> None:
    assert layers.find(str(tmp_path), IMAGE) is None
    assert layers.images(str(tmp_path / "nowhere")) == []


def test_layers_outlive_the_parent(tmp_path: pathlib.Path, image: layers.Layers) -> None:
    for path in (tmp_path / "instances" / "parent").iterdir():
        path.unlink()
    with image.opened() as (entries, fds):
        assert [entry["name"] for entry in entries] == ["vda-0", "vda-1"]
        assert [entry["number"] for entry in entries] == [2, 3]
        assert os.fstat(fds[1]).st_size == 1 << 20
        # The name in its header is that of a file beside it, not the parent's.
        assert "patch" in entries[0]
        assert "patch" not in entries[1]


def test_described(image: layers.Layers) -> None:
    (disk,) = image.described()
    assert (disk.target, disk.file, disk.format, disk.size, disk.base) == (
        *("vda", 2, "qcow2"),
        *(1 << 20, None),
    )


def test_removed(tmp_path: pathlib.Path, image: layers.Layers) -> None:
    for _ in range(2):
        image.remove(str(tmp_path / "store"))
        assert list((tmp_path / "store").iterdir()) == []
        assert list((tmp_path / "instances").iterdir()) == [tmp_path / "instances" / "parent"]


def test_links_of_another_file_system(tmp_path: pathlib.Path, image: layers.Layers) -> None:
    with pytest.raises(exception.DiskError, match="cannot be kept"):
        image.make_links({f"/dev/shm/{tmp_path.name}/vda-0": str(tmp_path / "store")})
    os.rmdir(f"/dev/shm/{tmp_path.name}")
