# SPDX-License-Identifier: Apache-2.0
"""Disks in a domain's XML: which can be forked."""

from lxml import etree

_DISK_REASONS = {
    "shareable": "is shared with other guests",
    "transient": "is transient",
    "encryption": "is encrypted",
    "source/encryption": "is encrypted",
    "source/slices": "is a slice of a file",
    "source/reservations": "has reservations",
    "driver/metadata_cache": "has a metadata cache of a size of its own",
}


def target(disk: etree._Element) -> str:
    """The target device of a disk, such as ``vda``."""
    target = disk.find("target")
    return str(target.get("dev")) if target is not None else ""


def is_forked(disk: etree._Element) -> bool:
    """Whether clones have a layer of their own of a disk that can be forked.

    Others, read-only, are brought by the clone: its own domain names its own file.
    """
    return disk.get("device", "disk") == "disk" and disk.find("readonly") is None


def refusal(disk: etree._Element) -> str | None:
    """Why a guest with this disk cannot be forked, or None."""
    name = f"its disk {target(disk)}"
    source, driver = disk.find("source"), disk.find("driver")
    device = disk.get("device", "disk")
    if device not in ("disk", "cdrom"):
        return f"{name} is a {device}"
    if disk.get("type") != "file":
        where = source.get("protocol") if source is not None else None
        return f"{name} is a volume of type {where or disk.get('type')}, not a file"
    if not is_forked(disk):
        return None
    if source is None or driver is None or not source.get("file"):
        return f"{name} has no file"
    if driver.get("name") != "qemu":
        return f"{name} is not served by QEMU (<driver name='qemu'/>)"
    if driver.get("type") not in ("qcow2", "raw"):
        return f"{name} is of the format {driver.get('type')}, not qcow2 or raw"
    if driver.get("copy_on_read") == "on":
        return f"{name} copies what is read from its backing file"
    for path, reason in _DISK_REASONS.items():
        if disk.find(path) is not None:
            return f"{name} {reason}"
    for layer in disk.iter("backingStore"):
        if layer.get("type", "file") != "file":
            return f"{name} is based on a {layer.get('type')}, not a file"
    return None
