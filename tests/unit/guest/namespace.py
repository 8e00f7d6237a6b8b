# SPDX-License-Identifier: Apache-2.0
"""Configures interfaces in a network namespace of its own. Run by test_network.py.

Two pairs of interfaces, of which the guest's ends have the MACs that it is told; it says what has
become of them, and what came to the other ends.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from typing import Any

from nova_snowflock.guest import network

IP = "/usr/sbin/ip"
ETH_P_ALL = 3


def ip(*argv: str) -> None:
    subprocess.run((IP, *argv), check=True)


def listed(*argv: str) -> Any:
    return json.loads(subprocess.run((IP, "-j", *argv), check=True, stdout=subprocess.PIPE).stdout)


def listen(name: str) -> socket.socket:
    listening = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    listening.bind((name, ETH_P_ALL))
    listening.setblocking(False)
    return listening


def frames(listening: socket.socket) -> list[str]:
    """All that have come: on such a pair they arrive while they are sent."""
    found = []
    while True:
        try:
            found.append(listening.recv(65536).hex())
        except BlockingIOError:
            return found
        except OSError as error:
            # Once, if the interface is down.
            if error.errno != errno.ENETDOWN:
                raise


def read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()


def main() -> None:
    told = json.load(sys.stdin)
    names = []
    for number, interface in enumerate(told["before"]):
        name, peer = f"guest{number}", f"host{number}"
        ip("link", "add", name, "address", interface["mac"], "type", "veth", "peer", "name", peer)
        ip("link", "set", "dev", peer, "up")
        ip("link", "set", "dev", name, "up")
        for address in interface["addresses"]:
            ip("address", "add", address, "dev", name)
        names.append(name)
    for argv in told.get("setup", []):
        subprocess.run(argv, check=True)
    devices, problems = network.configure(told["before"], told["after"])
    sockets = [listen(f"host{number}") for number in range(len(names))]
    announced = network.announce(devices)
    settled: list[str] = []
    for argv in told.get("taken", []):
        subprocess.run(argv, check=True)
    if "taken" in told:
        network.settle(devices, settled, seconds=0.1)
    json.dump(
        {
            "names": [device.name for device in devices],
            "problems": problems,
            "announced": announced,
            "missing": network.missing(told["after"]),
            "settled": settled,
            "addresses": {one["ifname"]: one for one in listed("address")},
            "routes": listed("-4", "route"),
            "routes6": listed("-6", "route"),
            "accept_dad": [read(f"/proc/sys/net/ipv6/conf/{name}/accept_dad") for name in names],
            "frames": [frames(listening) for listening in sockets],
        },
        sys.stdout,
    )


if __name__ == "__main__":
    os.environ["LC_ALL"] = "C"
    main()
