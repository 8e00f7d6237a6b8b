# SPDX-License-Identifier: Apache-2.0
"""An image's disk layers: its tips, hard links to frozen files, and the record of all of them.

Frozen layers stay where the parent has them, and the parent may be deleted at any time. A second
name keeps them: ``<directory of the disk>/../_snowflock/<image>/<target>-<number>``. Number 0 is
the tip, a copy, with what the guest wrote while it was being forked. The record is persistent, as
the files are: whoever finds it after a reboot can remove them.
"""

import base64
from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
from typing import Any

from nova_snowflock import descriptor
from nova_snowflock import exception
from nova_snowflock.virt.disks import qcow2

_SUFFIX = ".disks"
_DIRECTORY = "_snowflock"


@dataclasses.dataclass(frozen=True)
class LayerFile:
    """A file of the image.

    :param name: what memtap shall present it as
    :param path: where this host reads it
    :param format: its format
    :param own: ``path`` is the image's own name for it, not a file of another image's mount
    :param backing: what its header shall name as its backing file; None if it has none
    """

    name: str
    path: str
    format: str
    own: bool
    backing: str | None


@dataclasses.dataclass(frozen=True)
class DiskLayers:
    """The layers of one disk, the topmost first.

    :param path: what the parent had under the disk's name when it was forked
    :param size: bytes that the guest sees
    :param base: path of the file below them that every host has, or None
    """

    target: str
    path: str
    size: int
    base: str | None
    files: tuple[LayerFile, ...]


@dataclasses.dataclass(frozen=True)
class Layers:
    """All layers of an image.

    :param domain: UUID of the parent's domain
    :param captured: whether the parent has gone on to layers above these
    """

    image: str
    domain: str
    captured: bool
    disks: tuple[DiskLayers, ...]

    @property
    def files(self) -> list[LayerFile]:
        """All files, in the order of their numbers."""
        return [file for disk in self.disks for file in disk.files]

    def described(self) -> tuple[descriptor.Disk, ...]:
        """The disks as a descriptor has them."""
        disks = []
        number = descriptor.FIRST_LAYER
        for disk in self.disks:
            top = disk.files[0]
            disks.append(descriptor.Disk(disk.target, number, top.format, disk.size, disk.base))
            number += len(disk.files)
        return tuple(disks)

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[list[dict[str, Any]], list[int]]]:
        """The files and their descriptors, as the memory server's command ``publish`` takes them.

        :raises DiskError: one is missing or not what it was
        """
        entries, fds = [], []
        with contextlib.ExitStack() as stack:
            for number, file in enumerate(self.files, descriptor.FIRST_LAYER):
                entry: dict[str, Any] = {"number": number, "name": file.name, "kind": "file"}
                header = qcow2.read_layer(file.path, file.format).header
                if header is not None and file.backing not in (None, header.backing):
                    data = base64.b64encode(header.naming(str(file.backing))).decode()
                    entry["patch"] = {"offset": 0, "data": data}
                entries.append(entry)
                fds.append(os.open(file.path, os.O_RDONLY | os.O_CLOEXEC))
                stack.callback(os.close, fds[-1])
            yield entries, fds

    def save(self, store_path: str) -> None:
        """Have :func:`find` find it."""
        os.makedirs(store_path, mode=0o700, exist_ok=True)
        path = _path(store_path, self.image)
        with open(f"{path}.new", "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(f"{path}.new", path)

    def make_links(self, sources: dict[str, str]) -> None:
        """Make the image's links.

        :param sources: what each is to, by its own path
        :raises DiskError: the file system has none, or they cannot be made
        """
        for link, source in sources.items():
            try:
                os.makedirs(os.path.dirname(link), mode=0o700, exist_ok=True)
                os.link(source, link)
            except OSError as error:
                raise exception.DiskError(
                    f"The disk's file {source} cannot be kept as {link}: {error.strerror}"
                ) from error

    def remove(self, store_path: str) -> None:
        """Remove the image's files and the record."""
        for file in self.files:
            if file.own:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.path)
        for directory in {os.path.dirname(file.path) for file in self.files if file.own}:
            # Other images have theirs beside it.
            for empty in (directory, os.path.dirname(directory)):
                with contextlib.suppress(OSError):
                    os.rmdir(empty)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(_path(store_path, self.image))


def directory(disk_path: str, image: str) -> str:
    """Where an image's own files of a disk are: on the same file system."""
    return os.path.join(os.path.dirname(os.path.dirname(disk_path)), _DIRECTORY, image)


def find(store_path: str, image: str) -> Layers | None:
    """The layers that this host has of an image.

    :raises DiskError: their record is damaged
    """
    path = _path(store_path, image)
    try:
        with open(path, encoding="utf-8") as file:
            record = json.load(file)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise exception.DiskError(f"The record {path} is damaged: {error}") from error
    disks = tuple(
        DiskLayers(**{**disk, "files": tuple(LayerFile(**file) for file in disk["files"])})
        for disk in record["disks"]
    )
    return Layers(**{**record, "disks": disks})


def images(store_path: str) -> list[str]:
    """The images whose layers this host has."""
    if not os.path.isdir(store_path):
        return []
    names = sorted(os.listdir(store_path))
    return [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]


def all_files(store_path: str) -> list[LayerFile]:
    """The files that images on this host serve."""
    found = [find(store_path, image) for image in images(store_path)]
    return [file for layers in found if layers is not None for file in layers.files]


def _path(store_path: str, image: str) -> str:
    return os.path.join(store_path, image + _SUFFIX)
