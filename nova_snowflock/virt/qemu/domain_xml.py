# SPDX-License-Identifier: Apache-2.0
"""A domain's XML: whether it can be forked, and what a clone's is.

A clone's device tree must be its parent's, down to PCI addresses. libvirt has a form of the XML
with just that promise: VIR_DOMAIN_XML_MIGRATABLE, which it gives to the other side of a migration
and keeps in its own save images. What depends on the host (ports, pseudo terminals, sockets it
named itself, security labels) is left out of it.
"""

from collections.abc import Callable, Mapping
import copy
import os.path
import re
import uuid

from lxml import etree

from nova_snowflock import exception
from nova_snowflock.virt import libvirt_xml
from nova_snowflock.virt.disks import disk_xml
from nova_snowflock.virt.qemu import device_xml
from nova_snowflock.virt.qemu import own_xml

MEMORY = "snowflock-ram"
"""Name of a clone's memory object and RAM block."""
_BACKEND = f"memory-backend={MEMORY}"
_SLOW = "cpu-unavailable-features"
_QEMU = "http://libvirt.org/schemas/domain/qemu/1.0"

# Devices whose whole state is in QEMU's device state and in nothing outside of it.
_DEVICES = {
    "audio",
    "channel",
    "console",
    "controller",
    "disk",
    "emulator",
    "graphics",
    "hub",
    "input",
    "interface",
    "iommu",
    "memballoon",
    "panic",
    "parallel",
    "rng",
    "serial",
    "sound",
    "video",
    "watchdog",
}
_REASONS = {
    "hostdev": "it has a host device (PCI, mediated, SCSI or USB)",
    "tpm": "it has a TPM, whose state is outside QEMU",
    "memory": "it has memory devices (DIMM, NVDIMM or virtio-mem)",
    "filesystem": "it has a file system shared with the host",
    "shmem": "it has memory shared with the host",
    "vsock": "it has a vsock, whose address belongs to one guest",
}
# What a guest's description may have, each once; but for the last ones.
_PARTS = {
    *("blkiotune", "clock", "cpu", "cputune", "currentMemory", "description", "devices"),
    *("features", "genid", "iothreadids", "iothreads", "memory", "memoryBacking", "memtune"),
    *("metadata", "name", "numatune", "on_crash", "on_poweroff", "on_reboot", "os", "perf"),
    *("pm", "resource", "title", "uuid", "vcpu", "vcpus"),
}
_REPEATED = {"seclabel", "sysinfo"}
_PLAIN = ("currentMemory", "genid", "iothreads", "memory", "name", "os/type", "uuid", "vcpu")
# Numbers for which libvirt makes room before it knows whether they are sound, by element.
_NUMBERS = {
    "controller": ("index", "ports", "vectors"),
    "address": ("bus", "controller", "domain", "function", "port", "slot", "target", "unit"),
    "driver": ("queues",),
    "target": ("busNr", "chassis", "chassisNr", "index", "port"),
}
_NUMBER = re.compile(r"0x[0-9a-f]{1,4}|[0-9]{1,3}(\.[0-9]{1,3}){0,4}")
_MAX_DEVICES = 256
# Kinds of character device that lead nowhere but to this host, or to where libvirt says.
_CHARACTER_DEVICES = {"pty", "file", "unix", "null", "spicevmc", "qemu-vdagent", "vc"}


