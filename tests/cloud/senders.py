# SPDX-License-Identifier: Apache-2.0
"""Who sends: ``python -m tests.cloud.senders LINK...`` watches network interfaces.

Says ``watching`` when it does, and at the end of a line on standard input the MAC and IPv4
addresses of all that it heard from their other ends, each on a line.
"""

import select
import socket
import struct
import sys

ALL = 0x0003  # linux/if_ether.h, ETH_P_ALL
VLAN, IPV4, ARP = 0x8100, 0x0800, 0x0806


def senders(frame: bytes) -> set[str]:
    """The addresses that a frame says it is from."""
    found = {frame[6:12].hex(":")}
    offset = 12
    (kind,) = struct.unpack_from("!H", frame, offset)
    if kind == VLAN:
        offset += 4
        (kind,) = struct.unpack_from("!H", frame, offset)
    header = frame[offset + 2 :]
    if kind == IPV4:
        found.add(socket.inet_ntoa(header[12:16]))
    elif kind == ARP:
        found |= {header[8:14].hex(":"), socket.inet_ntoa(header[14:18])}
    return found


def main() -> None:
    found: set[str] = set()
    watching = []
    for link in sys.argv[1:]:
        one = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL))
        one.bind((link, ALL))
        watching.append(one)
    print("watching", flush=True)
    while True:
        readable, _, _ = select.select([sys.stdin, *watching], [], [])
        for one in watching:
            if one in readable:
                frame, (_, _, kind, *_) = one.recvfrom(1 << 16)
                # What the bridge sends to the host is not the host's.
                if kind != socket.PACKET_OUTGOING:
                    found |= senders(frame)
        if sys.stdin in readable:
            print("\n".join(sorted(found)))
            return


if __name__ == "__main__":
    main()
