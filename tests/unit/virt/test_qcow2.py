# SPDX-License-Identifier: Apache-2.0
"""Headers of real qcow2 files, and of hostile ones."""

import json
import os
import pathlib
import struct
import subprocess

import pytest

from nova_snowflock import exception
from nova_snowflock.virt.disks import qcow2


@pytest.fixture
def base(tmp_path: pathlib.Path) -> pathlib.Path:
    path = tmp_path / "base"
    path.write_bytes(b"base" * 1024)
    return path


def make(path: pathlib.Path, *options: str, size: str = "1M") -> bytes:
    qcow2.qemu_img("create", "-q", "-f", "qcow2", *options, str(path), size)
    return path.read_bytes()


def seen_by_qemu(path: pathlib.Path) -> str:
    return subprocess.run(
        ["qemu-img", "info", "--output=json", path], check=True, capture_output=True, text=True
    ).stdout


@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_header(tmp_path: pathlib.Path, base: pathlib.Path, compat: str) -> None:
    path = tmp_path / "disk"
    header = qcow2.parse(make(path, "-o", f"compat={compat}", "-b", str(base), "-F", "raw"))
    assert (header.size, header.backing, header.backing_format) == (1 << 20, str(base), "raw")
    assert len(header.data) == 65536


def test_header_without_backing_file(tmp_path: pathlib.Path) -> None:
    header = qcow2.parse(make(tmp_path / "disk", "-o", "cluster_size=4096"))
    assert (header.backing, header.backing_format, len(header.data)) == (None, None, 4096)


@pytest.mark.parametrize("name", ["vda-1", "b", "x" * 1023])
@pytest.mark.parametrize("compat", ["0.10", "1.1"])
def test_another_name(tmp_path: pathlib.Path, base: pathlib.Path, compat: str, name: str) -> None:
    path = tmp_path / "disk"
    options = ("-o", f"compat={compat}", "-b", "base", "-F", "raw")
    data = make(path, *options)
    start = qcow2.parse(data).naming(name)
    changed = start + data[len(start) :]
    assert len(changed) == len(data)
    header = qcow2.parse(changed)
    assert (header.size, header.backing, header.backing_format) == (1 << 20, name, "raw")
    path.write_bytes(changed)
    assert f'"backing-filename": "{name}"' in seen_by_qemu(path)


def test_no_room_for_a_name(tmp_path: pathlib.Path, base: pathlib.Path) -> None:
    data = make(tmp_path / "disk", "-o", "cluster_size=512", "-b", "base", "-F", "raw")
    with pytest.raises(exception.DiskError, match="no room"):
        qcow2.parse(data).naming("x" * 500)


def test_chain(tmp_path: pathlib.Path, base: pathlib.Path) -> None:
    make(tmp_path / "middle", "-b", str(base), "-F", "raw")
    make(tmp_path / "top", "-b", "middle", "-F", "qcow2", size="2M")
    layers = qcow2.chain(str(tmp_path / "top"), "qcow2")
    assert [(os.path.basename(layer.path), layer.format, layer.size) for layer in layers] == [
        ("top", "qcow2", 2 << 20),
        ("middle", "qcow2", 1 << 20),
        ("base", "raw", 4096),
    ]


def test_what_a_raw_disk_holds_is_no_header(tmp_path: pathlib.Path, base: pathlib.Path) -> None:
    """A guest may write anything to its disk."""
    make(tmp_path / "disk", "-b", str(base), "-F", "raw")
    (layer,) = qcow2.chain(str(tmp_path / "disk"), "raw")
    assert layer.header is None


def test_chain_in_a_circle(tmp_path: pathlib.Path) -> None:
    make(tmp_path / "disk", "-u", "-b", "disk", "-F", "qcow2")
    with pytest.raises(exception.DiskError, match="more than"):
        qcow2.chain(str(tmp_path / "disk"), "qcow2")


@pytest.mark.parametrize("name", ["nbd:localhost:1", "json:{}", "ssh://h/f", "rbd:pool/volume"])
def test_backing_file_elsewhere(tmp_path: pathlib.Path, name: str) -> None:
    make(tmp_path / "disk", "-u", "-b", name, "-F", "raw")
    with pytest.raises(exception.DiskError, match="no plain file"):
        qcow2.chain(str(tmp_path / "disk"), "qcow2")


def test_backing_file_of_unknown_format(tmp_path: pathlib.Path) -> None:
    make(tmp_path / "disk", "-u", "-b", "base", "-F", "vmdk")
    with pytest.raises(exception.DiskError, match="the format vmdk"):
        qcow2.chain(str(tmp_path / "disk"), "qcow2")


def test_missing_file(tmp_path: pathlib.Path) -> None:
    make(tmp_path / "disk", "-u", "-b", "base", "-F", "raw")
    with pytest.raises(exception.DiskError, match="No such file"):
        qcow2.chain(str(tmp_path / "disk"), "qcow2")


