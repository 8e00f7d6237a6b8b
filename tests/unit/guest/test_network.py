# SPDX-License-Identifier: Apache-2.0
"""Re-addressing, for real in a network namespace, with both kinds of ``ip``."""

from __future__ import annotations

import ipaddress
import json
import os
import pathlib
import stat
import subprocess
import sys
from typing import Any

import pytest

from nova_snowflock.guest import network

ROOT = pathlib.Path(__file__).parents[3]
MACS = ("52:54:00:00:00:01", "52:54:00:00:00:02", "52:54:00:00:00:03", "52:54:00:00:00:04")

IP = "/usr/sbin/ip"
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="network namespaces are for root")


def interface(mac: str, *addresses: str, **more: Any) -> dict[str, Any]:
    return {
        "mac": mac,
        "mtu": 1400,
        "addresses": list(addresses),
        "gateways": [],
        "routes": [],
        "dns": [],
        "dhcp": False,
        **more,
    }


@pytest.fixture(params=["iproute2", "busybox"])
def path(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> str:
    """PATH that has one of them."""
    programs = tmp_path / "programs"
    programs.mkdir()
    program = "/usr/bin/busybox" if request.param == "busybox" else "/usr/sbin/ip"
    if not os.path.exists(program):
        pytest.skip(f"there is no {program}")
    (programs / "ip").symlink_to(program)
    return f"{programs}:{os.environ['PATH']}"


def in_namespace(path: str, **told: Any) -> dict[str, Any]:
    script = f"mount -t sysfs sysfs /sys && exec {sys.executable} -m tests.unit.guest.namespace"
    done = subprocess.run(
        ("unshare", "--net", "--mount", "sh", "-c", script),
        input=json.dumps(told).encode(),
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def addresses(result: dict[str, Any], name: str) -> dict[str, Any]:
    """The global ones, with all that is said of them."""
    return {
        f"{one['local']}/{one['prefixlen']}": one
        for one in result["addresses"][name]["addr_info"]
        if one["scope"] == "global"
    }


@needs_root
def test_two_interfaces_that_change_places(path: str) -> None:
    before = [
        interface(MACS[0], "192.0.2.1/24", "fd00:1::1/64"),
        interface(MACS[1], "198.51.100.1/24"),
    ]
    after = [
        interface(
            MACS[1].upper(),
            "192.0.2.7/24",
            "fd00:1::7/64",
            gateways=["192.0.2.254", "fd00:1::fe"],
            routes=[
                {"to": "203.0.113.0/24", "via": "192.0.2.250"},
                {"to": "fd00:9::/32", "via": "fd00:1::fa"},
            ],
        ),
        interface(MACS[0], "198.51.100.7/24", gateways=["198.51.100.254"], mtu=1450),
    ]
    result = in_namespace(path, before=before, after=after)
    assert result["problems"] == []
    assert result["announced"] == []
    assert result["names"] == ["guest0", "guest1"]
    first, second = (result["addresses"][name] for name in result["names"])
    assert (first["address"], first["mtu"]) == (MACS[1], 1400)
    assert (second["address"], second["mtu"]) == (MACS[0], 1450)
    assert set(addresses(result, "guest0")) == {"192.0.2.7/24", "fd00:1::7/64"}
    assert set(addresses(result, "guest1")) == {"198.51.100.7/24"}
    assert addresses(result, "guest0")["192.0.2.7/24"]["broadcast"] == "192.0.2.255"
    assert "tentative" not in addresses(result, "guest0")["fd00:1::7/64"]
    assert result["accept_dad"] == ["1", "1"]
    routes = {(one["dst"], one.get("gateway"), one["dev"]) for one in result["routes"]}
    assert ("default", "192.0.2.254", "guest0") in routes
    assert ("default", "198.51.100.254", "guest1") in routes
    assert ("203.0.113.0/24", "192.0.2.250", "guest0") in routes
    routes = {(one["dst"], one.get("gateway"), one["dev"]) for one in result["routes6"]}
    assert ("default", "fd00:1::fe", "guest0") in routes
    assert ("fd00:9::/32", "fd00:1::fa", "guest0") in routes
    metrics = {
        one["dev"]: one.get("metric", 0) for one in result["routes"] if "default" in one.values()
    }
    assert metrics["guest0"] < metrics["guest1"]


@needs_root
def test_addresses_that_a_service_takes_away(path: str) -> None:
    """And others that it knows."""
    before = [interface(MACS[0], "192.0.2.1/24")]
    after = [interface(MACS[2], "192.0.2.7/24", gateways=["192.0.2.254"])]
    taken = [
        [IP, "address", "flush", "dev", "guest0"],
        [IP, "address", "add", "192.0.2.1/24", "dev", "guest0"],
    ]
    result = in_namespace(path, before=before, after=after, taken=taken)
    assert set(addresses(result, "guest0")) == {"192.0.2.1/24", "192.0.2.7/24"}
    assert result["settled"] == ["guest0 has further addresses: 192.0.2.1/24."]
    routes = {(one["dst"], one.get("gateway")) for one in result["routes"]}
    assert ("default", "192.0.2.254") in routes
    result = in_namespace(path, before=before, after=after, taken=[])
    assert result["settled"] == []
    assert result["missing"] == []


@needs_root
def test_way_to_the_metadata_service(path: str) -> None:
    """DHCP tells it, and the host does not; it is lost with the link."""
    before = [interface(MACS[0], "192.0.2.1/24")]
    metadata = "169.254.169.254"
    setup = [[IP, "route", "add", metadata, "via", "192.0.2.2", "dev", "guest0"]]
    for address, kept in (("192.0.2.7/24", True), ("198.51.100.7/24", False)):
        after = [interface(MACS[2], address)]
        result = in_namespace(path, before=before, after=after, setup=setup)
        assert result["problems"] == []
        routes = {(one["dst"], one.get("gateway")) for one in result["routes"]}
        assert ((metadata, "192.0.2.2") in routes) is kept


@needs_root
def test_interface_that_is_not_there(path: str) -> None:
    before = [interface(MACS[0], "192.0.2.1/24")]
    after = [interface(MACS[2], "192.0.2.7/24"), interface(MACS[1], "198.51.100.7/24")]
    result = in_namespace(path, before=before, after=after)
    assert result["missing"] == [f"No interface has the MAC {MACS[1]}."]


@needs_root
def test_announcements(path: str) -> None:
    before = [interface(MACS[0], "192.0.2.1/24")]
    after = [interface(MACS[2], "192.0.2.7/24", "192.0.2.8/24", "fd00:1::7/64")]
    result = in_namespace(path, before=before, after=after)
    assert result["announced"] == []
    frames = [bytes.fromhex(frame) for frame in result["frames"][0]]
    mac = bytes.fromhex(MACS[2].replace(":", ""))
    for address in ("192.0.2.7", "192.0.2.8"):
        packed = ipaddress.ip_address(address).packed
        arps = [frame for frame in frames if frame[12:14] == b"\x08\x06" and frame[28:32] == packed]
        assert {frame[20:22] for frame in arps} == {b"\0\1", b"\0\2"}
        for frame in arps:
            assert frame[:6] == b"\xff" * 6
            assert frame[6:12] == frame[22:28] == mac
            assert frame[14:20] == bytes.fromhex("000108000604")
            assert frame[38:42] == packed
    packed = ipaddress.ip_address("fd00:1::7").packed
    (advertisement,) = [
        frame
        for frame in frames
        if frame[12:14] == b"\x86\xdd" and frame[20] == 58 and frame[54] == 136
    ]
    assert advertisement[6:12] == mac
    assert advertisement[21] == 255  # hop limit
    assert advertisement[22:38] == packed
    assert advertisement[38:54] == ipaddress.ip_address("ff02::1").packed
    assert advertisement[58:62] == bytes.fromhex("20000000")
    assert advertisement[62:78] == packed
    assert advertisement[78:86] == b"\2\1" + mac
    assert (
        checksum(advertisement[22:54] + bytes((0, 0, 0, 32, 0, 0, 0, 58)) + advertisement[54:]) == 0
    )


def checksum(data: bytes) -> int:
    """RFC 1071; 0 over data with a right one."""
    total = sum(int.from_bytes(data[n : n + 2], "big") for n in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@needs_root
def test_without_a_link(path: str) -> None:
    """As a clone is before its host says ``online``: addresses are good as soon as there is one."""
    before = [interface(MACS[0], "192.0.2.1/24")]
    after = [interface(MACS[2], "192.0.2.7/24", "fd00:1::7/64", gateways=["fd00:1::fe"])]
    setup = [["/usr/sbin/ip", "link", "set", "dev", "host0", "down"]]
    result = in_namespace(path, before=before, after=after, setup=setup)
    assert result["problems"] == []
    assert result["addresses"]["guest0"]["operstate"] == "LOWERLAYERDOWN"
    assert set(addresses(result, "guest0")) == {"192.0.2.7/24", "fd00:1::7/64"}
    assert "tentative" not in addresses(result, "guest0")["fd00:1::7/64"]
    assert result["announced"] == ["The addresses of guest0 were not announced: it has no link."]


@needs_root
def test_what_fails_is_told_and_the_rest_is_done(path: str) -> None:
    before = [interface(MACS[0], "192.0.2.1/24"), interface(MACS[1])]
    after = [
        interface(MACS[2], "192.0.2.7/24", gateways=["203.0.113.1"]),
        interface(MACS[3], "192.0.2.7/24; reboot"),
        interface("52:54:00:00:00:05", "192.0.2.9/24"),
    ]
    result = in_namespace(path, before=before, after=after)
    assert set(addresses(result, "guest0")) == {"192.0.2.7/24"}
    assert result["addresses"]["guest1"]["address"] == MACS[1]
    invalid, missing, route = result["problems"]
    assert "Interface 1" in invalid
    assert "reboot" in invalid
    assert "no interface has the MAC 52:54:00:00:00:05" in missing
    assert "route replace default via 203.0.113.1" in route


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"mac": None},
        {"mac": "52:54:00:00:00"},
        {"mac": "52:54:00:00:00:0g"},
        {"mac": MACS[0] + "\n"},
        {"mac": MACS[0], "mtu": "1500"},
        {"mac": MACS[0], "mtu": 10},
        {"mac": MACS[0], "addresses": ["dev"]},
        {"mac": MACS[0], "addresses": [3221225985]},
        {"mac": MACS[0], "addresses": ["fe80::1%eth0/64"]},
        {"mac": MACS[0], "addresses": 5},
        {"mac": MACS[0], "gateways": ["192.0.2.1/24"]},
        {"mac": MACS[0], "gateways": ["-h"]},
        {"mac": MACS[0], "routes": [{"to": "192.0.2.0/24"}]},
        {"mac": MACS[0], "routes": ["default"]},
        {"mac": MACS[0], "routes": [{"to": "192.0.2.0/33", "via": "192.0.2.1"}]},
        {"mac": MACS[0], "dns": ["example.org"]},
    ],
)
def test_what_makes_no_sense(message: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        network.parse(message)


def sysfs(root: pathlib.Path, **macs: str) -> None:
    for name, mac in macs.items():
        directory = root / "sys/class/net" / name
        directory.mkdir(parents=True)
        (directory / "address").write_text(mac + "\n")


def test_what_has_the_mac_of_a_device_is_no_match(tmp_path: pathlib.Path) -> None:
    sysfs(tmp_path, br0=MACS[0], eth0=MACS[0], veth0=MACS[0], eth1=MACS[1].upper())
    (tmp_path / "sys/class/net/eth0/device").mkdir()
    (tmp_path / "sys/class/net/bonding_masters").write_text("")
    assert network.names_by_mac(str(tmp_path)) == {MACS[0]: "eth0", MACS[1]: "eth1"}


def test_name_servers(tmp_path: pathlib.Path) -> None:
    etc = tmp_path / "etc"
    etc.mkdir()
    path = etc / "resolv.conf"
    path.write_text("search example.org\nnameserver 192.0.2.1\noptions edns0\n")
    path.chmod(0o640)
    after = [
        interface(MACS[0], dns=["192.0.2.53", "fd00::53"]),
        interface(MACS[1], dns=["fd00::53"]),
    ]
    configure_in(tmp_path, after)
    assert path.read_text() == (
        "search example.org\noptions edns0\nnameserver 192.0.2.53\nnameserver fd00::53\n"
    )
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert list(etc.iterdir()) == [path]
    configure_in(tmp_path, [interface(MACS[0])])
    assert "192.0.2.53" in path.read_text()


def test_name_servers_of_a_service(tmp_path: pathlib.Path) -> None:
    target = tmp_path / "stub"
    target.write_text("nameserver 127.0.0.53\n")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/resolv.conf").symlink_to(target)
    configure_in(tmp_path, [interface(MACS[0], dns=["192.0.2.53"])])
    assert target.read_text() == "nameserver 127.0.0.53\n"
    assert (tmp_path / "etc/resolv.conf").is_symlink()


def configure_in(root: pathlib.Path, after: list[dict[str, Any]]) -> None:
    """What it does to files; there is no interface of the name, as its commands find."""
    names = {f"no-such-if{number}": one["mac"] for number, one in enumerate(after)}
    for name, mac in names.items():
        if not (root / "sys/class/net" / name).exists():
            sysfs(root, **{name: mac})
    devices, problems = network.configure(after, after, str(root))
    assert len(devices) == len(after)
    assert problems
    assert all(problem.startswith("ip ") for problem in problems)


def test_leases(tmp_path: pathlib.Path) -> None:
    leases = ("var/lib/dhcp/dhclient.eth0.leases", "run/systemd/netif/leases/2")
    other = tmp_path / "var/lib/dhcp/README"
    for name in leases:
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("lease")
    other.write_text("")
    assert network.configure([], [], str(tmp_path)) == ([], [])
    assert not any((tmp_path / name).exists() for name in leases)
    assert other.exists()


def test_services_are_told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "log"
    for name in ("networkctl", "nmcli"):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@" >>{log}\n')
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for directory in ("sys/class/net", "proc"):
        (tmp_path / directory).mkdir(parents=True)
    device = network.Device("eth0", network.parse(interface(MACS[0])))
    problems: list[str] = []
    assert not network.renew([device], problems, str(tmp_path))
    assert not log.exists()
    (tmp_path / "run/systemd/netif").mkdir(parents=True)
    (tmp_path / "run/NetworkManager").mkdir()
    assert network.renew([device], problems, str(tmp_path))
    assert problems == []
    assert log.read_text() == "networkctl reconfigure eth0\nnmcli device reapply eth0\n"
    (tmp_path / "nmcli").write_text("#!/bin/sh\necho no such device >&2\nexit 10\n")
    assert network.renew([device], problems, str(tmp_path))
    assert problems == ["nmcli device reapply eth0: exit status 10: no such device."]
