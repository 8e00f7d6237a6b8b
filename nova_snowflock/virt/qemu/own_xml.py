# SPDX-License-Identifier: Apache-2.0
"""What a clone takes from its own domain, as its cloud describes it, into its parent's machine.

The guest believes in a machine: models, addresses, MACs, numbers of queues. Those are its parent's.
Where that machine's devices lead on the host, and what it may consume, is the clone's own: the host
of a parent has no say in what another host opens.
"""

from collections.abc import Mapping
import copy

from lxml import etree

from nova_snowflock import exception
from nova_snowflock.virt import libvirt_xml
from nova_snowflock.virt.disks import disk_xml
from nova_snowflock.virt.qemu import device_xml
from nova_snowflock.virt.qemu import own_limits

# Limits, placement, what clouds note for themselves, and what libvirt does when a guest ends.
_WHOLE = (
    "title",
    "description",
    "metadata",
    "blkiotune",
    "cputune",
    "memtune",
    "numatune",
    "perf",
    "resource",
    "on_poweroff",
    "on_reboot",
    "on_crash",
)
# Files that it boots from, what goes with them, and what it is told of its host.
_BOOT = ("loader", "kernel", "initrd", "cmdline", "dtb", "acpi", "smbios")
_PLACEMENT = ("cpuset", "placement")
_DISK_DRIVER = (
    "cache",
    "detect_zeroes",
    "discard",
    "error_policy",
    "io",
    "rerror_policy",
)
# What the guest sees of a disk; all else is its host's.
_DISK_GUEST = {
    *("address", "alias", "blockio", "boot", "driver", "geometry", "product", "readonly"),
    *("serial", "target", "vendor", "wwn"),
}
_DISK_HOST = ("auth", "encryption", "iotune", "source", "transient")
_INTERFACE_GUEST = {"acpi", "address", "alias", "boot", "driver", "mac", "model", "mtu", "rom"}
_VIDEO_GUEST = {"address", "alias", "driver", "model"}
# Also its MAC: what the guest believes of that comes with its state, until it is reset.
_INTERFACE_HOST = (
    "mac",
    "backend",
    "bandwidth",
    "coalesce",
    "downscript",
    "filterref",
    "ip",
    "link",
    "port",
    "route",
    "script",
    "source",
    "target",
    "tune",
    "virtualport",
    "vlan",
)
_USUAL_MTU = "1500"


def merge(
    root: etree._Element,
    own: etree._Element | None,
    disks: Mapping[str, str],
    *,
    replaced: bool = False,
) -> None:
    """Have a clone's XML name what is the clone's own.

    :param root: its XML, derived from the parent's; changed in place
    :param own: the root of its own domain, if its cloud has one
    :param disks: paths of its own layers, by target device
    :param replaced: its own interfaces will be plugged in: its parent's lead nowhere
    :raises SpawnFailed: something of the parent's has no counterpart
    """
    if own is not None:
        _merge_domain(root, own)
        _merge_devices(root, own)
        _merge_character_devices(root, own)
    _merge_disks(root, own, disks)
    if replaced:
        _disconnect_interfaces(root)
    else:
        _merge_interfaces(root, own)
    if own is not None:
        own_limits.check(root, own, disks.values())


def _merge_domain(root: etree._Element, own: etree._Element) -> None:
    for tag in _WHOLE:
        libvirt_xml.replace(root, own, tag)
    vcpu, own_vcpu = root.find("vcpu"), own.find("vcpu")
    if vcpu is not None and own_vcpu is not None:
        libvirt_xml.take_attributes(vcpu, own_vcpu, _PLACEMENT)
    genid, own_genid = root.find("genid"), own.find("genid")
    if genid is not None and own_genid is not None and own_genid.text:
        genid.text = own_genid.text
    for element, own_element in device_xml.pairs(root, own, "os"):
        libvirt_xml.take_attributes(element, own_element, ("firmware",))
        for tag in _BOOT:
            libvirt_xml.replace(element, own_element, tag)
    for element, own_element in device_xml.pairs(root, own, "features"):
        libvirt_xml.replace(element, own_element, "tcg")
    for iothread in root.iterfind("iothreadids/iothread"):
        number = str(iothread.get("id"))
        iothread.clear()
        iothread.set("id", number)
    # Where memory is, is not its own domain's matter: it is memtap's file.
    locked = copy.deepcopy(own.find("memoryBacking/locked"))
    for element in root.findall("memoryBacking"):
        root.remove(element)
    if locked is not None:
        etree.SubElement(root, "memoryBacking").append(locked)


def _merge_devices(root: etree._Element, own: etree._Element) -> None:
    """Those that are the same to the guest, whatever their host makes of them."""
    for devices, own_devices in device_xml.pairs(root, own, "devices"):
        libvirt_xml.replace(devices, own_devices, "graphics")
    for audio in root.findall("devices/audio"):
        silent = etree.Element("audio", id=str(audio.get("id")), type="none")
        parent = audio.getparent()
        assert parent is not None
        parent.replace(audio, silent)
    for rng, own_rng in device_xml.pairs(root, own, "devices/rng"):
        libvirt_xml.replace(rng, own_rng, "backend")
        libvirt_xml.replace(rng, own_rng, "rate")
    for watchdog, own_watchdog in device_xml.pairs(root, own, "devices/watchdog"):
        watchdog.set("action", str(own_watchdog.get("action", "none")))
    for video in root.iterfind("devices/video"):
        _keep(video, _VIDEO_GUEST)
    for model, own_model in device_xml.pairs(root, own, "devices/video/model"):
        libvirt_xml.replace(model, own_model, "acceleration")
        libvirt_xml.take_attributes(model, own_model, ("blob",))


