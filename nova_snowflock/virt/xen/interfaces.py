# SPDX-License-Identifier: Apache-2.0
"""Network interfaces of a clone.

The guest connects those that it has of its parent to the back ends of its own host by itself when
it goes on, as after a migration, and takes over the MAC that it finds in xenstore then (the
kernel's drivers/net/xen-netfront.c, talk_to_netback). It sees that its link was gone for a moment.

Replaced, it is also asked to let go of them, and is given them as new ones.

Held, the host's end of each is down: nothing passes, though Xen has no way to tell the guest so.
"""

import libvirt
from lxml import etree
import pyroute2

from nova_snowflock.virt import libvirt_xml

_LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE


def hold(domain: libvirt.virDomain) -> None:
    """Have nothing pass those of a clone that is paused."""
    _set_links(domain, "down")


def connect(domain: libvirt.virDomain) -> None:
    """Let pass again what is held."""
    _set_links(domain, "up")


def replace(domain: libvirt.virDomain) -> None:
    """Plug those of a clone that runs out and in again. Its guest must be able to.

    :raises libvirtError: it does not let go of one
    """
    for interface in _all(domain):
        xml = etree.tostring(interface, encoding="unicode")
        domain.detachDeviceFlags(xml, _LIVE)
        domain.attachDeviceFlags(xml, _LIVE)


def _all(domain: libvirt.virDomain) -> list[etree._Element]:
    return libvirt_xml.parse(domain.XMLDesc()).findall("devices/interface")


def _set_links(domain: libvirt.virDomain, state: str) -> None:
    with pyroute2.IPRoute() as route:
        for interface in _all(domain):
            target = interface.find("target")
            name = None if target is None else target.get("dev")
            for index in route.link_lookup(ifname=str(name)):
                route.link("set", index=index, state=state)
