# SPDX-License-Identifier: Apache-2.0
"""A clone's disks: layers of its own on those of its image."""

from collections.abc import Collection, Iterator
import contextlib
import os

from nova_snowflock import descriptor as image_descriptor
from nova_snowflock import exception
from nova_snowflock.virt import hypervisor
from nova_snowflock.virt import stages
from nova_snowflock.virt.disks import qcow2


def check_disks(descriptor: image_descriptor.Descriptor, bases: Collection[str]) -> None:
    """
    :param bases: what the clone's disks may be based on
    :raises SpawnFailed: the clone's disks cannot be made on this host
    """
    for disk in descriptor.disks:
        if disk.base is None:
            continue
        if disk.base not in bases:
            raise exception.SpawnFailed(
                f"The disk {disk.target} of the image {descriptor.image} is based on {disk.base}, "
                "which is not the base of this clone's disks"
            )
        if not os.path.isfile(disk.base):
            raise exception.SpawnFailed(
                f"This host lacks {disk.base}, which the disk {disk.target} of the image "
                f"{descriptor.image} is based on"
            )


def _check_chain(disk: image_descriptor.Disk, path: str, mount: str) -> None:
    """
    :param path: the clone's own layer of the disk
    :param mount: where memtap presents the others
    :raises SpawnFailed: they name files of this host that are none of the clone's business
    """
    found = [name for name, _ in qcow2.walk(path, qcow2.QCOW2)][1:]
    if disk.base is not None and found[-1:] == [disk.base]:
        found.pop()
    for name in found:
        if os.path.dirname(name) != mount:
            raise exception.SpawnFailed(
                f"The image's layers of the disk {disk.target} are based on {name}, which is not "
                "what its descriptor says"
            )


@contextlib.contextmanager
def own_layers(
    descriptor: image_descriptor.Descriptor,
    identity: hypervisor.Identity,
    mount: str,
    owner: tuple[int, int],
) -> Iterator[None]:
    """Make the clone's own layers of its disks; remove them if something fails.

    :param mount: where memtap presents the others
    :param owner: user and group of theirs
    :raises SpawnFailed: they cannot be made, or the image's are not what its descriptor says
    """
    with contextlib.ExitStack() as undo:
        with stages.raised_as(exception.SpawnFailed):
            for disk in descriptor.disks:
                path = identity.disks[disk.target]
                top = os.path.join(mount, descriptor.file(disk.file).name)
                qcow2.create_overlay(path, top, disk.format, disk.size)
                undo.callback(os.unlink, path)
                os.chown(path, *owner)
                _check_chain(disk, path, mount)
        yield
        undo.pop_all()