def _merge_character_devices(root: etree._Element, own: etree._Element) -> None:
    """What is at their other end, and where it is written to, is the host's."""
    for devices in root.iterfind("devices"):
        for console in devices.findall("console/target[@type='serial']/.."):
            # The first serial device by another name, which libvirt gives it by itself.
            devices.remove(console)
    own_channels = {_channel_name(one): one for one in own.iterfind("devices/channel")}
    for channel in root.iterfind("devices/channel"):
        _merge_character_device(
            channel, own_channels.pop(_channel_name(channel), device_xml.NOTHING)
        )
    for tag in ("serial", "parallel", "console"):
        for device, own_device in device_xml.pairs(root, own, f"devices/{tag}"):
            _merge_character_device(device, own_device)


def _channel_name(channel: etree._Element) -> str | None:
    target = channel.find("target")
    return None if target is None else target.get("name")


def _merge_character_device(device: etree._Element, own: etree._Element) -> None:
    device.set("type", str(own.get("type", "null")))
    for tag in ("source", "protocol", "log"):
        libvirt_xml.replace(device, own, tag)


def _merge_disks(
    root: etree._Element, own: etree._Element | None, disks: Mapping[str, str]
) -> None:
    own_disks = (
        None
        if own is None
        else {disk_xml.target(disk): disk for disk in own.iterfind("devices/disk")}
    )
    for disk in root.iterfind("devices/disk"):
        target = disk_xml.target(disk)
        forked = disk_xml.is_forked(disk)
        empty = not forked and disk.find("source") is None
        _keep(disk, _DISK_GUEST)
        if empty:
            continue
        own_disk = own_disks.pop(target, None) if own_disks is not None else None
        if own_disk is None and (own_disks is not None or not forked):
            raise exception.SpawnFailed(
                f"The clone's own domain has no disk {target}, which its parent has"
            )
        if forked and target not in disks:
            raise exception.SpawnFailed(f"No file is named for the clone's disk {target}")
        _merge_disk(disk, own_disk, disks[target] if forked else None)
    for target, own_disk in (own_disks or {}).items():
        if own_disk.find("source") is not None:
            raise exception.SpawnFailed(
                f"The clone's own domain has a disk {target}, which its parent has not"
            )


def _merge_disk(disk: etree._Element, own: etree._Element | None, path: str | None) -> None:
    driver = disk.find("driver")
    if own is not None:
        own_driver = own.find("driver")
        if driver is not None:
            host = (*_DISK_DRIVER, "copy_on_read", "type")
            libvirt_xml.take_attributes(
                driver, device_xml.NOTHING if own_driver is None else own_driver, host
            )
        for tag in _DISK_HOST:
            libvirt_xml.replace(disk, own, tag)
        disk.set("type", own.get("type", "file"))
    if path is not None:
        for source in disk.findall("source"):
            disk.remove(source)
        etree.SubElement(disk, "source", file=path)
        disk.set("type", "file")
        if driver is not None:
            driver.set("type", "qcow2")


def _merge_interfaces(root: etree._Element, own: etree._Element | None) -> None:
    if own is None:
        for interface in root.iterfind("devices/interface"):
            if interface.get("type") != "user":
                raise exception.SpawnFailed(
                    "The clone's network interfaces have nothing to be connected to: its own "
                    "domain is not given"
                )
        return
    for interface, own_interface in device_xml.INTERFACES.pairs(root, own):
        _keep(interface, _INTERFACE_GUEST)
        interface.set("type", str(own_interface.get("type")))
        libvirt_xml.take_attributes(interface, own_interface, ("trustGuestRxFilters",))
        for tag in _INTERFACE_HOST:
            libvirt_xml.replace(interface, own_interface, tag)
        _merge_interface_driver(interface, own_interface)
        # Whether there is a limit is a feature of the device; what it is belongs to the network.
        for mtu in interface.findall("mtu"):
            own_mtu = own_interface.find("mtu")
            mtu.set("size", _USUAL_MTU if own_mtu is None else str(own_mtu.get("size")))


def _disconnect_interfaces(root: etree._Element) -> None:
    """libvirt makes a TAP device for each that nothing is connected to."""
    for interface in root.iterfind("devices/interface"):
        interface.set("type", "ethernet")
        interface.attrib.pop("trustGuestRxFilters", "")
        _keep(interface, _INTERFACE_GUEST)
        for driver in interface.findall("driver"):
            driver.set("name", "qemu")


def _merge_interface_driver(interface: etree._Element, own: etree._Element) -> None:
    """The kind of back end is the host's; all else of a driver is seen by the guest."""
    driver, own_driver = interface.find("driver"), own.find("driver")
    name = own_driver.get("name") if own_driver is not None else None
    if driver is None and name is not None:
        driver = etree.SubElement(interface, "driver")
    if driver is not None:
        driver.attrib.pop("name", "")
        if name is not None:
            driver.set("name", name)


def _keep(element: etree._Element, tags: set[str]) -> None:
    """Remove children but the first of each of these kinds."""
    seen: set[str] = set()
    for child in list(element):
        tag = str(child.tag)
        if tag in tags and tag not in seen:
            seen.add(tag)
        else:
            element.remove(child)
