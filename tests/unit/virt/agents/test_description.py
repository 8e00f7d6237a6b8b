# SPDX-License-Identifier: Apache-2.0
"""What a guest is told of itself."""

import base64
import ipaddress
import json
import time
from typing import Any

from nova import objects
from nova.network import model
import pytest

from nova_snowflock.virt import identity
from nova_snowflock.virt import marks
from nova_snowflock.virt import rpc
from nova_snowflock.virt.agents import description
from tests.unit.virt.agents.world import server

FORK = "ffffffff-0000-4000-8000-000000000001"
PARENT = "11111111-1111-4111-8111-111111111111"


def subnet(cidr: str, address: str, gateway: str | None, **more: Any) -> model.Subnet:
    ip = model.FixedIP(address=address)
    ip.add_floating_ip(model.IP(address="203.0.113.9", type="floating"))
    return model.Subnet(
        cidr=cidr,
        ips=[ip],
        gateway=model.IP(address=gateway) if gateway else None,
        **more,
    )


def interface(*subnets: model.Subnet, mtu: int | None = 1442) -> model.VIF:
    meta = {} if mtu is None else {"mtu": mtu}
    network = model.Network(id="n", bridge="b", label="net", subnets=list(subnets), **meta)
    return model.VIF(id="v", address="fa:16:3e:00:00:01", network=network)


NETWORK = model.NetworkInfo(
    [
        interface(
            subnet(
                "192.0.2.0/24",
                "192.0.2.7",
                "192.0.2.1",
                dns=[model.IP(address="192.0.2.53")],
                enable_dhcp=True,
                routes=[
                    model.Route(cidr="198.51.100.0/24", gateway=model.IP(address="192.0.2.254"))
                ],
            ),
            subnet("2001:db8::/64", "2001:db8::7", "2001:db8::1", enable_dhcp=False),
        ),
        interface(subnet("10.0.0.0/8", "10.0.0.7", None), mtu=None),
    ]
)


def test_interfaces() -> None:
    assert description.interfaces(NETWORK) == [
        {
            "mac": "fa:16:3e:00:00:01",
            "mtu": 1442,
            "addresses": ["192.0.2.7/24", "2001:db8::7/64"],
            "gateways": ["192.0.2.1", "2001:db8::1"],
            "routes": [{"to": "198.51.100.0/24", "via": "192.0.2.254"}],
            "dns": ["192.0.2.53"],
            "dhcp": True,
        },
        {
            "mac": "fa:16:3e:00:00:01",
            "mtu": None,
            "addresses": ["10.0.0.7/8"],
            "gateways": [],
            "routes": [],
            "dns": [],
            "dhcp": False,
        },
    ]


def test_interfaces_as_nova_keeps_them() -> None:
    """In its database, as JSON."""
    again = model.NetworkInfo.hydrate(NETWORK.json())
    assert description.interfaces(again) == description.interfaces(NETWORK)


def test_networks_without_addresses() -> None:
    [found] = description.interfaces(model.NetworkInfo([interface()]))
    assert (found["addresses"], found["gateways"]) == ([], [])
    assert description.interfaces(model.NetworkInfo([])) == []


def test_you() -> None:
    before = time.time()
    one = server()
    you = description.you(one, NETWORK)
    assert before <= you.pop("time") <= time.time()
    assert len(base64.b64decode(you.pop("entropy"), validate=True)) == 32
    assert you == {
        "type": "you",
        "version": 1,
        "server": one.uuid,
        "name": "a-name",
        "fork": None,
        "parent": None,
        "clone_id": 0,
        "params": {},
        "request": None,
        "network": "auto",
        "interfaces": description.interfaces(NETWORK),
    }


def test_entropy_is_new() -> None:
    one = server()
    assert len({description.you(one, [])["entropy"] for _ in range(10)}) == 10


def clone(params: dict[str, str], way: str) -> objects.Instance:
    return server(
        metadata={**marks.of(FORK, PARENT, params), "else": "x"},
        known={rpc.FORK: FORK, rpc.PARENT: PARENT, rpc.CLONE_ID: "3", rpc.IDENTITY: way},
    )


@pytest.mark.parametrize(
    ("way", "network"),
    [(identity.AGENT, "agent"), (identity.HOTPLUG, "auto"), (identity.NONE, "auto")],
)
def test_you_are_a_clone(way: str, network: str) -> None:
    you = description.you(clone({"a": "b", marks.REQUEST: "r"}, way), NETWORK)
    assert (you["fork"], you["parent"], you["clone_id"]) == (FORK, PARENT, 3)
    assert you["params"] == {"a": "b"}
    assert you["request"] == "r"
    assert you["network"] == network


def test_you_can_be_sent() -> None:
    you = description.you(clone({"\N{SNOWFLAKE}": "\0"}, identity.AGENT), NETWORK)
    assert json.loads(json.dumps(you)) == you
    for found in you["interfaces"]:
        for address in found["addresses"]:
            ipaddress.ip_interface(address)
