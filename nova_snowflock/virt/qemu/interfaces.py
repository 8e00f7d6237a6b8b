# SPDX-License-Identifier: Apache-2.0
"""Network interfaces of a clone that is about to run: its own plugged in, its parent's out.

Its guest is told that interfaces came and went, as by hand, and asks for addresses as for any new
one. It has its own MAC at once, and nothing that it sent as its parent ever left QEMU.
"""

import libvirt
from lxml import etree
import pyroute2

from nova_snowflock.virt.qemu import domain_xml


def replace(domain: libvirt.virDomain, own_domain: str | None) -> None:
    """Give a clone that is paused its own interfaces in place of those that it has.

    The guest is asked to let go of its parent's, and may take its time for that, or not know how:
    they have no link any more.

    :param own_domain: XML of the domain as its cloud describes it, if that is known
    :raises libvirtError: its machine has no room for one
    """
    parents = domain_xml.parse(domain.XMLDesc()).findall("devices/interface")
    for interface in parents:
        # Not before: what the guest believes of its link comes with its state, and QEMU believes it
        # too (virtio_net_post_load_device).
        _set_link_down(interface)
        domain.updateDeviceFlags(domain_xml.text(interface), libvirt.VIR_DOMAIN_AFFECT_LIVE)
        _take_down(interface)
    if own_domain is not None:
        for interface in domain_xml.parse(own_domain).iterfind("devices/interface"):
            domain.attachDeviceFlags(domain_xml.text(interface), libvirt.VIR_DOMAIN_AFFECT_LIVE)
    for interface in parents:
        alias = interface.find("alias")
        assert alias is not None
        # Does not wait for the guest.
        domain.detachDeviceAlias(str(alias.get("name")), libvirt.VIR_DOMAIN_AFFECT_LIVE)


def _set_link_down(interface: etree._Element) -> None:
    for link in interface.findall("link"):
        interface.remove(link)
    etree.SubElement(interface, "link", state="down")


def _take_down(interface: etree._Element) -> None:
    """The host's end of one that leads nowhere: what comes out of it would be the host's."""
    target = interface.find("target")
    if target is None or interface.get("type") != "ethernet":
        return
    with pyroute2.IPRoute() as route:
        for index in route.link_lookup(ifname=str(target.get("dev"))):
            route.link("set", index=index, state="down")
