# SPDX-License-Identifier: Apache-2.0
"""A family's network is made whole, or not at all."""

import ipaddress
from typing import Any

from neutronclient.common import exceptions as neutron_exceptions
import pytest

from nova_snowflock import exception
from nova_snowflock import family_network

FORK = "8d0f2f7e-33f9-4f4f-a6a4-1f5f6f0e4c55"
PARENT = "c6f7a3a5-96a0-4a8e-8f2c-5a8f0f1d2b3c"
SPACE = ipaddress.IPv4Network("10.240.0.0/22")


class Neutron:
    """As much of the service as is asked for."""

    def __init__(self) -> None:
        self.fails_at = ""
        self.networks: dict[str, dict[str, Any]] = {"n": {}}
        self.subnets: dict[str, dict[str, Any]] = {
            "s": {
                **{"cidr": "10.240.0.0/25", "ip_version": 4, "gateway_ip": "10.240.0.1"},
                "dns_nameservers": ["10.255.255.53"],
            }
        }
        self.groups: dict[str, list[dict[str, Any]]] = {}
        self.ports = [
            port("p", "n", "compute:nova", PARENT, "s", "default"),
            port("other", "n", "network:router_interface", "elsewhere", "s", at="10.240.0.9"),
            port("r", "n", "network:router_interface", "router", "s", at="10.240.0.1"),
        ]

    def _may(self, name: str) -> None:
        if name == self.fails_at:
            raise neutron_exceptions.OverQuotaClient(message="Quota exceeded")

    def list_ports(self, **wanted: str) -> dict[str, Any]:
        found = [one for one in self.ports if wanted.items() <= one.items()]
        return {"ports": found}

    def show_port(self, identity: str) -> dict[str, Any]:
        for one in self.ports:
            if one["id"] == identity:
                return {"port": one}
        raise neutron_exceptions.PortNotFoundClient(port_id=identity)

    def update_port(self, identity: str, body: dict[str, Any]) -> None:
        self._may("update_port")
        self.show_port(identity)["port"].update(body["port"])

    def show_subnet(self, identity: str) -> dict[str, Any]:
        return {"subnet": self.subnets[identity]}

    def create_network(self, body: dict[str, Any]) -> dict[str, Any]:
        self._may("create_network")
        self.networks["own"] = body["network"]
        return {"network": {"id": "own", **body["network"]}}

    def create_subnet(self, body: dict[str, Any]) -> dict[str, Any]:
        self._may("create_subnet")
        self.subnets["inner"] = body["subnet"]
        return {"subnet": {"id": "inner", **body["subnet"]}}

    def add_interface_router(self, router: str, body: dict[str, Any]) -> None:
        self._may("add_interface_router")
        self.ports.append(port("i", "own", "network:router_interface", router, body["subnet_id"]))

    def remove_interface_router(self, router: str, body: dict[str, Any]) -> None:
        if not any(one["id"] == "i" for one in self.ports):
            raise neutron_exceptions.NotFound(message="no such interface")
        self.ports = [one for one in self.ports if one["id"] != "i"]

    def delete_network(self, identity: str) -> None:
        if identity not in self.networks:
            raise neutron_exceptions.NetworkNotFoundClient(net_id=identity)
        del self.networks[identity]
        self.subnets.pop("inner", None)

    def create_security_group(self, body: dict[str, Any]) -> dict[str, Any]:
        self._may("create_security_group")
        self.groups["g"] = []
        return {"security_group": {"id": "g", **body["security_group"]}}

    def list_security_groups(self, id: list[str]) -> dict[str, Any]:
        named = {"g": f"snowflock-{FORK}", "default": "default"}
        return {"security_groups": [{"id": one, "name": named[one]} for one in id]}

    def create_security_group_rule(self, body: dict[str, Any]) -> None:
        self._may("create_security_group_rule")
        self.groups["g"].append(body["security_group_rule"])

    def delete_security_group(self, identity: str) -> None:
        if identity not in self.groups:
            raise neutron_exceptions.NotFound(message="no such group")
        assert all(identity not in one["security_groups"] for one in self.ports)
        del self.groups[identity]

    def state(self) -> Any:
        ports = [(one["id"], one["security_groups"]) for one in self.ports]
        return sorted(self.networks), sorted(self.subnets), self.groups, ports


