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

PVH = "xenpvh"
HVM = "xenfv"
"""The machine types of guests that are forked."""
HVM_TYPE = "hvm"
"""libvirt's os type of the latter."""

# What a guest's description may have, each once.
_PARTS = {
    *("clock", "cpu", "cputune", "currentMemory", "description", "devices", "features", "genid"),
    *("memory", "metadata", "name", "on_crash", "on_poweroff", "on_reboot", "os", "resource"),
    *("title", "uuid", "vcpu"),
}
_PLAIN = ("currentMemory", "memory", "name", "uuid", "vcpu")
# Devices whose whole state is in the guest's memory, and made anew by libxl for a clone.
_DEVICES = {"console", "disk", "emulator", "input", "interface", "memballoon"}
# Likewise, or in the state of an HVM guest's device model.
_EMULATED = {*_DEVICES, "controller", "graphics", "serial", "video"}
# Of which a guest sees no more than its MAC.
_INTERFACE_TYPES = ("bridge", "ethernet", "network")
_INTERFACES = {
    PVH: interface_xml.Kinds(_INTERFACE_TYPES, models=("netfront",)),
    # A kernel with drivers for Xen has the emulated ones plugged out.
    HVM: interface_xml.Kinds(
        _INTERFACE_TYPES, models=("netfront", "e1000", "ne2k_pci", "pcnet", "rtl8139")
    ),
}
_REASONS = {
    "controller": "it has a controller, whose state is in a device model",
    "filesystem": "it has a file system shared with the host",
    "graphics": "it has a frame buffer, whose state is in a device model",
    "hostdev": "it has a host device (PCI or USB)",
}
_VIDEO = ("cirrus", "vga")
_MAX_VIDEO = 16 << 10
"""KiB of video memory. All of it is there before a clone starts."""
_MAX_DEVICES = 256
_TARGETS = {PVH: re.compile(r"xvd[a-z]{1,2}"), HVM: re.compile(r"xvd[a-z]{1,2}|hd[a-d]|sd[a-z]")}
_BUSES = {"hd": "ide", "sd": "scsi"}
"""By what targets begin with; of others it is Xen's own."""


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
    kind = machine(root)
    if kind not in (PVH, HVM):
        return (
            "it is not a PVH or HVM guest: Xen does not log what those write that have no "
            "hardware virtualization (PV)"
        )
    devices = root.findall("devices/*")
    if len(devices) > _MAX_DEVICES:
        return f"it has {len(devices)} devices"
    for device in devices:
        # Of grants and event channels, which are Xen's.
        if device.tag == "controller" and device.get("type") == "xenbus":
            continue
        if device.tag not in (_EMULATED if kind == HVM else _DEVICES):
            return _REASONS.get(str(device.tag), f"it has a device <{device.tag}>")
        reason = _device_refusal(device, kind)
        if reason is not None:
            return reason
    return None


def _device_refusal(device: etree._Element, kind: str) -> str | None:
    match device.tag:
        case "disk":
            return _disk_refusal(device, kind)
        case "interface":
            return _INTERFACES[kind].refusal(device)
        case "video":
            return _video_refusal(device)
        case "controller" if device.get("type") not in _BUSES.values():
            return f"it has a controller of type {device.get('type')}"
        case "input" if device.get("bus") == "usb":
            # A clone's QEMU runs before the clone has its memory.
            return "it has an input device on a USB, whose controller reads the guest's memory"
        case "graphics" if device.get("type") != "vnc":
            return f"it has graphics of type {device.get('type')}, not vnc"
        case "console" | "serial" if device.get("type") != "pty":
            # Anything else is a file or a socket of its host.
            return f"it has a {device.tag} of type {device.get('type')}, not pty"
    return None


def _video_refusal(video: etree._Element) -> str | None:
    model = video.find("model")
    if model is None or model.get("type") not in _VIDEO:
        return "it has a video device that is not cirrus or vga"
    memory = model.get("vram", "0")
    if not re.fullmatch("[0-9]{1,6}", memory) or int(memory) > _MAX_VIDEO:
        return f"it has {memory} KiB of video memory, more than {_MAX_VIDEO}"
    return None


