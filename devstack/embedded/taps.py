# SPDX-License-Identifier: Apache-2.0
"""Guests' interfaces that Open vSwitch takes down by mistake, on a compute host.

os-vif names a tap to the switch, makes it and sets it up. A switch in user space makes it
promiscuous as soon as it appears, and writes all of its flags for that, as it knew them
(lib/netdev-linux.c, update_flags): if it has not heard of the last change yet, it takes that back.
The kernel's own switch does not touch them.
"""

import errno
import threading

import pyroute2
from pyroute2.netlink import exceptions
from pyroute2.netlink import rtnl
from pyroute2.netlink.rtnl import ifinfmsg

_watching = threading.Lock()


def keep_up() -> None:
    """Set taps up again that the switch has taken down, from now on. Idempotent."""
    if _watching.acquire(blocking=False):
        threading.Thread(target=_watch, name="taps", daemon=True).start()


def _watch() -> None:
    with pyroute2.IPRoute() as route:
        route.bind(rtnl.RTMGRP_LINK)
        while True:
            for message in route.get():
                if _is_down_by_mistake(message):
                    _set_up(message["index"])


def _is_down_by_mistake(message: ifinfmsg.ifinfmsg) -> bool:
    flags = message.get("flags", 0)
    return (
        message.get("event") == "RTM_NEWLINK"
        and str(message.get("ifname")).startswith("tap")
        and bool(flags & ifinfmsg.IFF_PROMISC)
        and not flags & ifinfmsg.IFF_UP
    )


def _set_up(index: int) -> None:
    # Not by the socket that the events come to.
    with pyroute2.IPRoute() as route:
        try:
            route.link("set", index=index, state="up")
        except exceptions.NetlinkError as error:
            if error.code != errno.ENODEV:  # it has been removed
                raise
