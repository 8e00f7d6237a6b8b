# SPDX-License-Identifier: Apache-2.0
"""Who sends: MAC and IPv4 addresses on the wire.

``python -m tests.cloud.senders LINK...`` watches network interfaces. It says ``watching`` when it
does, and at the end of a line on standard input the addresses of all that it heard from their other
ends, each on a line.
"""

from collections.abc import Iterator
import contextlib
import select
import socket
import struct
import subprocess
import sys

from devstack.embedded import network
from devstack.embedded import processes
from devstack.embedded import settings

ALL = 0x0003  # linux/if_ether.h, ETH_P_ALL
VLAN, IPV4, ARP = 0x8100, 0x0800, 0x0806


@contextlib.contextmanager
def watched(*names: str) -> Iterator[set[str]]:
    """MAC and IPv4 addresses of the senders of all that these hosts send to the servers' networks;
    complete when the context has ended."""
    seen: set[str] = set()
    links = [f"{name}-{network.DATA_LINK}" for name in names]
    with subprocess.Popen(
        [*processes.enter(network.NAMESPACE), sys.executable, "-m", "tests.cloud.senders", *links],
        cwd=settings.REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline() == "watching\n"
        yield seen
        said, _ = watching.communicate("enough\n", timeout=60)
        assert watching.returncode == 0
        seen.update(said.split())


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
