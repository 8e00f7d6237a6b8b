# SPDX-License-Identifier: Apache-2.0
"""The addresses of a clone's network interfaces, in place of its parent's.

With the command ``ip`` of iproute2 or of busybox, and what both of them know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
import contextlib
import glob
import ipaddress
import os
import re
import socket
import struct
import time
from typing import Any, NamedTuple, Union

from nova_snowflock.guest import dhcp
from nova_snowflock.guest import execute
from nova_snowflock.guest import protocol
from nova_snowflock.guest import textfile

# Values, which older Pythons cannot write in another way.
Address = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]  # noqa: UP007
AddressOnLink = Union[ipaddress.IPv4Interface, ipaddress.IPv6Interface]  # noqa: UP007
Network = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]  # noqa: UP007

_MAC = re.compile(r"[0-9a-f]{2}(?::[0-9a-f]{2}){5}")
_MTU = range(68, 65536)
# What the kernel gives routes of IPv6 by itself, and the least of IPv4 that is not the first.
_METRICS = {4: 100, 6: 1024}
_METADATA = "169.254.169.254"
_ETH_P_ARP = 0x0806
_ARP_REQUEST, _ARP_REPLY = 1, 2
_NEIGHBOUR_ADVERTISEMENT = 136
_OVERRIDE = 1 << 29
_TARGET_LINK_ADDRESS = 2
_LINK_SECONDS = 2.0
_SETTLE_SECONDS = 10.0
_LISTED = re.compile(r"^\s+inet6? (\S+)", re.MULTILINE)
_LOOK_AGAIN = 0.02
_LEASES = (
    "var/lib/dhcp/*.leases",
    "var/lib/dhclient/*.lease*",
    "var/lib/dhcpcd/*.lease",
    "run/systemd/netif/leases/*",
    "var/lib/NetworkManager/*.lease",
)


class Interface(NamedTuple):
    """What the host says of an interface."""

    mac: str
    mtu: int | None
    addresses: tuple[AddressOnLink, ...]
    gateways: tuple[Address, ...]
    routes: tuple[tuple[Network, Address], ...]
    dns: tuple[Address, ...]
    dhcp: bool


class Device(NamedTuple):
    """An interface, and what the kernel calls it."""

    name: str
    interface: Interface


def mac_of(message: protocol.Message) -> str:
    """The MAC of an interface of a message, in lower case.

    :raises ValueError: it has none
    """
    mac = message.get("mac") if isinstance(message, dict) else None
    if not isinstance(mac, str) or not _MAC.fullmatch(mac.lower()):
        raise ValueError(f"the host told a MAC that is none: {mac!r}")
    return mac.lower()


def parse(message: protocol.Message) -> Interface:
    """An interface of a message.

    :raises ValueError: something of it makes no sense
    """
    mac, mtu = mac_of(message), message.get("mtu")
    if mtu is not None and (not isinstance(mtu, int) or mtu not in _MTU):
        raise ValueError(f"the host told an MTU that is none: {mtu!r}")
    try:
        routes = [(route["to"], route["via"]) for route in message.get("routes") or ()]
        texts = {
            name: [_text(one) for one in message.get(name) or ()]
            for name in ("addresses", "gateways", "dns")
        }
        return Interface(
            mac,
            mtu,
            tuple(ipaddress.ip_interface(text) for text in texts["addresses"]),
            tuple(ipaddress.ip_address(text) for text in texts["gateways"]),
            tuple(
                (ipaddress.ip_network(_text(to), strict=False), ipaddress.ip_address(_text(via)))
                for to, via in routes
            ),
            tuple(ipaddress.ip_address(text) for text in texts["dns"]),
            bool(message.get("dhcp")),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"what the host told of {mac} makes no sense: {error!r}") from error


def _text(value: Any) -> str:
    # The module takes numbers for addresses, too; and zones, which are no business of the host.
    if not isinstance(value, str) or "%" in value:
        raise ValueError(f"the host told an address that is none: {value!r}")
    return value


def names_by_mac(root: str = "/") -> dict[str, str]:
    """What the kernel calls the interface with each MAC."""
    found: dict[str, str] = {}
    for directory in sorted(glob.glob(os.path.join(glob.escape(root), "sys/class/net/*"))):
        name = os.path.basename(directory)
        try:
            with open(os.path.join(directory, "address"), encoding="ascii") as file:
                mac = file.read().strip().lower()
        except (FileNotFoundError, NotADirectoryError):
            continue  # unplugged just now, or no interface
        # What is built on top of an interface (VLANs, bridges) often has its MAC as well.
        if mac not in found or os.path.exists(os.path.join(directory, "device")):
            found[mac] = name
    return found


def configure(
    before: Sequence[protocol.Message], after: Sequence[protocol.Message], root: str = "/"
) -> tuple[list[Device], list[str]]:
    """Give interfaces the MACs and addresses that they must have now.

    :param before: the parent's interfaces as the host told them; the n-th is the clone's n-th
    :returns: those that are there, and a sentence for each step that failed
    """
    problems: list[str] = []
    devices: list[Device] = []
    names = names_by_mac(root)
    for number, message in enumerate(after):
        try:
            interface = parse(message)
            old = mac_of(before[number]) if number < len(before) else interface.mac
            if old not in names and interface.mac not in names:
                raise ValueError(f"no interface has the MAC {old}")
            devices.append(Device(names.get(old) or names[interface.mac], interface))
        except ValueError as error:
            problems.append(f"Interface {number} was not configured: {error}.")
    attempt = _Attempt(problems)
    metadata = {device.name: _metadata_gateway(device) for device in devices}
    # All at once: one may get the MAC that another has yet.
    for device in devices:
        attempt("ip", "link", "set", "dev", device.name, "down")
    for device in devices:
        attempt("ip", "link", "set", "dev", device.name, "address", device.interface.mac)
    routes = _routes(devices)
    for device in devices:
        with _without_detection(device.name, root, problems):
            _readdress(device, attempt, root)
            for command in routes[device.name]:
                attempt(*command)
            via = metadata[device.name]
            if via is not None:
                attempt("ip", "route", "replace", _METADATA, "via", via, "dev", device.name)
    _resolve(devices, root, problems)
    _drop_leases(root, problems)
    return devices, problems


def _metadata_gateway(device: Device) -> str | None:
    """The way to the metadata service that DHCP gave the parent, if the clone has it, too."""
    try:
        routes = execute.run("ip", "route", "show", _METADATA, "dev", device.name)
    except execute.CommandFailed:
        return None
    found = re.search(r"\bvia ([0-9.]+)", routes)
    if found is None:
        return None
    via = ipaddress.ip_address(found[1])
    near = any(via in address.network for address in device.interface.addresses)
    return str(via) if near else None


class _Attempt:
    """Runs commands, and keeps what went wrong."""

    def __init__(self, problems: list[str]) -> None:
        self._problems = problems

    def __call__(self, *argv: str) -> None:
        try:
            execute.run(*argv)
        except execute.CommandFailed as error:
            self._problems.append(f"{error}.")


def _readdress(device: Device, attempt: Callable[..., None], root: str) -> None:
    name, interface = device
    if interface.mtu is not None:
        attempt("ip", "link", "set", "dev", name, "mtu", str(interface.mtu))
    attempt("ip", "-4", "address", "flush", "dev", name)
    if os.path.isdir(os.path.join(root, "proc/sys/net/ipv6")):
        attempt("ip", "-6", "address", "flush", "dev", name, "scope", "global")
    attempt("ip", "link", "set", "dev", name, "up")
    for address in interface.addresses:
        _add_address(name, address, attempt)


def _add_address(name: str, address: AddressOnLink, attempt: Callable[..., None]) -> None:
    # The kernel has no broadcast address of IPv4 but what it is told.
    broadcast = ("brd", "+") if address.version == 4 and address.network.prefixlen < 31 else ()
    attempt("ip", "address", "add", str(address), *broadcast, "dev", name)


def _routes(devices: Sequence[Device]) -> dict[str, list[tuple[str, ...]]]:
    """The commands that make each device's routes, whether they are there or not."""
    defaults = {4: 0, 6: 0}
    commands: dict[str, list[tuple[str, ...]]] = {}
    for name, interface in devices:
        commands[name] = [
            ("ip", f"-{to.version}", "route", "replace", str(to), "via", str(via), "dev", name)
            for to, via in interface.routes
        ]
        for via in interface.gateways:
            # One without a metric would replace that of the interface before.
            earlier = defaults[via.version]
            metric = ("metric", str(_METRICS[via.version] + earlier)) if earlier else ()
            replace = ("ip", f"-{via.version}", "route", "replace", "default", "via", str(via))
            commands[name].append((*replace, "dev", name, *metric))
            defaults[via.version] += 1
    return commands


