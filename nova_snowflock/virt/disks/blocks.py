# SPDX-License-Identifier: Apache-2.0
"""What changes the layers of a running guest's disks: the QEMU that has them open.

QEMU opens a file again by its name whenever a layer begins or ceases to be written
(block/file-posix.c, raw_reconfigure_getfd): when a snapshot is laid on it, and when one is merged
into it. Whatever has the name then is taken for a file that was renamed meanwhile, and nobody
notices before the data is gone. So QEMU is told of a new name, by :meth:`Blocks.relocate`, while
both names are true.
"""

import abc
from collections.abc import Sequence
import enum
import os

import libvirt

from nova_snowflock import exception
from nova_snowflock.virt.disks import files
from nova_snowflock.virt.disks import qcow2


class Job(enum.Enum):
    """How far a merge or a copy is."""

    WORKING = enum.auto()
    READY = enum.auto()
    """To be ended by :meth:`Blocks.end_merge`; the two layers have the same content until then."""


class Blocks(abc.ABC):
    """Made of a guest that may run or not; all else asks QEMU.

    Whatever that refuses is raised as SnowFlockError or libvirtError.
    """

    def __init__(self, domain: libvirt.virDomain) -> None:
        self.domain = domain

    @property
    @abc.abstractmethod
    def pid(self) -> int:
        """QEMU's."""

    @abc.abstractmethod
    def examine(self, disk: files.Disk, chain: Sequence[qcow2.Layer]) -> None:
        """Check that a disk can be forked now.

        :param chain: its files as they name each other
        :raises DiskError: QEMU has other files, or works on them
        """

    @abc.abstractmethod
    def file_in_use(self, disk: files.Disk) -> str:
        """The name that QEMU knows the disk's topmost file by."""

    @abc.abstractmethod
    def relocate(self, disk: files.Disk, path: str) -> None:
        """Have QEMU know the disk's topmost file by another of its names. The guest may run.

        The file must have the old name, too, until this is done. What it had half done when it was
        interrupted is completed by the next call.

        :raises DiskError: that is not the name of the file that QEMU has open
        """

    @abc.abstractmethod
    def begin_merge(self, disk: files.Disk, chain: Sequence[qcow2.Layer], depth: int) -> None:
        """Begin to write what a disk has above the layer at ``depth`` into that."""

    @abc.abstractmethod
    def end_merge(self, disk: files.Disk) -> None:
        """Have the guest write to the layer that its others were merged into."""

    @abc.abstractmethod
    def begin_copy(self, disk: files.Disk, chain: Sequence[qcow2.Layer], depth: int | None) -> None:
        """Begin to copy what is above the layer at ``depth`` into the topmost; None is of all."""

    @abc.abstractmethod
    def job(self, disk: files.Disk) -> Job | None:
        """How far what was begun is; None if there is nothing: it has failed, or a copy ended."""

    @abc.abstractmethod
    def cancel(self, disk: files.Disk) -> None:
        """Give up what was begun. It may have just ended, or be past that."""

    def repair(self, disk: files.Disk) -> None:
        """Have what QEMU writes to be what the disk's name stands for, whatever was interrupted.

        :raises DiskError: it cannot be made so
        """
        path = self.file_in_use(disk)
        if path == disk.path:
            self.relocate(disk, path)
            return
        if not disk.is_layer(path):
            raise exception.DiskError(f"QEMU uses {path} for {disk.target}, libvirt {disk.path}")
        if not os.path.exists(path):
            files.give_name(disk.path, path)
        self.check_written(disk, path)
        files.give_name(path, disk.path)
        self.relocate(disk, disk.path)
        if path not in disk.known_as:
            os.unlink(path)

    def check_written(self, disk: files.Disk, path: str) -> None:
        """:raises DiskError: QEMU does not write to the file of that name"""
        if not files.is_written(self.pid, path):
            raise exception.DiskError(f"QEMU has another file than {path} open for {disk.target}")