def refusal(root: etree._Element) -> str | None:
    """Why a guest with this XML cannot be forked, or None."""
    if root.get("type") not in ("qemu", "kvm"):
        return f"it is of type {root.get('type')}, not a QEMU guest"
    backing = root.find("memoryBacking")
    if backing is not None:
        if backing.find("hugepages") is not None:
            return "its memory is on huge pages"
        access, source = backing.find("access"), backing.find("source")
        if access is not None and access.get("mode") == "shared":
            return "its memory is shared with other processes"
        if source is not None and source.get("type") != "anonymous":
            return f"its memory is in a {source.get('type')}"
    if root.find("cpu/numa") is not None:
        return "it has NUMA nodes, each of which has memory of its own"
    if root.find("launchSecurity") is not None:
        return "its memory is encrypted (launchSecurity)"
    loader = root.find("os/loader")
    if root.find("os/nvram") is not None or (loader is not None and loader.get("type") == "pflash"):
        return "its firmware has a variable store, which is not supported yet"
    if root.find("sysinfo[@type='fwcfg']/entry[@file]") is not None:
        return "its firmware reads a file of this host (fwcfg)"
    if root.find("devices//rom[@file]") is not None:
        return "it has a device whose ROM is a file of this host"
    if root.find(f"{{{_QEMU}}}*") is not None:
        return "its QEMU has arguments, environment or capabilities that libvirt knows nothing of"
    reason = _structure_refusal(root)
    if reason is not None:
        return reason
    for device in root.iterfind("devices/*"):
        reason = _device_refusal(device)
        if reason is not None:
            return reason
    return None


def _structure_refusal(root: etree._Element) -> str | None:
    """Why libvirt and this could read the XML differently, or None.

    libvirt takes an attribute by its name in whatever namespace (src/util/virxml.c,
    virXMLPropString), the first or any of several elements, and a number from the text of its
    children, too.
    """
    parts = [str(part.tag) for part in root if part.tag not in _REPEATED]
    for tag in parts:
        if tag not in _PARTS:
            return f"its description has a part {tag}, which clones cannot have"
        if parts.count(tag) > 1:
            return f"its description has {parts.count(tag)} parts {tag}"
    if any(str(name).startswith("{") for name in root.attrib):
        return "its description has attributes of other namespaces"
    for part in root:
        if part.tag == "metadata":
            continue  # anybody's, and not passed on
        for element in part.iter():
            if any(str(name).startswith("{") for name in (element.tag, *element.attrib)):
                return f"its description has names of other namespaces in its part {part.tag}"
    for tag in _PLAIN:
        if root.find(f"{tag}/*") is not None:
            return f"its description has more than text in its part {tag}"
    if len(root.findall("devices/*")) > _MAX_DEVICES:
        return f"it has more than {_MAX_DEVICES} devices"
    for tag, names in _NUMBERS.items():
        for element in root.iterfind(f"devices//{tag}"):
            for name in names:
                value = element.get(name)
                if value is not None and not _NUMBER.fullmatch(str(value)):
                    return f"it has a {tag} whose {name} is {value}"
    return None


def _device_refusal(device: etree._Element) -> str | None:
    tag = str(device.tag)
    if tag not in _DEVICES:
        return _REASONS.get(tag, f"it has a device {tag}, which cannot be forked")
    if tag in ("serial", "parallel", "console", "channel"):
        kind = device.get("type")
        source = device.find("source")
        if kind not in _CHARACTER_DEVICES:
            return f"its {tag} is of type {kind}, which only one guest can have"
        if kind == "unix" and source is not None and source.get("mode") == "connect":
            return f"its {tag} is connected to a socket, which only one guest can be"
    if tag == "channel" and device.find("target[@type='guestfwd']") is not None:
        return "it has a channel to an address of its network"
    if tag == "rng" and device.find("backend[@model='egd']") is not None:
        return "its random numbers come from a socket, which only one guest can be connected to"
    if tag == "audio" and device.get("type") not in ("none", "spice"):
        return f"its sound is played on this host ({device.get('type')})"
    if tag == "input" and device.get("type") in ("evdev", "passthrough"):
        return "it has an input device of the host"
    if tag == "disk":
        return disk_xml.refusal(device)
    if tag == "interface":
        return device_xml.INTERFACES.refusal(device)
    if tag == "video" and device.find("driver[@name='vhostuser']") is not None:
        return "its graphics are drawn by another process (vhost-user)"
    return None


