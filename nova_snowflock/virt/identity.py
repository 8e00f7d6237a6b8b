# SPDX-License-Identifier: Apache-2.0
"""How a clone becomes itself: what its owner or its cloud's operator chose for the server."""

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


def check_room(instance: objects.Instance, domain: etree._Element) -> None:
    """
    :param domain: XML of the domain that runs
    :raises CannotFork: the guest has no place for the network interfaces of its clones
    """
    wanted = len(domain.findall("devices/interface"))
    if kind_of(instance) != HOTPLUG or not wanted:
        return
    controllers = domain.findall("devices/controller[@type='pci']")
    if any(not str(one.get("model")).startswith("pcie-root") for one in controllers):
        return  # a bus with 32 places
    used = {
        int(str(address.get("bus", "0")), 16)
        for address in domain.iterfind("devices//address[@type='pci']")
    }
    ports = {
        int(str(one.get("index"))) for one in controllers if one.get("model") == "pcie-root-port"
    }
    if len(ports - used) < wanted:
        raise exception.CannotFork(
            f"its machine has {len(ports - used)} PCI ports free, and its clones' {wanted} network "
            "interfaces are plugged in: create it on a host with more ([libvirt]num_pcie_ports), "
            f"or with a flavor or image that has {PROPERTY}={NONE}"
        )