@contextlib.contextmanager
def _without_detection(name: str, root: str, problems: list[str]) -> Iterator[None]:
    """Have no duplicates of an interface's IPv6 addresses looked for: there is no link to do so.

    Addresses would stay tentative until there is one, and a second longer.
    """
    before: dict[str, str] = {}
    for which in ("all", name):  # the greater of both holds
        path = os.path.join(root, "proc/sys/net/ipv6/conf", which, "accept_dad")
        if os.path.exists(path):
            try:
                with open(path, encoding="ascii") as file:
                    value = file.read()
                _write(path, "0")
                before[path] = value
            except OSError as error:
                problems.append(f"IPv6 addresses of {name} take a second more: {error}.")
    try:
        yield
    finally:
        for path, value in before.items():
            try:
                _write(path, value)
            except OSError as error:
                problems.append(f"{name} does not look for duplicate addresses now: {error}.")


def _write(path: str, text: str) -> None:
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def _resolve(devices: Sequence[Device], root: str, problems: list[str]) -> None:
    servers: list[str] = []
    for device in devices:
        servers += [str(one) for one in device.interface.dns if str(one) not in servers]
    path = os.path.join(root, "etc/resolv.conf")
    # A symbolic link is to the file of a service that looks after it.
    if not servers or not textfile.is_regular(path):
        return
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            kept = [line.strip() for line in file if not line.startswith("nameserver")]
        lines = [*kept, *(f"nameserver {server}" for server in servers)]
        textfile.replace(path, "".join(f"{line}\n" for line in lines if line))
    except (OSError, ValueError) as error:
        problems.append(f"The name servers were not set: {error}.")


