# SPDX-License-Identifier: Apache-2.0
"""Layers of a disk that QEMU has opened as it does for libxl: real QEMU, without Xen or a guest."""

from collections.abc import Callable, Iterator
import contextlib
import os
import pathlib
import subprocess
import time
from typing import cast
from unittest import mock

import libvirt
import pytest

from nova_snowflock import exception
from nova_snowflock.virt import domain_lock
from nova_snowflock.virt.disks import fork
from nova_snowflock.virt.disks import layers
from nova_snowflock.virt.disks import merge
from nova_snowflock.virt.disks import qcow2
from nova_snowflock.virt.xen import disks
from nova_snowflock.virt.xen import nodes
from nova_snowflock.virt.xen import qmp

MIB = 1 << 20
# What qemu-io says does not go to the monitor.
QEMU = ("stdbuf", "-oL", "qemu-system-x86_64", "-S", "-nodefaults", "-display", "none", "-m", "16")
UUID = "11111111-1111-4111-8111-111111111111"
IMAGES = [f"{number}aaaaaaa-1111-4111-8111-111111111111" for number in range(3)]


class Guest:
    """A guest with a disk on a base image, and the QEMU that serves it."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.run_path = directory / "run"
        self.store_path = str(directory / "store")
        self.base = str(directory / "base")
        self.path = str(directory / "instance/disk")
        for path in (self.run_path, directory / "instance"):
            path.mkdir()
        qcow2.qemu_img("create", "-q", "-f", "raw", self.base, str(64 * MIB))
        qcow2.create_overlay(self.path, self.base, "raw", 64 * MIB)
        self.monitor = qmp.Monitor(7, str(self.run_path))
        self.domain = mock.create_autospec(libvirt.virDomain, instance=True)
        self.domain.UUIDString.return_value = UUID
        self.domain.isPersistent.return_value = 0
        self.domain.state.return_value = [libvirt.VIR_DOMAIN_RUNNING, 0]
        self.domain.XMLDesc.return_value = f"""<domain><devices><disk type='file' device='disk'>
            <driver name='qemu' type='qcow2'/><source file='{self.path}'/>
            <target dev='xvda' bus='xen'/></disk></devices></domain>"""
        self._said = directory / "said"
        self._qemu: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        path = self.run_path / "qmp-libxenstat-7"
        command = [
            *QEMU,
            *("-qmp", f"unix:{path},server=on,wait=off"),
            "-blockdev",
            "driver=qcow2,node-name=xvda-qcow2,discard=unmap,file.driver=file,"
            f"file.filename={self.path},file.locking=off",
            *("-device", "ide-hd,id=xvda,drive=xvda-qcow2"),
        ]
        with open(self._said, "wb") as said:
            self._qemu = subprocess.Popen(command, stdout=said)
        while True:
            assert self._qemu.poll() is None
            with contextlib.suppress(exception.MonitorError):
                assert self.monitor.pid() == self._qemu.pid
                break
            time.sleep(0.02)
        self.domain.isActive.return_value = 1

    def end(self) -> None:
        if self._qemu is not None:
            self._qemu.terminate()
            self._qemu.wait()
            self._qemu = None
            (self.run_path / "qmp-libxenstat-7").unlink(missing_ok=True)
        self.domain.isActive.return_value = 0

    @property
    def blocks(self) -> nodes.Blocks:
        return nodes.Blocks(cast(libvirt.virDomain, self.domain), self.monitor)

    def io(self, command: str) -> str:
        arguments = {"command-line": f'qemu-io -d xvda "{command}"'}
        before = len(self._said.read_text())
        self.monitor.command("human-monitor-command", arguments)
        return self._said.read_text()[before:]

    def write(self, megabyte: int, pattern: int) -> None:
        assert "wrote 1048576" in self.io(f"write -P {pattern} {megabyte}M 1M")
        self.io("flush")

    def has(self, *patterns: int) -> bool:
        """Whether each of the first megabytes has its pattern: to the guest."""
        said = [self.io(f"read -P {pattern} {at}M 1M") for at, pattern in enumerate(patterns)]
        assert all("read 1048576" in one for one in said)
        return not any("failed" in one for one in said)

    def files(self) -> list[str]:
        return sorted(os.listdir(os.path.dirname(self.path)))

    def nodes(self) -> set[str]:
        """Files that QEMU has open."""
        known = self.monitor.command("query-named-block-nodes")
        return {node["file"] for node in known if node["drv"] == "file"}

    def fork(self, image: str) -> disks.DiskFork:
        return disks.DiskFork(
            self.blocks,
            merge.disks_of(self.domain),
            image,
            lambda path: path == self.base,
            str(self.run_path),
        )

    def forked(self, image: str) -> layers.Layers:
        made = self.fork(image)
        made.prepare(self.store_path)
        made.flush()
        made.switch()
        made.record(self.store_path)
        return made.layers

    def collapse(self, served: Callable[[str], bool] = lambda _: False) -> bool:
        with domain_lock.held(self.store_path, UUID) as lock:
            return merge.collapse(self.blocks, lock, served, None)


@pytest.fixture
def guest(tmp_path: pathlib.Path) -> Iterator[Guest]:
    made = Guest(tmp_path)
    made.start()
    try:
        yield made
    finally:
        made.end()


def has(path: str, *patterns: int) -> bool:
    """Whether each of the first megabytes of a qcow2 file has its pattern."""
    reads = [f"-cread -P {pattern} {at}M 1M" for at, pattern in enumerate(patterns)]
    command = ["qemu-io", "-U", "-r", "-f", "qcow2", *reads, path]
    said = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    assert said.count("read 1048576") == len(patterns), said
    return "failed" not in said


def test_fork(guest: Guest) -> None:
    """What it wrote before is in the image, what it writes afterwards is not."""
    guest.write(0, 1)
    image = guest.forked(IMAGES[0])
    guest.write(0, 2)
    guest.write(1, 3)
    [disk] = image.disks
    assert [(file.name, file.backing) for file in disk.files] == [("xvda-0", guest.base)]
    assert disk.base == guest.base
    frozen = disk.files[0].path
    assert has(frozen, 1, 0)
    assert has(guest.path, 2, 3)
    assert guest.has(2, 3)
    assert guest.files() == ["disk", f"disk.{IMAGES[0]}"]
    [found] = merge.disks_of(guest.domain)
    assert [layer.path for layer in found.chain()] == [
        guest.path,
        f"{guest.path}.{IMAGES[0]}",
        guest.base,
    ]


@pytest.mark.parametrize("running", [True, False])
def test_collapse(guest: Guest, running: bool) -> None:
    """The layers of images that are not served any more are merged, the others stay."""
    for number, image in enumerate(IMAGES):
        guest.write(number, 1 + number)
        guest.forked(image)
    guest.write(3, 4)
    if not running:
        guest.end()
    served = f"{guest.path}.{IMAGES[0]}"
    assert guest.collapse(lambda path: path == served)
    assert guest.files() == ["disk", f"disk.{IMAGES[0]}"]
    assert guest.collapse()
    assert guest.files() == ["disk"]
    if running:
        assert guest.nodes() == {guest.path, guest.base}
        assert guest.domain.suspend.call_count == guest.domain.resume.call_count == 2
    else:
        guest.start()
    assert guest.has(1, 2, 3, 4)
    guest.write(0, 9)
    # It is the file of that name which QEMU writes to.
    assert has(guest.path, 9, 2, 3, 4)


def test_fork_of_one_that_was_started_with_layers(guest: Guest) -> None:
    guest.write(0, 1)
    guest.forked(IMAGES[0])
    guest.end()
    guest.start()
    guest.write(1, 2)
    image = guest.forked(IMAGES[1])
    assert [file.name for file in image.disks[0].files] == ["xvda-0", "xvda-1"]
    guest.write(0, 3)
    assert guest.collapse()
    assert guest.has(3, 2)
    assert guest.files() == ["disk"]


def prepare_in_vain(guest: Guest) -> None:
    guest.fork(IMAGES[1]).prepare(guest.store_path)


def switch_in_vain(guest: Guest) -> None:
    made = guest.fork(IMAGES[1])
    made.prepare(guest.store_path)
    made._overlays = [(node, "nowhere") for node, _ in made._overlays]
    with pytest.raises(exception.MonitorError):
        made.switch()


@pytest.mark.parametrize("attempt", [prepare_in_vain, switch_in_vain])
def test_fork_that_comes_to_nothing(guest: Guest, attempt: Callable[[Guest], None]) -> None:
    guest.write(0, 1)
    guest.forked(IMAGES[0])
    before, opened = guest.files(), guest.nodes()
    attempt(guest)
    guest.write(1, 2)
    left = layers.find(guest.store_path, IMAGES[1])
    assert left is not None
    fork.undo(left, guest.blocks)
    left.remove(guest.store_path)
    assert (guest.files(), guest.nodes()) == (before, opened)
    guest.write(2, 3)
    assert guest.has(1, 2, 3)
    assert has(guest.path, 1, 2, 3)


def test_localize(guest: Guest, tmp_path: pathlib.Path) -> None:
    """A clone's disk does not need memtap's files any more."""
    guest.write(0, 1)
    guest.end()
    mount = guest.run_path / IMAGES[0] / "mount"
    mount.mkdir(parents=True)
    presented = str(mount / "xvda-0")
    os.rename(guest.path, presented)
    qcow2.create_overlay(guest.path, presented, "qcow2", 64 * MIB)
    guest.start()
    assert merge.depends(guest.domain, str(mount))
    with domain_lock.held(guest.store_path, UUID) as lock:
        assert merge.localize(guest.blocks, lock, str(guest.run_path), None)
    assert not merge.depends(guest.domain, str(mount))
    assert guest.nodes() == {guest.path, guest.base}
    os.unlink(presented)
    assert guest.has(1)


def test_it_has_another_file_open(guest: Guest) -> None:
    os.rename(guest.path, f"{guest.path}.moved")
    qcow2.create_overlay(guest.path, guest.base, "raw", 64 * MIB)
    with pytest.raises(exception.DiskError, match="another file"):
        guest.forked(IMAGES[0])


def test_no_monitor(guest: Guest) -> None:
    guest.end()
    with pytest.raises(exception.MonitorError, match="qmp-libxenstat-7"):
        guest.blocks.examine(merge.disks_of(guest.domain)[0], [])
