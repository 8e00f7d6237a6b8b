# SPDX-License-Identifier: Apache-2.0
"""What a config drive has for an interface without DHCP: ``python3 static.py FILE MAC``.

FILE is network_data.json, of which this says the addresses, each with its network's mask.
"""

import json
import sys


def main(path: str, mac: str) -> None:
    with open(path, encoding="utf-8") as file:
        told = json.load(file)
    links = {link["id"] for link in told["links"] if link["ethernet_mac_address"] == mac}
    for network in told["networks"]:
        if network["link"] in links and network["type"] in ("ipv4", "ipv6"):
            # Of IPv6, the mask comes with the address.
            mask = f"/{network['netmask']}" if network["type"] == "ipv4" else ""
            print(f"{network['ip_address']}{mask}")


if __name__ == "__main__":
    main(*sys.argv[1:])
