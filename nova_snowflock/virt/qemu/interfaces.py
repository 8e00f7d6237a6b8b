# SPDX-License-Identifier: Apache-2.0
"""Network interfaces of a clone.

Replaced, while it is stopped: its own are plugged in, its parent's out. Its guest is told that
interfaces came and went, as by hand, and asks for addresses as for any new one. It has its own MAC
at once, and nothing that it sent as its parent ever left QEMU.

Or held: those that its guest knows have no link until it has given them its own addresses.
"""

import libvirt
from lxml import etree
import pyroute2

from nova_snowflock.virt import libvirt_xml
from nova_snowflock.virt.qemu import domain_xml

_LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE


def hold(domain: libvirt.virDomain) -> list[etree._Element]:
    """Have those of a clone that is paused no link.

    :returns: what libvirt knows of them
    """
    # Not before: what the guest believes of its link comes with its state, and QEMU believes it too
    # (virtio_net_post_load_device).
    return _set_links(domain, "down")


def connect(domain: libvirt.virDomain) -> None:
    """Have those that are held a link."""
    _set_links(domain, "up")


def _set_links(domain: libvirt.virDomain, state: str) -> list[etree._Element]:
    interfaces = libvirt_xml.parse(domain.XMLDesc()).findall("devices/interface")
    for interface in interfaces:
        link = interface.find("link")
        if link is None:
            link = etree.SubElement(interface, "link", state="up")
        if link.get("state") != state:
            link.set("state", state)
            domain.updateDeviceFlags(domain_xml.text(interface), _LIVE)
    return interfaces


def replace(domain: libvirt.virDomain, own_domain: str | None) -> None:
    """Give a clone that is paused its own interfaces in place of those that it has.

    The guest is asked to let go of its parent's, and may take its time for that, or not know how:
    they have no link any more.

    :param own_domain: XML of the domain as its cloud describes it, if that is known
    :raises libvirtError: its machine has no room for one
    """
    parents = hold(domain)
    for interface in parents:
        _take_down(interface)
    if own_domain is not None:
        for interface in libvirt_xml.parse(own_domain).iterfind("devices/interface"):
            domain.attachDeviceFlags(domain_xml.text(interface), _LIVE)
    for interface in parents:
        alias = interface.find("alias")
        assert alias is not None
        # Does not wait for the guest.
        domain.detachDeviceAlias(str(alias.get("name")), _LIVE)


def _take_down(interface: etree._Element) -> None:
    """The host's end of one that leads nowhere: what comes out of it would be the host's."""
    target = interface.find("target")
    if target is None or interface.get("type") != "ethernet":
        return
    with pyroute2.IPRoute() as route:
        for index in route.link_lookup(ifname=str(target.get("dev"))):
            route.link("set", index=index, state="down")
