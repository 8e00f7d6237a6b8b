# SPDX-License-Identifier: Apache-2.0
"""Where the cloud keeps what, which addresses it has, and its passwords."""

import dataclasses
import functools
import ipaddress
import json
import os
import pathlib
import secrets
import sys

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
STATE = pathlib.Path(os.environ.get("SNOWFLOCK_CLOUD", "/var/lib/snowflock-cloud"))
"""All that the cloud keeps is below this directory; its owner may remove the cloud with it."""

BIN = pathlib.Path(sys.executable).parent
"""Programs of the virtual environment."""

LOG = STATE / "log"
RUN = STATE / "run"
ETC = STATE / "etc"
DONE = STATE / "done"

HOSTS = ("host1", "host2", "host3")
RAW_HOSTS = {"host3"}
"""Those that keep the disks of servers raw, and others as qcow2 files."""
XEN_HOSTS = ("xen1", "xen2")
"""Machines of their own (devstack.xen), which join a cloud that is there."""
REGION = "RegionOne"

# The management network: all services, and this machine's end of it, for clients.
CONTROLLER = "10.78.0.1"
CLIENT = "10.78.0.254"
MANAGEMENT_PREFIX = 24
# The network between compute hosts, as tests.emulation has it.
UNDERLAY_MTU = 9000
# The network that servers share with the world outside, and where that is in it.
PROVIDER = ipaddress.ip_network("192.0.2.0/24")
PROVIDER_GATEWAY = ipaddress.ip_address("192.0.2.1")
# A network of servers, behind a router.
PRIVATE = ipaddress.ip_network("10.79.0.0/24")
PRIVATE6 = ipaddress.ip_network("fd79::/64")

KEYSTONE = f"http://{CONTROLLER}:5000/v3"
PORTS = {"keystone": 5000, "nova": 8774, "placement": 8778, "glance": 9292, "neutron": 9696}
DATABASE_PORT = 3306
MESSAGING_PORT = 5672


def management_address(host: str) -> str:
    return f"10.78.0.{10 + number(host)}"


def underlay_address(host: str) -> str:
    return f"10.77.0.{number(host)}"


def number(host: str) -> int:
    """1 for host1."""
    return (*HOSTS, *XEN_HOSTS).index(host) + 1


@dataclasses.dataclass(frozen=True)
class Passwords:
    """One for each that needs one. Made when the cloud is, and kept with it."""

    admin: str
    database: str
    demo: str
    messaging: str
    metadata: str
    other: str
    reader: str
    service: str


@functools.cache
def passwords() -> Passwords:
    file = STATE / "passwords.json"
    if not file.exists():
        names = [field.name for field in dataclasses.fields(Passwords)]
        write(file, json.dumps({name: secrets.token_hex(16) for name in names}, indent=1))
    return Passwords(**json.loads(file.read_text()))


def make_directories() -> None:
    """The state directory and its parts. Others may pass through it: QEMU is another user."""
    for directory, mode in (
        (STATE, 0o711),
        (LOG, 0o700),
        (RUN, 0o700),
        (ETC, 0o700),
        (DONE, 0o700),
    ):
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(mode)


def write(path: pathlib.Path, text: str) -> bool:
    """Have the file hold the text, for root alone; whether it did not before."""
    if path.exists() and path.read_text() == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.touch(mode=0o600)
    draft.chmod(0o600)
    draft.write_text(text)
    draft.rename(path)
    return True