def machine_type(root: etree._Element) -> str:
    """The machine type of a running guest, which is a versioned one.

    :raises InvalidDomain: there is none
    """
    machine = root.find("os/type")
    if machine is None or not machine.get("machine"):
        raise exception.InvalidDomain("The domain's XML names no machine type")
    return str(machine.get("machine"))


def cpu(root: etree._Element) -> str:
    """The ``<cpu>`` element as text, an empty one if the guest has QEMU's default."""
    element = root.find("cpu")
    if element is None:
        return "<cpu/>"
    return text(element).strip()


def memory_file(root: etree._Element) -> str | None:
    """The file that :func:`clone` has backed a guest's memory by, or None if it is no clone.

    None, too, if QEMU has other arguments beside those.
    """
    arguments = root.findall(f"{{{_QEMU}}}commandline/{{{_QEMU}}}arg")
    values = [str(argument.get("value")) for argument in arguments]
    options = dict(
        option.partition("=")[::2] for value in values[1:2] for option in value.split(",")
    )
    path = options.get("mem-path")
    if path is None or values != _memory_arguments(path, options.get("size", "")):
        return None
    return path


def portable(migratable: str, live: str) -> str:
    """The XML that clones derive from.

    The processor is the live one: where it was asked for by the host's (host-model), the
    migratable form still says so, and a clone host would read it as its own.

    What makes a clone of the parent is left out: a clone of it has that of its own.

    :param migratable: the parent's XML in the form VIR_DOMAIN_XML_MIGRATABLE
    :param live: the same in the ordinary form
    """
    root, running = libvirt_xml.parse(migratable), libvirt_xml.parse(live)
    if memory_file(root) is not None:
        for element in root.findall(f"{{{_QEMU}}}*"):
            for argument in element.findall(f"{{{_QEMU}}}arg"):
                element.remove(argument)
            for capability in element.findall(f"{{{_QEMU}}}del[@capability='{_SLOW}']"):
                element.remove(capability)
            if not len(element):
                root.remove(element)
    asked, actual = root.find("cpu"), running.find("cpu")
    if asked is not None and actual is not None:
        replacement = copy.deepcopy(actual)
        replacement.tail = asked.tail
        root.replace(asked, replacement)
    return text(root)


def clone(
    xml: str,
    name: str,
    identity: str,
    memory_file: str,
    memory_size: int,
    *,
    own_domain: str | None = None,
    disks: Mapping[str, str] | None = None,
    replaced: bool = False,
) -> str:
    """The XML of a clone.

    :param xml: from :func:`portable`
    :param name: the clone's
    :param identity: the clone's UUID
    :param memory_file: path that memtap presents the guest's memory at
    :param memory_size: its bytes
    :param own_domain: the clone's own domain as its cloud describes it
    :param disks: paths of the clone's own layers, by target device
    :param replaced: its own interfaces will be plugged in: its parent's lead nowhere
    :raises InvalidDomain: the XML is not a domain's
    :raises SpawnFailed: a disk or network interface has nothing to be replaced by on its host
    """
    root = libvirt_xml.parse(xml)
    parent_name, parent_uuid = root.findtext("name"), root.findtext("uuid")
    if not parent_name or not parent_uuid:
        raise exception.InvalidDomain("The domain's XML lacks its name or UUID")
    if "," in memory_file:
        raise ValueError(f"QEMU splits its arguments at the comma in {memory_file}")
    _set(root, "name", name)
    _set(root, "uuid", identity)
    if root.find("genid") is not None:
        # The guest kernel reseeds its random number generator when this changes.
        _set(root, "genid", str(uuid.uuid4()))
    for entry in root.iterfind("sysinfo//entry"):
        # libvirt insists that the SMBIOS UUID is the domain's; Nova makes the serial number that.
        if entry.text == parent_uuid:
            entry.text = identity

    def renamed(path: str) -> str:
        return own_path(path, parent_name, parent_uuid, name, identity)

    for element in root.iterfind("devices//*[@path]"):
        if element.tag in ("source", "log"):
            _own_source(element, renamed)
    for element in root.iterfind("devices//log[@file]"):
        element.set("file", renamed(str(element.get("file"))))
    for element in root.iterfind("devices//*[@socket]"):
        element.set("socket", renamed(str(element.get("socket"))))
    for graphics in root.iterfind("devices/graphics"):
        for attribute in ("port", "tlsPort", "websocket"):
            if attribute in graphics.attrib:
                del graphics.attrib[attribute]
        if graphics.get("socket") is None:
            graphics.set("autoport", "yes")
    # Which program runs a clone and how it is confined is its own host's matter.
    for label in root.findall("seclabel"):
        root.remove(label)
    for devices in root.iterfind("devices"):
        for emulator in devices.findall("emulator"):
            devices.remove(emulator)
    own = None if own_domain is None else libvirt_xml.parse(own_domain)
    own_xml.merge(root, own, disks or {}, replaced=replaced)
    _append_memory(root, memory_file, memory_size)
    _hasten(root)
    return text(root)


