# SPDX-License-Identifier: Apache-2.0
"""A family's own network: clones reach each other and their parent there, and nobody else does.

It is made of what any user could make: a network behind the router of the parent's network, and a
security group whose members are the clones' ports and the parent's. What leads out of it is that
router. It belongs to the parent's project.
"""

from __future__ import annotations

import contextlib
import ipaddress
from typing import Any

from neutronclient.common import exceptions as neutron_exceptions
from oslo_log import log as logging

from nova_snowflock import exception

LOG = logging.getLogger(__name__)

_ROUTERS = (
    "network:router_interface",
    "network:router_interface_distributed",
    "network:ha_router_replicated_interface",
)
_PREFIX = 24
_NAME = "snowflock-"
"""With the fork's ID, of the network, its subnet and its group."""

FamilyNetwork = dict[str, str]
"""IDs of its ``network``, ``subnet``, ``router``, ``group`` and the parent's ``port``."""


def make(
    neutron: Any, fork_id: str, server: str, project_id: str, space: ipaddress.IPv4Network
) -> FamilyNetwork:
    """A network for the clones of a fork. After a failure, nothing of it is left.

    :param neutron: a client of neutronclient
    :param server: the parent's UUID
    :param space: where it takes its addresses from
    :raises CannotFork: the parent has no interface, or several, or its network has no router
    """
    ports = neutron.list_ports(device_id=server)["ports"]
    if len(ports) != 1:
        raise exception.CannotFork(
            f"it has {len(ports)} network interfaces, and a family's network stands for one"
        )
    [port] = ports
    parents = [neutron.show_subnet(fixed["subnet_id"])["subnet"] for fixed in port["fixed_ips"]]
    parent: dict[str, Any] = next((one for one in parents if one["ip_version"] == 4), {})
    router = _router_of(neutron, port["network_id"], parent.get("gateway_ip"))
    made: FamilyNetwork = {"router": router, "port": port["id"]}
    owned = {"name": f"{_NAME}{fork_id}", "tenant_id": project_id}
    try:
        network = neutron.create_network({"network": owned})["network"]
        made["network"] = network["id"]
        of_subnet = {
            **owned,
            "network_id": network["id"],
            "dns_nameservers": parent.get("dns_nameservers", []),
        }
        made["subnet"] = _subnet(neutron, router, of_subnet, space)
        neutron.add_interface_router(router, {"subnet_id": made["subnet"]})
        group = neutron.create_security_group({"security_group": owned})["security_group"]
        made["group"] = group["id"]
        _let_hear_each_other(neutron, group)
        groups = [*port["security_groups"], made["group"]]
        neutron.update_port(port["id"], {"port": {"security_groups": groups}})
    except Exception as error:
        undo(neutron, made)
        if isinstance(error, neutron_exceptions.NeutronClientException):
            raise exception.CannotFork(f"no network can be made for its family: {error}") from error
        raise
    return made


def undo(neutron: Any, made: FamilyNetwork) -> None:
    """Remove one that nobody is in, as the end of something that has failed already."""
    try:
        is_removed = remove(neutron, made)
    except Exception:
        LOG.exception("What was made of a family's network is left: %s", made)
    else:
        if not is_removed:
            LOG.error("What was made of a family's network is in use, and left: %s", made)


def remove(neutron: Any, made: FamilyNetwork) -> bool:
    """Remove what there is of one, unless something is connected to it.

    :returns: whether nothing is left
    """
    gone = neutron_exceptions.NotFound
    try:
        if "network" in made and _is_used(neutron, made["network"]):
            return False
        if "subnet" in made:
            with contextlib.suppress(gone):
                neutron.remove_interface_router(made["router"], {"subnet_id": made["subnet"]})
        if "network" in made:
            with contextlib.suppress(gone):
                neutron.delete_network(made["network"])
        if "group" in made:
            with contextlib.suppress(gone):
                port = neutron.show_port(made["port"])["port"]
                groups = [one for one in port["security_groups"] if one != made["group"]]
                neutron.update_port(made["port"], {"port": {"security_groups": groups}})
            with contextlib.suppress(gone):
                neutron.delete_security_group(made["group"])
    except neutron_exceptions.Conflict:
        return False
    return True


def outsiders(neutron: Any, groups: list[str], own: str | None) -> list[str]:
    """Security groups without those of families, which are not for their parent's other clones.

    :param own: the fork that their server is a clone of, whose family it is in
    """
    if not groups:
        return []
    found = neutron.list_security_groups(id=groups)["security_groups"]
    families = {
        group["id"]
        for group in found
        if group["name"].startswith(_NAME) and group["name"] != f"{_NAME}{own}"
    }
    return [group for group in groups if group not in families]


def _router_of(neutron: Any, network: str, gateway: str | None) -> str:
    """That which is the network's gateway, or another one."""
    ports = neutron.list_ports(network_id=network)["ports"]
    routers = [port for port in ports if port["device_owner"] in _ROUTERS]
    for port in routers:
        if any(fixed["ip_address"] == gateway for fixed in port["fixed_ips"]):
            return str(port["device_id"])
    if routers:
        return str(routers[0]["device_id"])
    raise exception.CannotFork(
        "its network has no router, which the network of its family would lead to"
    )


def _subnet(neutron: Any, router: str, body: dict[str, Any], space: ipaddress.IPv4Network) -> str:
    """A subnet whose addresses none behind the router has."""
    used = []
    for port in neutron.list_ports(device_id=router)["ports"]:
        for fixed in port["fixed_ips"]:
            cidr = neutron.show_subnet(fixed["subnet_id"])["subnet"]["cidr"]
            used.append(ipaddress.ip_network(cidr))
    for candidate in space.subnets(new_prefix=max(space.prefixlen, _PREFIX)):
        if not any(candidate.version == one.version and candidate.overlaps(one) for one in used):
            request = {**body, "ip_version": 4, "cidr": str(candidate)}
            return str(neutron.create_subnet({"subnet": request})["subnet"]["id"])
    raise exception.CannotFork("its router leads to as many families' networks as there can be")


def _let_hear_each_other(neutron: Any, group: dict[str, Any]) -> None:
    """The members of a group, and nobody else: a new one has rules for what they send only."""
    rule = {
        **{"security_group_id": group["id"], "remote_group_id": group["id"]},
        **{"direction": "ingress", "ethertype": "IPv4", "tenant_id": group["tenant_id"]},
    }
    neutron.create_security_group_rule({"security_group_rule": rule})


def _is_used(neutron: Any, network: str) -> bool:
    ports = neutron.list_ports(network_id=network)["ports"]
    return not all(port["device_owner"].startswith("network:") for port in ports)
