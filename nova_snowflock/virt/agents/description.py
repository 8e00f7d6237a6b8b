# SPDX-License-Identifier: Apache-2.0
"""Who a server is, as its guest's agent is told: docs/guest.rst, ``you``."""

import base64
from collections.abc import Mapping
import ipaddress
import secrets
import time
from typing import Any

from nova import objects

from nova_snowflock.guest import protocol
from nova_snowflock.virt import identity
from nova_snowflock.virt import marks
from nova_snowflock.virt import rpc

_ENTROPY = 32


def you(instance: objects.Instance, network_info: Any) -> protocol.Message:
    """The message.

    :param instance: with its metadata and system metadata
    :param network_info: Nova's, of its network interfaces
    """
    known = instance.system_metadata
    params = marks.params(instance.metadata)
    by_agent = known.get(rpc.IDENTITY) == identity.AGENT
    return {
        "type": "you",
        "version": protocol.VERSION,
        "server": instance.uuid,
        "name": instance.hostname,
        "time": time.time(),
        "fork": known.get(rpc.FORK),
        "parent": known.get(rpc.PARENT),
        "clone_id": int(known.get(rpc.CLONE_ID, 0)),
        "params": marks.for_hooks(params),
        "request": params.get(marks.REQUEST),
        "network": "agent" if by_agent else "auto",
        "interfaces": interfaces(network_info),
        "entropy": base64.b64encode(secrets.token_bytes(_ENTROPY)).decode(),
    }


def interfaces(network_info: Any) -> list[dict[str, Any]]:
    """A server's network interfaces, in order, as in ``you``."""
    return [_interface(vif) for vif in network_info]


def _interface(vif: Mapping[str, Any]) -> dict[str, Any]:
    network = vif["network"]
    found: dict[str, Any] = {
        "mac": vif["address"],
        "mtu": (network.get("meta") or {}).get("mtu"),
        "addresses": [],
        "gateways": [],
        "routes": [],
        "dns": [],
        "dhcp": False,
    }
    for subnet in network["subnets"]:
        prefix = ipaddress.ip_network(subnet["cidr"]).prefixlen
        found["addresses"] += [f"{ip['address']}/{prefix}" for ip in subnet["ips"]]
        gateway = subnet.get("gateway")
        if gateway and gateway["address"]:
            found["gateways"].append(gateway["address"])
        found["routes"] += [
            {"to": str(route["cidr"]), "via": route["gateway"]["address"]}
            for route in subnet.get("routes") or ()
        ]
        found["dns"] += [server["address"] for server in subnet.get("dns") or ()]
        found["dhcp"] |= bool((subnet.get("meta") or {}).get("enable_dhcp"))
    return found
