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
HOTPLUG = "hotplug"
"""The clone's network interfaces are plugged into its guest, and its parent's out."""
NONE = "none"
"""The guest keeps its parent's interfaces, and is not heard with their addresses."""

_PORTS = ("pcie-root-port", "pcie-switch-downstream-port")


def kind_of(instance: objects.Instance) -> str:
    """:data:`HOTPLUG` or :data:`NONE`.

    :param instance: a parent or a clone, with its flavor and system metadata
    :raises CannotFork: what was chosen is not known here
    """
    chosen = instance.flavor.extra_specs.get(PROPERTY) or instance.system_metadata.get(
        f"{utils.SM_IMAGE_PROP_PREFIX}{PROPERTY}", AUTO
    )
    if chosen in (HOTPLUG, NONE):
        return str(chosen)
    if chosen == AUTO:
        return HOTPLUG
    raise exception.CannotFork(
        f"its flavor or image has {PROPERTY}={chosen}, which is none of {AUTO}, {HOTPLUG}, {NONE}"
    )


def check_room(instance: objects.Instance, domain: etree._Element, interfaces: int) -> None:
    """
    :param domain: XML of the domain that runs
    :param interfaces: how many network interfaces a clone will have
    :raises CannotFork: the guest has no place for them
    """
    if kind_of(instance) != HOTPLUG or not interfaces:
        return
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