def port(
    identity: str,
    network: str,
    owner: str,
    device: str,
    subnet: str,
    *groups: str,
    at: str = "10.240.0.7",
) -> dict[str, Any]:
    return {
        **{"id": identity, "network_id": network, "device_owner": owner, "device_id": device},
        **{"fixed_ips": [{"subnet_id": subnet, "ip_address": at}], "security_groups": list(groups)},
    }


def make(neutron: Neutron, space: ipaddress.IPv4Network = SPACE) -> family_network.FamilyNetwork:
    return family_network.make(neutron, FORK, PARENT, "demo", space)


def test_made_and_removed() -> None:
    neutron = Neutron()
    before = neutron.state()
    made = make(neutron)
    # The first that the router does not lead to yet.
    assert neutron.subnets["inner"]["cidr"] == "10.240.1.0/24"
    assert neutron.subnets["inner"]["dns_nameservers"] == ["10.255.255.53"]
    assert neutron.networks["own"]["tenant_id"] == "demo"
    assert made["router"] == "router"
    assert neutron.ports[0]["security_groups"] == ["default", "g"]
    [rule] = neutron.groups["g"]
    assert rule["remote_group_id"] == rule["security_group_id"] == "g"
    assert rule["direction"] == "ingress"
    assert family_network.remove(neutron, made)
    assert neutron.state() == before
    assert family_network.remove(neutron, made)


@pytest.mark.parametrize(
    "step",
    [
        *("create_network", "create_subnet", "add_interface_router", "create_security_group"),
        *("create_security_group_rule", "update_port"),
    ],
)
def test_nothing_is_left_of_a_failure(step: str) -> None:
    neutron = Neutron()
    before = neutron.state()
    neutron.fails_at = step
    with pytest.raises(exception.CannotFork, match="Quota exceeded"):
        make(neutron)
    neutron.fails_at = ""
    assert neutron.state() == before


def test_stays_while_somebody_is_in_it() -> None:
    neutron = Neutron()
    made = make(neutron)
    clone = port("c", "own", "compute:nova", "clone", "inner", "g")
    neutron.ports.append(clone)
    before = neutron.state()
    assert not family_network.remove(neutron, made)
    assert neutron.state() == before
    neutron.ports.remove(clone)
    # Nor does it matter that the parent is gone.
    del neutron.ports[0]
    assert family_network.remove(neutron, made)
    assert "own" not in neutron.networks
    assert neutron.groups == {}


@pytest.mark.parametrize(
    ("owner", "reason"),
    [("compute:nova", "0 network interfaces"), ("network:router_interface", "no router")],
)
def test_refusals(owner: str, reason: str) -> None:
    neutron = Neutron()
    neutron.ports = [one for one in neutron.ports if one["device_owner"] != owner]
    before = neutron.state()
    with pytest.raises(exception.CannotFork, match=reason):
        make(neutron)
    assert neutron.state() == before


def test_families_keep_to_themselves() -> None:
    """Other clones of their parent are not in them; clones of theirs are."""
    neutron = Neutron()
    make(neutron)
    groups = neutron.ports[0]["security_groups"]
    assert family_network.outsiders(neutron, groups, None) == ["default"]
    assert family_network.outsiders(neutron, groups, PARENT) == ["default"]
    assert family_network.outsiders(neutron, groups, FORK) == ["default", "g"]
    assert family_network.outsiders(neutron, [], None) == []


def test_neutron_that_goes_away() -> None:
    """The reason is said, not what came of it."""
    neutron = Neutron()
    neutron.fails_at = "add_interface_router"
    neutron.delete_network = None  # type: ignore[method-assign,assignment]
    with pytest.raises(exception.CannotFork, match="Quota exceeded"):
        make(neutron)


def test_no_addresses_left() -> None:
    neutron = Neutron()
    before = neutron.state()
    with pytest.raises(exception.CannotFork, match="as many families' networks"):
        make(neutron, ipaddress.IPv4Network("10.240.0.0/24"))
    assert neutron.state() == before
