# SPDX-License-Identifier: Apache-2.0
"""What a clone must not have if its own domain does not: its parent's host is not to be trusted.

That host wrote the XML that the clone's derives from, and libvirt gives QEMU whatever it names.
"""

from collections.abc import Collection, Iterator

from lxml import etree

from nova_snowflock import exception
from nova_snowflock.virt.qemu import device_xml

_KIB = {"KiB": 1, "MiB": 1 << 10, "GiB": 1 << 20}
# KiB that libvirt gives the most demanding display if nothing is asked for (qxl, src/conf/video).
_DISPLAY = 65536
_DISPLAY_MEMORY = ("ram", "vram", "vram64", "vgamem")
# Features beyond those that a host gives its guests by name.
_OPEN_MODES = ("host-passthrough", "maximum")
_HOST_MODES = ("host-model", *_OPEN_MODES)
# Virtual machines and the processor's counters in the guest.
_PRIVILEGES = (
    *(f"cpu/feature[@name='{name}'][@policy='require']" for name in ("vmx", "svm")),
    *(f"cpu/feature[@name='{name}'][@policy='force']" for name in ("vmx", "svm")),
    "features/pmu[@state='on']",
    "features/hyperv[@mode='passthrough']",
)
# Those of a guest that has not let go of its parent's yet.
_INTERFACES = 16
# Texts that libvirt hands to no one as a path, some of them chosen by tenants.
_TEXTS = frozenset(("cmdline", "description", "metadata", "name", "sysinfo", "title"))


def check(root: etree._Element, own: etree._Element, paths: Collection[str]) -> None:
    """
    :param root: the clone's XML
    :param own: its own domain
    :param paths: what it may name beside what its own domain names
    :raises SpawnFailed: it has more than its own domain has
    """
    _check_kind(root, own)
    _check_size(root, own)
    _check_displays(root, own)
    known = {*paths, *(value for _, value in _values(own))}
    for tag, value in _values(root):
        if "/" in value and value not in known:
            raise exception.SpawnFailed(
                f"The image's guest names {value} ({tag}), which the clone's own domain does not"
            )


def _check_kind(root: etree._Element, own: etree._Element) -> None:
    if root.get("type") != own.get("type"):
        raise exception.SpawnFailed(
            f"The image's guest is one of {root.get('type')}, its clone would be one of "
            f"{own.get('type')}"
        )
    mode, own_mode = _cpu_mode(root), _cpu_mode(own)
    if mode in _OPEN_MODES and mode != own_mode:
        raise exception.SpawnFailed(
            f"The image's guest has all that its host's processor can ({mode}); its clone may not"
        )
    for path in _PRIVILEGES:
        if root.find(path) is not None and own.find(path) is None and own_mode not in _HOST_MODES:
            raise exception.SpawnFailed(f"The image's guest has {path}, its clone may not")


def _cpu_mode(root: etree._Element) -> str | None:
    cpu = root.find("cpu")
    return None if cpu is None else cpu.get("mode")


def _check_size(root: etree._Element, own: etree._Element) -> None:
    processors = _number(own.findtext("vcpu"))
    for what, has, may in (
        ("processors", _number(root.findtext("vcpu")), processors),
        ("memory", _kib(root.find("memory")), _kib(own.find("memory"))),
        (
            "iothreads",
            max(_iothreads(root), len(root.findall("iothreadids/iothread"))),
            max(processors, _iothreads(own)),
        ),
        ("queues", _queues(root), max(processors, _queues(own))),
        (
            "network interfaces",
            len(root.findall("devices/interface")),
            max(_INTERFACES, len(own.findall("devices/interface"))),
        ),
    ):
        if has > may:
            raise exception.SpawnFailed(
                f"The image's guest has {has} of {what}, its clone may have {may}"
            )


def _iothreads(root: etree._Element) -> int:
    return _number(root.findtext("iothreads", "0"))


def _queues(root: etree._Element) -> int:
    """The most that a device has."""
    drivers = root.iterfind("devices//driver")
    return max((_number(driver.get("queues", "0")) for driver in drivers), default=0)


def _check_displays(root: etree._Element, own: etree._Element) -> None:
    if len(root.findall("devices/video")) > max(1, len(own.findall("devices/video"))):
        raise exception.SpawnFailed("The image's guest has more displays than its clone may have")
    for video, own_video in device_xml.pairs(root, own, "devices/video"):
        for model in video.iterfind("model"):
            for name in _DISPLAY_MEMORY:
                own_models = own_video.iterfind("model")
                asked = max([_DISPLAY, *(_number(one.get(name, "0")) for one in own_models)])
                may = 1 << (asked - 1).bit_length()  # as libvirt rounds what it is asked for
                if _number(model.get(name, "0")) > may:
                    raise exception.SpawnFailed(
                        f"The image's guest has {model.get(name)} KiB for its display ({name}), "
                        f"its clone may have {may}"
                    )


def _kib(element: etree._Element | None) -> int:
    unit = "KiB" if element is None else str(element.get("unit", "KiB"))
    if element is None or unit not in _KIB:
        raise exception.SpawnFailed(f"There is no size of memory in {unit}")
    return _number(element.text) * _KIB[unit]


def _number(text: str | None) -> int:
    if text is None or not text.strip().isdecimal():
        raise exception.SpawnFailed(f"{text!r} is not a number")
    return int(text)


def _values(root: etree._Element) -> Iterator[tuple[str, str]]:
    """What a domain's XML says that could be a path, with the name of its element."""
    for element in root.iterchildren("*"):
        if element.tag in _TEXTS:
            continue
        for value in (*element.attrib.values(), element.text, element.tail):
            if value is not None:
                yield str(element.tag), str(value).strip()
        yield from _values(element)
