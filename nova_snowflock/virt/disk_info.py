# SPDX-License-Identifier: Apache-2.0
"""What a server's disks are to Nova: files whose formats are noted in ``disk.info`` beside them.

Nova never looks into a disk to find out its format: what a raw one holds is up to its guest, and
may look like a qcow2 file that names a file of the host. It goes by what was noted, by path, when
the disk was made. Forks and merges change what a path stands for. So before a fork, the format of
each disk is noted under the name that it will have as a frozen layer, ``<disk>.<image>``, too.
Which file has the disk's name can then be told by names and inodes alone, whatever was interrupted.
"""

from collections.abc import Iterable, Iterator
import contextlib
import functools
import itertools
import json
import os
import re

from lxml import etree
from nova import conf as nova_conf
from oslo_concurrency import lockutils

from nova_snowflock import exception

CONF = nova_conf.CONF

CONFIG_DRIVE = "disk.config"
QCOW2 = "qcow2"
LAYER = re.compile(r"(disk[^/]*)\.[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
"""Names of files that forks have made of a server's disks, beside them. Group 1 is the disk's."""

_NAME = "disk.info"


def image_cache() -> str:
    """Where Nova keeps the images that its servers' disks are based on."""
    path: str = os.path.join(CONF.instances_path, CONF.image_cache.subdirectory_name)
    return path


def own_disks(domain: etree._Element, directory: str) -> dict[str, etree._Element]:
    """The writable disks in a domain that are files of its server, by their paths.

    :param directory: the server's
    """
    found = {}
    for disk in domain.iterfind("devices/disk[@type='file'][@device='disk']"):
        source = disk.find("source")
        path = "" if source is None else str(source.get("file"))
        if disk.find("readonly") is None and os.path.dirname(path) == directory:
            found[path] = disk
    return found


def has_layers(directory: str) -> bool:
    """Whether a disk in a server's directory is, or was until a moment ago, a layer on others."""
    with contextlib.suppress(FileNotFoundError):
        paths = [os.path.join(directory, name) for name in os.listdir(directory)]
        return any(_is_apart(disk_of(path), path) for path in paths)
    return False


def disk_of(path: str) -> str:
    """Path of the disk that a layer is of; any other path as it is."""
    directory, name = os.path.split(path)
    layer = LAYER.fullmatch(name)
    return os.path.join(directory, layer[1]) if layer else path


@contextlib.contextmanager
def forking(directory: str, image: str, disks: Iterable[str]) -> Iterator[None]:
    """Have the formats be true after a capture, however it ends.

    :param directory: the server's
    :param image: UUID of the image to be
    :param disks: paths of all its disks that are captured
    :raises CannotFork: Nova has not noted the format of one
    """
    path = os.path.join(directory, _NAME)
    with lockutils.lock(path):  # Nova's own, for those that write the file
        formats = _settled(_read(path))
        for disk in disks:
            if disk not in formats:
                raise exception.CannotFork(
                    f"Nova has no note of the format of its disk {os.path.basename(disk)}: reboot "
                    "it hard, and fork it then"
                )
            formats[f"{disk}.{image}"] = formats[disk]
            # QEMU does not start from a raw file that it takes for a qcow2 one, but it does from a
            # qcow2 file that it takes for a raw one.
            formats[disk] = QCOW2
        _write(path, formats)
        try:
            yield
        finally:
            _write(path, _settled(formats))


def settle(directory: str) -> None:
    """Have the formats be true after layers were merged. Waits for a capture that is under way.

    :param directory: the server's, if it is there
    """
    path = os.path.join(directory, _NAME)
    with lockutils.lock(path):
        formats = _read(path)
        settled = _settled(formats)
        if settled != formats:
            _write(path, settled)


def _settled(formats: dict[str, str]) -> dict[str, str]:
    """Formats by path, of what the paths stand for now."""
    settled = {path: kind for path, kind in formats.items() if disk_of(path) == path}
    for disk in list(settled):
        # In the order of the forks. A merge takes in the uppermost, down to one of them, and gives
        # the disk's name to that. Files of the others may be left for a while.
        layers = [path for path in formats if path != disk == disk_of(path)]
        frozen = list(itertools.takewhile(functools.partial(_is_apart, disk), layers))
        settled |= {layer: formats[layer] for layer in frozen}
        if layers:
            settled[disk] = QCOW2 if frozen == layers else formats[layers[len(frozen)]]
    return settled


def _is_apart(disk: str, layer: str) -> bool:
    """Whether a layer has a file, and the disk's name stands for another."""
    try:
        return not os.path.samefile(layer, disk)
    except FileNotFoundError:
        return os.path.exists(layer)


def _read(path: str) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except FileNotFoundError:
        return {}


def _write(path: str, formats: dict[str, str]) -> None:
    with open(f"{path}.new", "w", encoding="utf-8", opener=_readable) as file:
        json.dump(formats, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)


def _readable(path: str, flags: int) -> int:
    return os.open(path, flags, 0o644)
