# SPDX-License-Identifier: Apache-2.0
"""Devices in a domain's XML: a clone's and its own domain's, and which interfaces can be forked."""

from collections.abc import Iterator
import itertools

from lxml import etree

from nova_snowflock.virt import interface_xml

NOTHING = etree.Element("nothing")
"""Stands for an element that is not there. Not to be changed."""

# Those whose state is inside QEMU, but for what belongs to the host; and the models that QEMU has:
# libvirt takes any name for one (src/conf/domain_conf.c, virDomainNetDefParseXML).
INTERFACES = interface_xml.Kinds(
    types=("bridge", "ethernet", "network", "user"),
    models=(
        *("virtio", "virtio-transitional", "virtio-non-transitional"),
        *("e1000", "e1000e", "igb", "ne2k_pci", "pcnet", "rtl8139", "vmxnet3"),
    ),
)


def pairs(
    root: etree._Element, own: etree._Element, path: str
) -> Iterator[tuple[etree._Element, etree._Element]]:
    """A clone's elements at a path, each with that of its own domain, or :data:`NOTHING`."""
    elements, counterparts = root.findall(path), own.findall(path)
    return itertools.zip_longest(elements, counterparts[: len(elements)], fillvalue=NOTHING)
