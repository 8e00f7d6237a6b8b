# SPDX-License-Identifier: Apache-2.0
"""The cloud's networks, in a network namespace of their own.

The namespace holds the control plane's services and two bridges: `management` (the services'
address, the hosts' eth1, and a veth to the machine, for clients) and `underlay` (the hosts' eth0),
which passes multicast and large frames. A file keeps the namespace, so it needs no process.
"""

from collections.abc import Iterator
import json
import pathlib
import subprocess

from devstack.embedded import processes
from devstack.embedded import settings

NAMESPACE = settings.RUN / "network"
CLIENT_LINK = "snowflock-cloud"


def exists() -> bool:
    return NAMESPACE.is_file() and NAMESPACE.stat().st_size == 0 and _is_mount()


def _is_mount() -> bool:
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        return any(line.split()[1] == str(NAMESPACE) for line in mounts)


def up() -> None:
    """Make what is missing of the namespace and its bridges."""
    if not exists():
        NAMESPACE.touch()
        subprocess.run(["unshare", f"--net={NAMESPACE}", "true"], check=True)
    for bridge in ("underlay", "management"):
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
    )
    ip(
        None,
        f"address replace {settings.CLIENT}/{settings.MANAGEMENT_PREFIX} dev {CLIENT_LINK}",
        f"link set {CLIENT_LINK} up",
    )


def join(host: str, pid: int) -> None:
    """Connect a compute host, whose network namespace is that of the process."""
    inside = pathlib.Path(f"/proc/{pid}/ns/net")
    mtu = settings.UNDERLAY_MTU
    existing = links(inside)
    for end, name, bridge in (("eth0", host, "underlay"), ("eth1", f"{host}m", "management")):
        if end in existing:
            continue
        if name in links(NAMESPACE):
            # Of a host of that name that has ended, which the kernel removes in its own time.
            ip(NAMESPACE, f"link delete {name}")
        options = f"mtu {mtu} " if bridge == "underlay" else ""
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
    )


def inhabitants() -> Iterator[int]:
    """Processes in the cloud's namespace."""
    return processes.inhabitants(NAMESPACE) if exists() else iter(())


def down() -> None:
    """Remove it all. Whatever still runs in the namespace keeps it from going."""
    if CLIENT_LINK in links(None):
        ip(None, f"link delete {CLIENT_LINK}")
    if exists():
        subprocess.run(["umount", NAMESPACE], check=True)
    NAMESPACE.unlink(missing_ok=True)


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