def own_path(path: str, parent_name: str, parent_uuid: str, name: str, identity: str) -> str:
    """The clone's path for one of the parent's: never the same.

    Where the parent's UUID or name is in the path (as Nova and libvirt have it), the clone's takes
    its place; otherwise the clone's name is appended.
    """
    changed = path.replace(parent_uuid, identity)
    if changed == path:
        whole = rf"(?<![A-Za-z0-9_-]){re.escape(parent_name)}(?![A-Za-z0-9_-])"
        changed = re.sub(whole, lambda _: name, path)
    if changed == path:
        changed = f"{path}.{name}"
    return os.path.normpath(changed)


def _own_source(element: etree._Element, own: Callable[[str], str]) -> None:
    device = element.getparent()
    if device is None or device.tag not in ("serial", "parallel", "console", "channel"):
        return
    if device.get("type") == "pty":
        device.remove(element)
        if "tty" in device.attrib:
            del device.attrib["tty"]
    elif device.get("type") in ("file", "unix"):
        element.set("path", own(str(element.get("path"))))


def _append_memory(root: etree._Element, path: str, size: int) -> None:
    """Back the guest's memory by the file; QEMU takes the last -machine memory-backend it gets."""
    commandline = etree.SubElement(root, f"{{{_QEMU}}}commandline", nsmap={"qemu": _QEMU})
    for argument in _memory_arguments(path, str(size)):
        etree.SubElement(commandline, f"{{{_QEMU}}}arg", value=argument)


def _memory_arguments(path: str, size: str) -> list[str]:
    # share=off: what the guest writes stays in its own process. The block's name must not depend
    # on the object's path in QEMU's tree, which is new in later machine types.
    backend = (
        f"memory-backend-file,id={MEMORY},size={size},mem-path={path},share=off,"
        "x-use-canonical-path-for-ramblock-id=off"
    )
    return ["-object", backend, "-machine", _BACKEND]


def _hasten(root: etree._Element) -> None:
    """Have libvirt ask QEMU for its processor's features in two commands instead of 350.

    libvirt 9 reads each property of the processor on its own if QEMU has ``unavailable-features``
    (src/qemu/qemu_process.c, qemuProcessFetchGuestCPU), which is most of the time a start takes.
    Told that it has not, libvirt checks the same with ``feature-words`` and ``filtered-features``.
    """
    capabilities = etree.SubElement(root, f"{{{_QEMU}}}capabilities", nsmap={"qemu": _QEMU})
    etree.SubElement(capabilities, f"{{{_QEMU}}}del", capability=_SLOW)


def _set(root: etree._Element, tag: str, text: str) -> None:
    element = root.find(tag)
    if element is None:
        raise exception.InvalidDomain(f"The domain's XML lacks its {tag}")
    element.text = text


def text(element: etree._Element) -> str:
    """An element as XML, without what follows it."""
    return etree.tostring(element, encoding="unicode", with_tail=False)
