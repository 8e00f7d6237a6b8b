# SPDX-License-Identifier: Apache-2.0
"""A Xen domain's XML: whether it can be forked, and what a clone's is."""

from collections.abc import Mapping
import copy
import re
import uuid

from lxml import etree

from nova_snowflock import exception
from nova_snowflock.virt import interface_xml
from nova_snowflock.virt import libvirt_xml
from nova_snowflock.virt.disks import disk_xml
from nova_snowflock.virt.disks import qcow2

MACHINE = "xenpvh"

# What a guest's description may have, each once.
_PARTS = {
    *("clock", "cpu", "currentMemory", "description", "devices", "features", "genid", "memory"),
    *("metadata", "name", "on_crash", "on_poweroff", "on_reboot", "os", "resource", "title"),
    *("uuid", "vcpu"),
}
_PLAIN = ("currentMemory", "memory", "name", "uuid", "vcpu")
# Devices whose whole state is in the guest's memory, and made anew by libxl for a clone.
_DEVICES = {"console", "disk", "emulator", "input", "interface", "memballoon"}
# Of which a guest sees no more than its MAC.
_INTERFACES = interface_xml.Kinds(("bridge", "ethernet", "network"), models=("netfront",))
_REASONS = {
    "controller": "it has a controller, whose state is in a device model",
    "filesystem": "it has a file system shared with the host",
    "graphics": "it has a frame buffer, whose state is in a device model",
    "hostdev": "it has a host device (PCI or USB)",
}
_MAX_DEVICES = 256
_TARGET = re.compile(r"xvd[a-z]{1,2}")


def parse(xml: str) -> etree._Element:
    """The root of a domain's XML, of which everything is understood.

    :raises InvalidDomain: it is not
    """
    root = libvirt_xml.parse(xml)
    for part in root:
        if part.tag not in _PARTS or len(root.findall(part.tag)) > 1:
            raise exception.InvalidDomain(f"The domain's <{part.tag}> is not understood")
    for name in _PLAIN:
        if not root.findtext(name):
            raise exception.InvalidDomain(f"The domain has no <{name}>")
    return root


def refusal(root: etree._Element) -> str | None:
    """Why a guest cannot be forked or be a clone, or None."""
    if root.get("type") != "xen":
        return f"it is a domain of {root.get('type')}, not of Xen"
    if machine(root) != MACHINE:
        return (
            "it is not a PVH guest: those with a device model (HVM) or without hardware "
            "virtualization (PV) are not forked on Xen yet"
        )
    devices = root.findall("devices/*")
    if len(devices) > _MAX_DEVICES:
        return f"it has {len(devices)} devices"
    for device in devices:
        # Of grants and event channels, which are Xen's.
        if device.tag == "controller" and device.get("type") == "xenbus":
            continue
        if device.tag not in _DEVICES:
            return _REASONS.get(str(device.tag), f"it has a device <{device.tag}>")
        reason = _disk_refusal(device) if device.tag == "disk" else None
        if device.tag == "interface":
            reason = _INTERFACES.refusal(device)
        if reason is not None:
            return reason
    return None


def _disk_refusal(disk: etree._Element) -> str | None:
    target = disk_xml.target(disk)
    if not _TARGET.fullmatch(target):
        return f"its disk {target} is not one of Xen's (xvda)"
    reason = disk_xml.refusal(disk)
    if reason is None and disk_xml.is_forked(disk) and disk.find("driver[@type='qcow2']") is None:
        return f"its disk {target} is not a qcow2 file"
    return reason


def machine(root: etree._Element) -> str:
    """The machine type."""
    kind = root.find("os/type")
    return "" if kind is None else str(kind.get("machine", kind.text))


def vcpus(root: etree._Element) -> int:
    """How many virtual processors the guest has.

    :raises InvalidDomain: that is no number
    """
    text = root.findtext("vcpu", default="")
    if not text.isdecimal() or not 0 < int(text) <= 8192:
        raise exception.InvalidDomain(f"The domain has {text!r} processors")
    return int(text)


def for_clones(root: etree._Element) -> str:
    """The XML of a parent, as clones derive from it: without what is its own or its host's."""
    root = copy.deepcopy(root)
    root.attrib.pop("id", "")
    for console in root.iterfind("devices/console"):
        for name in ("tty", "id"):
            console.attrib.pop(name, "")
        for part in console.findall("source"):
            console.remove(part)
    for alias in root.findall(".//alias"):
        parent = alias.getparent()
        assert parent is not None
        parent.remove(alias)
    return _text(root)


def clone(
    xml: str,
    name: str,
    identity: str,
    own_domain: str | None = None,
    disks: Mapping[str, str] | None = None,
) -> str:
    """The XML of a clone.

    :param xml: from :func:`for_clones`
    :param identity: its UUID
    :param own_domain: the clone's own domain, whose kernel, metadata, network interfaces and
        read-only disks it has
    :param disks: paths of its own layers, by target device
    :raises InvalidDomain: one of them is not understood
    :raises SpawnFailed: a disk or network interface has nothing to be replaced by
    """
    root = parse(xml)
    for tag, text in (("name", name), ("uuid", str(uuid.UUID(identity)))):
        element = root.find(tag)
        assert element is not None
        element.text = text
    own = None if own_domain is None else libvirt_xml.parse(own_domain)
    if own is not None:
        # What a clone boots when it is started anew is no other host's to say.
        for tag in ("os", "metadata", "title", "description"):
            for theirs in root.findall(tag):
                root.remove(theirs)
            root.extend(copy.deepcopy(own.findall(tag)))
    _replace_disks(root, own, disks or {})
    _replace_interfaces(root, own)
    return _text(root)


def _replace_disks(
    root: etree._Element, own: etree._Element | None, disks: Mapping[str, str]
) -> None:
    own_disks = {
        disk_xml.target(disk): disk
        for disk in ([] if own is None else own.iterfind("devices/disk"))
    }
    for disk in root.findall("devices/disk"):
        target = disk_xml.target(disk)
        own_disk = own_disks.pop(target, None)
        if own_disk is None and (own is not None or not disk_xml.is_forked(disk)):
            raise exception.SpawnFailed(
                f"The clone's own domain has no disk {target}, which its parent has"
            )
        if disk_xml.is_forked(disk):
            if target not in disks:
                raise exception.SpawnFailed(f"No file is named for the clone's disk {target}")
            replacement = etree.Element("disk", type="file", device="disk")
            etree.SubElement(replacement, "driver", name="qemu", type=qcow2.QCOW2)
            etree.SubElement(replacement, "source", file=disks[target])
            etree.SubElement(replacement, "target", dev=target, bus="xen")
        else:
            assert own_disk is not None
            replacement = copy.deepcopy(own_disk)
        parent = disk.getparent()
        assert parent is not None
        parent.replace(disk, replacement)
    for target in own_disks:
        raise exception.SpawnFailed(
            f"The clone's own domain has a disk {target}, which its parent has not"
        )


def _replace_interfaces(root: etree._Element, own: etree._Element | None) -> None:
    for interface, own_interface in _INTERFACES.pairs(root, own):
        parent = interface.getparent()
        assert parent is not None
        parent.replace(interface, copy.deepcopy(own_interface))


def _text(root: etree._Element) -> str:
    return str(etree.tostring(root, encoding="unicode"))