def _drop_leases(root: str, problems: list[str]) -> None:
    for pattern in _LEASES:
        for path in glob.glob(os.path.join(glob.escape(root), pattern)):
            try:
                os.unlink(path)
            except OSError as error:
                problems.append(f"The parent's DHCP lease is there yet: {error}.")


def missing(after: Sequence[protocol.Message], root: str = "/") -> list[str]:
    """A sentence for each interface that nothing here has the MAC of."""
    names = names_by_mac(root)
    wanted = [mac_of(message) for message in after]
    return [f"No interface has the MAC {mac}." for mac in wanted if mac not in names]


def renew(devices: Sequence[Device], problems: list[str], root: str = "/") -> bool:
    """Have what looks after interfaces, if anything does, look at them anew.

    :returns: whether anything does
    """
    attempt = _Attempt(problems)
    by_dhcp = [device.name for device in devices if device.interface.dhcp]
    found = bool(by_dhcp) and dhcp.restart(by_dhcp, problems, root)
    for state, argv in (
        ("run/systemd/netif", ("networkctl", "reconfigure")),
        ("run/NetworkManager", ("nmcli", "device", "reapply")),
    ):
        if os.path.isdir(os.path.join(root, state)) and execute.find(argv[0]):
            found = True
            for device in devices:
                attempt(*argv, device.name)
    return found


