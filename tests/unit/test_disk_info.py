# SPDX-License-Identifier: Apache-2.0
"""What Nova is told of disks is true, at whatever moment a fork or a merge ends."""

import functools
import json
import os
import pathlib
import threading

from lxml import etree
from nova.virt.libvirt import imagebackend
import pytest

from nova_snowflock import exception
from nova_snowflock.virt import disk_info

A = "0b8c2e2e-6e0f-4f66-8d0e-1c1f7a3a2f10"
B = "1b8c2e2e-6e0f-4f66-8d0e-1c1f7a3a2f11"
DOMAIN = """\
<domain>
  <devices>
    <disk type="file" device="disk"><source file="/i/disk"/><target dev="vda"/></disk>
    <disk type="file" device="disk"><source file="/i/disk.eph0"/><target dev="vdb"/></disk>
    <disk type="file" device="disk"><source file="/i/ro"/><target dev="vdc"/><readonly/></disk>
    <disk type="network" device="disk"><source name="pool/x"/><target dev="vdd"/></disk>
    <disk type="file" device="disk"><source file="/mnt/share/x"/><target dev="vde"/></disk>
    <disk type="file" device="cdrom"><source file="/i/disk.config"/><target dev="sda"/></disk>
    <disk type="file" device="cdrom"><target dev="sdb"/></disk>
  </devices>
</domain>
"""


class Server:
    """A server's directory, and what forks and merges do there, step by step."""

    def __init__(self, directory: pathlib.Path, kind: str) -> None:
        self.directory = directory
        self.disk = directory / "disk"
        self.config = directory / "disk.config"
        self.noted = {str(self.disk): kind, str(self.config): "raw"}
        (directory / "disk.info").write_text(json.dumps(self.noted))
        self.disk.write_text(kind)

    def layer(self, image: str) -> pathlib.Path:
        return self.directory / f"disk.{image}"

    def link(self, image: str) -> None:
        """The disk has the name of the layer that it is to be, too."""
        os.link(self.disk, self.layer(image))

    def switch(self) -> None:
        """A new layer has the disk's name."""
        following = self.directory / "next"
        following.write_text("qcow2")
        following.rename(self.disk)

    def give_name(self, image: str) -> None:
        """The layer that was merged into has the disk's name, too."""
        self.disk.unlink()
        os.link(self.layer(image), self.disk)

    def fork(self, image: str) -> None:
        with disk_info.forking(str(self.directory), image, [str(self.disk)]):
            self.link(image)
            self.switch()

    def settled(self) -> dict[str, str]:
        disk_info.settle(str(self.directory))
        return dict(json.loads((self.directory / "disk.info").read_text()))

    def check(self) -> None:
        """Each file holds its own format here."""
        noted = self.settled()
        assert noted[str(self.disk)] == self.disk.read_text()
        assert noted[str(self.config)] == "raw"


@pytest.fixture(params=["raw", "qcow2"])
def server(tmp_path: pathlib.Path, request: pytest.FixtureRequest) -> Server:
    return Server(tmp_path, request.param)


def test_step_by_step(server: Server) -> None:
    for image in (A, B):
        with disk_info.forking(str(server.directory), image, [str(server.disk)]):
            server.link(image)
            server.switch()
        server.check()
    assert server.settled()[str(server.layer(A))] == server.layer(A).read_text()
    server.give_name(B)
    server.check()
    server.layer(B).unlink()
    server.check()
    server.give_name(A)
    server.check()
    server.layer(A).unlink()
    assert server.settled() == server.noted


def test_merge_of_two_leaves_the_upper_one_to_be_removed(server: Server) -> None:
    server.fork(A)
    server.fork(B)
    server.layer(A).rename(server.disk)
    server.check()
    server.check()
    server.layer(B).unlink()
    assert server.settled() == server.noted


def test_capture_that_fails(server: Server) -> None:
    def fail() -> None:
        with disk_info.forking(str(server.directory), A, [str(server.disk)]):
            server.link(A)
            server.layer(A).unlink()
            raise ValueError("the capture failed")

    with pytest.raises(ValueError, match="capture"):
        fail()
    assert server.settled() == server.noted


@pytest.mark.parametrize("steps", range(3))
def test_capture_that_is_cut_short(server: Server, steps: int) -> None:
    pid = os.fork()
    if pid == 0:
        with disk_info.forking(str(server.directory), A, [str(server.disk)]):
            for step in (functools.partial(server.link, A), server.switch)[:steps]:
                step()
            os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    noted = json.loads((server.directory / "disk.info").read_text())
    assert noted[str(server.disk)] == "qcow2"
    server.check()


def test_format_that_nova_does_not_know(tmp_path: pathlib.Path) -> None:
    server = Server(tmp_path, "raw")
    (tmp_path / "disk.info").unlink()
    with (
        pytest.raises(exception.CannotFork, match="disk: reboot it hard"),
        disk_info.forking(str(tmp_path), A, [str(server.disk)]),
    ):
        pytest.fail("it is not to be captured")
    assert not (tmp_path / "disk.info").exists()


def test_server_that_is_gone(tmp_path: pathlib.Path) -> None:
    disk_info.settle(str(tmp_path / "gone"))
    assert not disk_info.has_layers(str(tmp_path / "gone"))


def test_nova_waits_for_a_capture(tmp_path: pathlib.Path) -> None:
    """It has the same lock, and what it notes of another disk meanwhile is not lost."""
    server = Server(tmp_path, "raw")
    other = str(tmp_path / "disk.eph0")
    image = imagebackend.Qcow2.__new__(imagebackend.Qcow2)
    image.path, image.driver_format = other, "qcow2"
    image.disk_info_path, image.lock_path = str(tmp_path / "disk.info"), str(tmp_path)
    nova = threading.Thread(target=image.resolve_driver_format)
    with disk_info.forking(str(tmp_path), A, [str(server.disk)]):
        nova.start()
        nova.join(0.2)
        assert nova.is_alive()
    nova.join()
    assert server.settled() == {**server.noted, other: "qcow2"}


def test_everyone_may_read_it(server: Server) -> None:
    server.fork(A)
    assert (server.directory / "disk.info").stat().st_mode & 0o777 == 0o644


def test_own_disks_are_the_writable_files_of_the_server() -> None:
    own = disk_info.own_disks(etree.fromstring(DOMAIN), "/i")
    assert list(own) == ["/i/disk", "/i/disk.eph0"]


@pytest.mark.parametrize(
    ("name", "is_layer"),
    [
        (f"disk.{A}", True),
        (f"disk.eph0.{A}", True),
        (f"disk.{A}.next", False),
        ("disk", False),
        ("disk.config", False),
        ("disk.info", False),
        ("disk.eph0", False),
    ],
)
def test_layers_are_told_from_disks(tmp_path: pathlib.Path, name: str, is_layer: bool) -> None:
    for file in (tmp_path / "disk", tmp_path / name):
        file.touch()
    assert disk_info.has_layers(str(tmp_path)) == is_layer


def test_layer_that_the_disk_was_merged_into_is_none(tmp_path: pathlib.Path) -> None:
    (tmp_path / "disk").touch()
    os.link(tmp_path / "disk", tmp_path / f"disk.{A}")
    assert not disk_info.has_layers(str(tmp_path))