def _disk_refusal(disk: etree._Element, kind: str) -> str | None:
    target = disk_xml.target(disk)
    if not _TARGETS[kind].fullmatch(target):
        return f"its disk {target} is not one of Xen's (xvda)"
    reason = disk_xml.refusal(disk)
    if reason is not None:
        return reason
    if disk_xml.is_forked(disk):
        is_layered = disk.find("driver[@type='qcow2']") is not None
        return None if is_layered else f"its disk {target} is not a qcow2 file"
    if kind == HVM and disk.get("device", "disk") == "disk":
        # QEMU 7.2 opens it for Xen to be written to, which fails, and then takes no state.
        return f"its disk {target} is read only, and a clone's QEMU does not start with it"
    return None


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
    for console in (*root.iterfind("devices/console"), *root.iterfind("devices/serial")):
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
    :param own_domain: the clone's own domain, whose kernel, metadata, processors of the host,
        network interfaces, graphics, device model and read-only disks it has
    :param disks: paths of its own layers, by target device
    :raises InvalidDomain: one of them is not understood
    :raises SpawnFailed: a disk or network interface has nothing to be replaced by, or the clone's
        own domain is another kind of guest
    """
    root = parse(xml)
    for tag, text in (("name", name), ("uuid", str(uuid.UUID(identity)))):
        element = root.find(tag)
        assert element is not None
        element.text = text
    own = None if own_domain is None else libvirt_xml.parse(own_domain)
    if own is not None:
        if machine(own) != machine(root):
            raise exception.SpawnFailed(
                f"The clone's own domain is of the machine type {machine(own)}, its parent's of "
                f"{machine(root)}"
            )
        # What a clone boots when it is started anew, and where it runs, is no other host's to say.
        for tag in ("os", "metadata", "title", "description", "cputune"):
            libvirt_xml.replace(root, own, tag)
        vcpu, own_vcpu = root.find("vcpu"), own.find("vcpu")
        assert vcpu is not None
        placed = etree.Element("vcpu") if own_vcpu is None else own_vcpu
        libvirt_xml.take_attributes(vcpu, placed, ("cpuset", "placement"))
    _replace_disks(root, own, disks or {})
    _replace_interfaces(root, own)
    _replace_graphics(root, own)
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
            bus = _BUSES.get(target[:2], "xen")
            etree.SubElement(replacement, "target", dev=target, bus=bus)
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
    for interface, own_interface in _INTERFACES[machine(root)].pairs(root, own):
        parent = interface.getparent()
        assert parent is not None
        replacement = copy.deepcopy(own_interface)
        # Which the machine has is the parent's to say: what comes after it has its place by that.
        for model in replacement.findall("model"):
            replacement.remove(model)
        replacement.extend(copy.deepcopy(interface.findall("model")))
        parent.replace(interface, replacement)


def _replace_graphics(root: etree._Element, own: etree._Element | None) -> None:
    """Have the clone's device model, and what shows its screen, be its own host's."""
    devices = root.find("devices")
    if devices is None:
        return
    shown = devices.find("graphics") is not None
    for device in (*devices.findall("emulator"), *devices.findall("graphics")):
        devices.remove(device)
    if own is not None:
        devices.extend(copy.deepcopy(own.findall("devices/emulator")))
        for graphics in own.findall("devices/graphics") if shown else ():
            reason = _device_refusal(graphics, machine(root))
            if reason is not None:
                raise exception.SpawnFailed(f"The clone cannot be started: {reason}")
            devices.append(copy.deepcopy(graphics))
    elif shown:
        etree.SubElement(devices, "graphics", type="vnc", autoport="yes")


def _text(root: etree._Element) -> str:
    return str(etree.tostring(root, encoding="unicode"))
