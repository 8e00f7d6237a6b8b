# SPDX-License-Identifier: Apache-2.0
"""Devices in a domain's XML: a clone's and its own domain's, and which interfaces can be forked."""

from collections.abc import Iterator
import itertools

from lxml import etree

NOTHING = etree.Element("nothing")
"""Stands for an element that is not there. Not to be changed."""

# Those whose state is inside QEMU, but for what belongs to the host.
_INTERFACES = ("bridge", "ethernet", "network", "user")
# That QEMU has; libvirt takes any name for one (src/conf/domain_conf.c, virDomainNetDefParseXML).
_MODELS = (
    *("virtio", "virtio-transitional", "virtio-non-transitional"),
    *("e1000", "e1000e", "igb", "ne2k_pci", "pcnet", "rtl8139", "vmxnet3"),
)


def pairs(
    root: etree._Element, own: etree._Element, path: str
) -> Iterator[tuple[etree._Element, etree._Element]]:
    """A clone's elements at a path, each with that of its own domain, or :data:`NOTHING`."""
    elements, counterparts = root.findall(path), own.findall(path)
    return itertools.zip_longest(elements, counterparts[: len(elements)], fillvalue=NOTHING)


def interface_refusal(interface: etree._Element) -> str | None:
    """Why a guest with this network interface cannot be forked, or None."""
    if interface.get("type") not in _INTERFACES:
        return f"it has a network interface of type {interface.get('type')}, which cannot be forked"
    if interface.find("teaming") is not None:
        return "it has a network interface that is teamed with another"
    for model in interface.iterfind("model"):
        if model.get("type") not in _MODELS:
            return f"it has a network interface of the model {model.get('type')}"
    return None