def altered(data: bytes, offset: int, form: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(form, changed, offset, value)
    return bytes(changed)


@pytest.mark.parametrize(
    ("offset", "form", "value", "reason"),
    [
        (0, ">I", 0, "not a qcow2 file"),
        (4, ">I", 4, "version 4"),
        (8, ">Q", 1 << 40, "no proper name"),
        (16, ">I", 0, "no proper name"),
        (16, ">I", 1 << 31, "no proper name"),
        (20, ">I", 40, "version"),
        (32, ">I", 1, "encrypted"),
        (72, ">Q", 2, "corrupt"),
        (72, ">Q", 4, "another file"),
    ],
)
def test_hostile_header(
    tmp_path: pathlib.Path, base: pathlib.Path, offset: int, form: str, value: int, reason: str
) -> None:
    data = make(tmp_path / "disk", "-b", str(base), "-F", "raw")
    with pytest.raises(exception.DiskError, match=reason):
        qcow2.parse(altered(data, offset, form, value))


@pytest.mark.parametrize("size", [0, 3, 48, 71, 103])
def test_truncated_header(tmp_path: pathlib.Path, size: int) -> None:
    with pytest.raises(exception.DiskError):
        qcow2.parse(make(tmp_path / "disk")[:size])


@pytest.mark.parametrize("size", [1, 512, 3 << 20, 512 << 20, (512 << 20) + 1, 20 << 40])
@pytest.mark.parametrize("backing_format", ["raw", "qcow2"])
def test_overlay(tmp_path: pathlib.Path, size: int, backing_format: str) -> None:
    path = tmp_path / "disk"
    name = "/nowhere/" + "x" * 200
    qcow2.create_overlay(str(path), name, backing_format, size)
    header = qcow2.parse(path.read_bytes())
    assert (header.backing, header.backing_format) == (name, backing_format)
    information = json.loads(seen_by_qemu(path))
    assert information["virtual-size"] == header.size == -(-size // 512) * 512
    assert information["full-backing-filename"] == name
    assert information["backing-filename-format"] == backing_format
    assert path.stat().st_mode & 0o777 == 0o600
    assert "No errors were found" in check(path)


def test_overlay_reads_and_writes(tmp_path: pathlib.Path, base: pathlib.Path) -> None:
    path = tmp_path / "disk"
    qcow2.create_overlay(str(path), "base", "raw", 8 << 20)
    io = ["qemu-io", "-f", "qcow2"]
    commands = ("write -P 7 1M 3M", "read -P 7 1M 3M", "read -P 0 4M 4M", "read -P 0 64k 64k")
    for command in commands:
        done = subprocess.run(
            [*io, "-c", command, path], check=True, capture_output=True, text=True
        )
        assert "failed" not in done.stdout
    subprocess.run(["qemu-img", "convert", "-O", "raw", path, tmp_path / "raw"], check=True)
    assert (tmp_path / "raw").read_bytes()[:4096] == base.read_bytes()
    assert "No errors were found" in check(path)


def check(path: pathlib.Path) -> str:
    """What qemu-img says of the file's own structures."""
    # Its backing file need not be there.
    image = json.dumps({"driver": "qcow2", "file.filename": str(path), "backing": None})
    return subprocess.run(
        ["qemu-img", "check", f"json:{image}"], check=True, capture_output=True, text=True
    ).stdout


def test_overlay_replaces_nothing(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "disk"
    path.write_text("something")
    with pytest.raises(exception.DiskError, match="File exists"):
        qcow2.create_overlay(str(path), "/nowhere/vda-0", "raw", 3 << 20)
    assert path.read_text() == "something"


def test_overlay_that_fails_leaves_nothing(tmp_path: pathlib.Path) -> None:
    with pytest.raises(exception.DiskError, match="too long"):
        qcow2.create_overlay(str(tmp_path / "disk"), "x" * 1024, "raw", 1 << 20)
    with pytest.raises(exception.DiskError, match="No such file"):
        qcow2.create_overlay(str(tmp_path / "nowhere/disk"), "x", "raw", 1 << 20)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("size", "room"), [(32 << 20, 90 << 20), (64 << 30, 1 << 30)])
def test_room(tmp_path: pathlib.Path, size: int, room: int) -> None:
    path = tmp_path / "disk"
    qcow2.qemu_img("create", "-q", "-f", "qcow2", str(path), str(size))
    data = path.read_bytes()
    qcow2.make_room(str(path), size)
    made = path.stat()
    assert made.st_size >= len(data) + room
    assert made.st_blocks * 512 < len(data) + (64 << 10)
    with path.open("rb") as file:
        assert file.read(len(data)) == data
    qcow2.make_room(str(path), size)
    assert path.stat().st_size == made.st_size
    subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", path], check=True)


def test_room_is_made_again_when_it_is_used_up(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "disk"
    qcow2.qemu_img("create", "-q", "-f", "qcow2", str(path), str(64 << 30))
    qcow2.make_room(str(path), 64 << 30)
    before = path.stat().st_size
    with path.open("rb+") as file:
        file.seek(before - (1 << 20))
        file.write(b"data")
    qcow2.make_room(str(path), 64 << 30)
    assert path.stat().st_size == before + (1 << 30)


def test_no_room(tmp_path: pathlib.Path) -> None:
    with pytest.raises(exception.DiskError, match="cannot be made longer"):
        qcow2.make_room(str(tmp_path), 1 << 20)
