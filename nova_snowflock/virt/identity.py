# SPDX-License-Identifier: Apache-2.0
"""How a clone becomes itself: what its owner or its cloud's operator chose for the server."""

from __future__ import annotations

from lxml import etree
from nova import objects
from nova import utils

from nova_snowflock import exception

PROPERTY = "snowflock:identity"
"""Of a flavor or an image; the flavor's counts."""

AUTO = "auto"
AGENT = "agent"
"""An agent in the guest gives its interfaces their addresses."""
HOTPLUG = "hotplug"
"""The clone's network interfaces are plugged into its guest, and its parent's out."""
NONE = "none"
"""The guest keeps its parent's interfaces, and is not heard with their addresses."""

_CHOICES = (AUTO, AGENT, HOTPLUG, NONE)
_PORTS = ("pcie-root-port", "pcie-switch-downstream-port")


def chosen(instance: objects.Instance) -> str:
    """What was chosen for a server.

    :param instance: with its flavor and system metadata
    :raises CannotFork: it is not known here
    """
    choice = instance.flavor.extra_specs.get(PROPERTY) or instance.system_metadata.get(
        f"{utils.SM_IMAGE_PROP_PREFIX}{PROPERTY}", AUTO
    )
    if choice not in _CHOICES:
        raise exception.CannotFork(
            f"its flavor or image has {PROPERTY}={choice}, which is none of {', '.join(_CHOICES)}"
        )
    return str(choice)


def way(instance: objects.Instance, agent: bool) -> str:
    """:data:`AGENT`, :data:`HOTPLUG` or :data:`NONE`.

    :param instance: a parent or a clone, with its flavor and system metadata
    :param agent: whether an agent in the guest was there when it was forked
    :raises CannotFork: what was chosen cannot be had
    """
    choice = chosen(instance)
    if choice == AUTO:
        return AGENT if agent else HOTPLUG
    if choice == AGENT and not agent:
        raise exception.CannotFork(
            f"its flavor or image has {PROPERTY}={AGENT}, and no agent in its guest answers"
        )
    return choice


def check(
    instance: objects.Instance,
    domain: etree._Element,
    interfaces: int,
    *,
    agent: bool,
    allow_unseeded: bool,
) -> None:
    """
    :param domain: XML of the domain that runs
    :param interfaces: how many network interfaces a clone will have
    :param agent: whether an agent in the guest answers
    :param allow_unseeded: what the host's operator says
    :raises CannotFork: clones could not become themselves
    """
    how = way(instance, agent)
    if not interfaces:
        return
    is_xen = domain.get("type") == "xen"
    if not (how == AGENT or allow_unseeded) and domain.find("genid") is None:
        remedy = "guests of Xen are given none" if is_xen else "reboot it hard once"
        raise exception.CannotFork(
            "its machine has no generation ID, and no agent makes new random numbers in its clones "
            f"before they are on their networks: {remedy}"
        )
    if how == HOTPLUG and not is_xen:  # whose bus has no places to fill
        _check_room(domain, interfaces)


def _check_room(domain: etree._Element, interfaces: int) -> None:
    controllers = domain.findall("devices/controller[@type='pci']")
    if any(one.get("model") == "pci-root" for one in controllers):
        return  # any of its 32 places will do; interfaces of a q35 machine want a port each
    used = {
        int(str(address.get("bus", "0")), 16)
        for address in domain.iterfind("devices//address[@type='pci']")
    }
    ports = {
        int(str(one.get("index")))
        for one in controllers
        if one.get("model") in _PORTS and one.find("target[@hotplug='off']") is None
    }
    free = len(ports - used)
    if free < interfaces:
        raise exception.CannotFork(
            f"its machine has {free} PCI ports free, and its clones' {interfaces} network "
            "interfaces are plugged in: create it on a host with more ([libvirt]num_pcie_ports), "
            f"or with a flavor or image that has {PROPERTY}={NONE}"
        )
