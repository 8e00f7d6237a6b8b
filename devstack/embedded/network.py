# SPDX-License-Identifier: Apache-2.0
"""The cloud's networks, in a network namespace of their own.

The namespace holds the control plane's services and three bridges: `management` (the services'
address, the hosts' eth1, and a veth to the machine, for clients), `underlay` (the hosts' eth0),
which passes multicast and large frames, and `data` (the hosts' data0), which carries the servers'
networks. A second namespace is the world outside of the cloud, on the `data` bridge as whoever is
at the provider's network. A file keeps a namespace, so it needs no process.
"""

from collections.abc import Iterator
import json
import pathlib
import subprocess

from devstack.embedded import processes
from devstack.embedded import settings

NAMESPACE = settings.RUN / "network"
OUTSIDE = settings.RUN / "outside"
CLIENT_LINK = "snowflock-cloud"
DATA_LINK = "data0"
"""A host's interface to the servers' networks; it has no address."""

_LINKS = {"eth0": "underlay", "eth1": "management", DATA_LINK: "data"}


def exists(namespace: pathlib.Path = NAMESPACE) -> bool:
    if not namespace.is_file():
        return False
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        return any(line.split()[1] == str(namespace) for line in mounts)


def up() -> None:
    """Make what is missing of the namespaces and bridges."""
    for namespace in (NAMESPACE, OUTSIDE):
        if not exists(namespace):
            namespace.touch()
            subprocess.run(["unshare", f"--net={namespace}", "true"], check=True)
    for bridge in _LINKS.values():
        if bridge not in links(NAMESPACE):
            # It floods multicast: else somebody would have to ask the hosts what they receive.
            ip(NAMESPACE, f"link add {bridge} type bridge mcast_snooping 0")
    if CLIENT_LINK not in links(None):
        ip(None, f"link add {CLIENT_LINK} type veth peer name client netns {NAMESPACE}")
    ip(
        NAMESPACE,
        "link set lo up",
        f"link set underlay mtu {settings.UNDERLAY_MTU} up",
        f"address replace {settings.CONTROLLER}/{settings.MANAGEMENT_PREFIX} dev management",
        "link set management up",
        "link set client master management up",
        "link set data up",
    )
    if "outside" not in links(NAMESPACE):
        ip(NAMESPACE, f"link add outside type veth peer name eth0 netns {OUTSIDE}")
    ip(NAMESPACE, "link set outside master data up")
    ip(
        OUTSIDE,
        "link set lo up",
        f"address replace {settings.PROVIDER_GATEWAY}/{settings.PROVIDER.prefixlen} dev eth0",
        "link set eth0 up",
    )
    ip(
        None,
        f"address replace {settings.CLIENT}/{settings.MANAGEMENT_PREFIX} dev {CLIENT_LINK}",
        f"link set {CLIENT_LINK} up",
    )


def join(host: str, pid: int) -> None:
    """Connect a compute host, whose network namespace is that of the process."""
    inside = pathlib.Path(f"/proc/{pid}/ns/net")
    existing = links(inside)
    for end, bridge in _LINKS.items():
        if end in existing:
            continue
        name = f"{host}-{end}"
        if name in links(NAMESPACE):
            # Of a host of that name that has ended, which the kernel removes in its own time.
            ip(NAMESPACE, f"link delete {name}")
        options = f"mtu {settings.UNDERLAY_MTU} " if bridge == "underlay" else ""
        ip(
            NAMESPACE,
            f"link add {name} {options}type veth peer name {end} {options}netns {pid}",
            f"link set {name} master {bridge} up",
        )
    address = f"{settings.management_address(host)}/{settings.MANAGEMENT_PREFIX}"
    ip(
        inside,
        "link set lo up",
        f"address replace {settings.underlay_address(host)}/24 dev eth0",
        "link set eth0 up",
        "route replace 224.0.0.0/4 dev eth0",
        f"address replace {address} dev eth1",
        "link set eth1 up",
        f"link set {DATA_LINK} up",
    )


def add_tap(name: str) -> None:
    """Have a tap in the cloud's namespace for a machine in the management network."""
    if name not in links(NAMESPACE):
        ip(NAMESPACE, f"tuntap add {name} mode tap")
    ip(NAMESPACE, f"link set {name} master management up")


def inhabitants() -> Iterator[int]:
    """Processes in the cloud's namespaces."""
    for namespace in (NAMESPACE, OUTSIDE):
        if exists(namespace):
            yield from processes.inhabitants(namespace)


def down() -> None:
    """Remove it all. Whatever still runs in the namespace keeps it from going."""
    if CLIENT_LINK in links(None):
        ip(None, f"link delete {CLIENT_LINK}")
    for namespace in (OUTSIDE, NAMESPACE):
        if exists(namespace):
            subprocess.run(["umount", namespace], check=True)
        namespace.unlink(missing_ok=True)


def links(namespace: pathlib.Path | None) -> set[str]:
    """Names of the interfaces."""
    argv = [*processes.enter(namespace), "ip", "-json", "link", "show"]
    listing = subprocess.run(argv, check=True, capture_output=True, text=True).stdout
    return {link["ifname"] for link in json.loads(listing)}


def ip(namespace: pathlib.Path | None, *commands: str) -> None:
    """Run `ip` commands."""
    argv = [*processes.enter(namespace), "ip", "-batch", "-"]
    batch = "\n".join(commands)
    done = subprocess.run(argv, input=batch, capture_output=True, text=True, check=False)
    if done.returncode:
        raise processes.CloudError(f"{done.stderr.strip()}, in:\n{batch}")