def settle(
    devices: Sequence[Device], problems: list[str], seconds: float = _SETTLE_SECONDS
) -> None:
    """Wait until interfaces have their addresses again, which a service may have taken away to ask
    for them itself; what is not there then is given to them again.

    It may also know others, the parent's, by its configuration: that is a problem.
    """
    attempt = _Attempt(problems)
    routes = _routes(devices)
    deadline = time.monotonic() + seconds
    for name, interface in devices:
        told = {str(address) for address in interface.addresses}
        while not told <= (there := _addresses_of(name)) and time.monotonic() < deadline:
            time.sleep(_LOOK_AGAIN)
        if not told <= there:
            for address in interface.addresses:
                if str(address) not in there:
                    _add_address(name, address, attempt)
            for command in routes[name]:
                attempt(*command)
        strangers = [one for one in sorted(there - told) if not _is_own_business(one, interface)]
        if strangers:
            problems.append(f"{name} has further addresses: {', '.join(strangers)}.")


def _addresses_of(name: str) -> set[str]:
    """With their prefixes; none if there is no such interface."""
    try:
        listed = execute.run("ip", "address", "show", "dev", name)
    except execute.CommandFailed:
        return set()
    return set(_LISTED.findall(listed))


def _is_own_business(address: str, interface: Interface) -> bool:
    """Whether a guest may have an address that it was not told: of the link, or by IPv6's means."""
    found = ipaddress.ip_interface(address)
    return found.ip.is_link_local or (
        found.version == 6 and any(one.version == 6 for one in interface.addresses)
    )


def announce(devices: Sequence[Device], root: str = "/") -> list[str]:
    """Tell the networks who has the addresses now.

    :returns: a sentence for what they were not told
    """
    problems = []
    deadline = time.monotonic() + _LINK_SECONDS
    for name, interface in devices:
        while not _has_link(name, root) and time.monotonic() < deadline:
            time.sleep(_LOOK_AGAIN)
        if not _has_link(name, root):
            problems.append(f"The addresses of {name} were not announced: it has no link.")
            continue
        mac = bytes.fromhex(interface.mac.replace(":", ""))
        for address in interface.addresses:
            try:
                if isinstance(address, ipaddress.IPv4Interface):
                    _announce_ipv4(name, mac, address.ip)
                else:
                    _announce_ipv6(name, mac, address.ip)
            except OSError as error:
                problems.append(f"{address.ip} was not announced on {name}: {error}.")
    return problems


def _has_link(name: str, root: str) -> bool:
    # Not ``carrier``: the kernel drops what is sent until it has seen that change itself.
    path = os.path.join(root, "sys/class/net", name, "operstate")
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip() in ("up", "unknown")
    except OSError:
        return False  # unplugged; sending says so


def _announce_ipv4(name: str, mac: bytes, address: Address) -> None:
    """Gratuitous ARP (RFC 5227, 3), as a request and as a reply: some learn from the one only."""
    everyone = b"\xff" * 6
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sending:
        sending.bind((name, _ETH_P_ARP))
        for operation, target in ((_ARP_REQUEST, bytes(6)), (_ARP_REPLY, everyone)):
            sending.send(
                struct.pack("!6s6sH", everyone, mac, _ETH_P_ARP)
                + struct.pack("!HHBBH", 1, 0x0800, 6, 4, operation)
                + struct.pack("!6s4s6s4s", mac, address.packed, target, address.packed)
            )


def _announce_ipv6(name: str, mac: bytes, address: Address) -> None:
    """Unsolicited neighbour advertisement (RFC 4861, 7.2.6); the kernel adds the checksum."""
    index = socket.if_nametoindex(name)
    kind = socket.SOCK_RAW
    with socket.socket(socket.AF_INET6, kind, socket.IPPROTO_ICMPV6) as sending:
        sending.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS, 255)
        sending.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF, index)
        sending.bind((str(address), 0, 0, index))
        sending.sendto(
            struct.pack("!BBHI", _NEIGHBOUR_ADVERTISEMENT, 0, 0, _OVERRIDE)
            + address.packed
            + struct.pack("!BB6s", _TARGET_LINK_ADDRESS, 1, mac),
            ("ff02::1", 0, 0, index),
        )
