# SPDX-License-Identifier: Apache-2.0
"""What a memory server or memtap is started with. It holds the key, so it goes through a pipe."""

import base64
import dataclasses
import ipaddress
import json
import os
from typing import Any, ClassVar, TypeVar

from nova_snowflock import endpoint
from nova_snowflock.memtap import wire

_Spec = TypeVar("_Spec", "ServerSpec", "MemtapSpec")

POPULATIONS = ("lazy", "background", "eager")


@dataclasses.dataclass(frozen=True)
class ServerSpec:
    """How to serve one image. ValueError: a value is not what it must be.

    :param image: its UUID
    :param key: 32 bytes; AES-256
    :param run_directory: the image's directory for the control socket and the log
    :param address: ``host:port`` to serve from; port 0 takes a free one
    :param group: ``host:port`` of its multicast group, or None for unicast only
    :param interface: name of the interface for multicast; None lets the routing table choose
    :param mtu: bytes that the path to every clone host carries
    :param multicast_ttl: how many routers multicast passes, plus one
    :param rate_limit: bytes a second of background data at most; None for no limit
    :param user: who the process becomes once it is set up
    """

    role: ClassVar[str] = "server"
    module: ClassVar[str] = "nova_snowflock.memtap.server.memory_server"

    image: str
    key: bytes = dataclasses.field(repr=False)
    run_directory: str
    address: str
    group: str | None = None
    interface: str | None = None
    mtu: int = 1500
    multicast_ttl: int = 1
    rate_limit: float | None = None
    user: str = "nobody"

    def __post_init__(self) -> None:
        _check_key(self.key)
        host, _ = endpoint.parse(self.address)
        if ipaddress.ip_address(host).is_multicast:
            raise ValueError(f"{self.address} is not an address to serve from")
        if self.group and not ipaddress.ip_address(endpoint.parse(self.group)[0]).is_multicast:
            raise ValueError(f"{self.group} is not a multicast group")


@dataclasses.dataclass(frozen=True)
class MemtapSpec:
    """How to present one image on one host. ValueError: a value is not what it must be.

    :param image: its UUID
    :param key: 32 bytes; AES-256
    :param run_directory: the image's directory for the control socket, the log and the mount
    :param store_directory: where the page store lies, as a file without a name
    :param descriptor: the encoded descriptor
    :param address: address of this host that the servers and the group can be reached from
    :param owner: ID of the user that may open the files, and of the group that may read those that
        are layers of disks
    :param population: one of :data:`POPULATIONS`
    :param background_rate: bytes a second that ``background`` fetches at most
    :param read_around: bytes that the kernel fetches around a fault
    :param stall_after: seconds without an answer after which the status says ``stalled``
    """

    role: ClassVar[str] = "memtap"
    module: ClassVar[str] = "nova_snowflock.memtap.client.memtap"

    image: str
    key: bytes = dataclasses.field(repr=False)
    run_directory: str
    store_directory: str
    descriptor: bytes = dataclasses.field(repr=False)
    address: str
    owner: tuple[int, int] = (0, 0)
    interface: str | None = None
    population: str = "background"
    background_rate: float = 50e6
    read_around: int = 65536
    stall_after: float = 10.0
    user: str = "nobody"

    def __post_init__(self) -> None:
        _check_key(self.key)
        ipaddress.ip_address(self.address)
        eagerness(self.population)


def _check_key(key: bytes) -> None:
    if len(key) != wire.KEY_SIZE:
        raise ValueError(f"the image's key must have {wire.KEY_SIZE} bytes")


def eagerness(population: str) -> int:
    """The place of a policy in :data:`POPULATIONS`.

    :raises ValueError: there is no such policy
    """
    if population not in POPULATIONS:
        raise ValueError(f"{population!r} is not one of {', '.join(POPULATIONS)}")
    return POPULATIONS.index(population)


def socket_path(run_directory: str, role: str) -> str:
    """Where a process has its control socket."""
    return os.path.join(run_directory, f"{role}.sock")


def log_path(run_directory: str, role: str) -> str:
    """Where a process logs to."""
    return os.path.join(run_directory, f"{role}.log")


def mount_path(run_directory: str) -> str:
    """Where memtap presents the image's files."""
    return os.path.join(run_directory, "mount")


def encode(spec: ServerSpec | MemtapSpec) -> bytes:
    """A spec as the process reads it from its standard input."""
    fields: dict[str, Any] = dataclasses.asdict(spec)
    for name, value in fields.items():
        if isinstance(value, bytes):
            fields[name] = base64.b64encode(value).decode()
    return json.dumps(fields).encode()


def decode(kind: type[_Spec], data: bytes) -> _Spec:
    """:raises ValueError: the data is not a spec of this kind"""
    fields = json.loads(data)
    for field in dataclasses.fields(kind):
        if field.type is bytes:
            fields[field.name] = base64.b64decode(fields[field.name])
    return kind(**fields)
