# SPDX-License-Identifier: Apache-2.0
"""Network interfaces of a clone.

The guest connects those that it has of its parent to the back ends of its own host by itself when
it goes on, as after a migration, and takes over the MAC that it finds in xenstore then (the
kernel's drivers/net/xen-netfront.c, talk_to_netback). It sees that its link was gone for a moment.

Replaced, it is asked to let go of them when it has connected them, and is given them as new ones.

Held, the host's end of each is down: nothing passes, though Xen has no way to tell the guest so.
"""

import time

import libvirt
from lxml import etree
import pyroute2

from nova_snowflock.virt import libvirt_xml

_LIVE = libvirt.VIR_DOMAIN_AFFECT_LIVE
_PATIENCE = 30.0
"""Seconds that a guest may take to connect all of its own: one without a driver never does."""
_LOOK_AGAIN = 0.1


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
    deadline = time.monotonic() + _PATIENCE
    for interface in _all(domain):
        # What a guest has not let go of libxl takes away after 10 s (libxl_internal.h,
        # LIBXL_DESTROY_TIMEOUT). The guest, which has lacked memory until then, keeps the old one.
        while not _is_connected(interface) and time.monotonic() < deadline:
            time.sleep(_LOOK_AGAIN)
        xml = etree.tostring(interface, encoding="unicode")
        domain.detachDeviceFlags(xml, _LIVE)
        domain.attachDeviceFlags(xml, _LIVE)


def _all(domain: libvirt.virDomain) -> list[etree._Element]:
    return libvirt_xml.parse(domain.XMLDesc()).findall("devices/interface")


def _is_connected(interface: etree._Element) -> bool:
    """Whether the guest's end is: the host's has a carrier then (drivers/net/xen-netback)."""
    with pyroute2.IPRoute() as route:
        links = route.get_links(ifname=_host_end(interface))
        return any(link.get_attr("IFLA_CARRIER") for link in links)


def _set_links(domain: libvirt.virDomain, state: str) -> None:
    with pyroute2.IPRoute() as route:
        for interface in _all(domain):
            for index in route.link_lookup(ifname=_host_end(interface)):
                route.link("set", index=index, state=state)


def _host_end(interface: etree._Element) -> str:
    """The name of the host's end."""
    target = interface.find("target")
    return "" if target is None else str(target.get("dev", ""))
