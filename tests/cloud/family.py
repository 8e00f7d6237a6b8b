# SPDX-License-Identifier: Apache-2.0
"""Parents and clones in the embedded cloud, as a user of it has them."""

import collections
from collections.abc import Callable, Iterator
import contextlib
import glob
import os
import pathlib
import signal
import socket
import subprocess
import time
from typing import Any

import libvirt

from demo import checks
from devstack.embedded import cloud
from devstack.embedded import hosts
from devstack.embedded import identity
from devstack.embedded import image
from devstack.embedded import network
from devstack.embedded import ovn
from devstack.embedded import processes
from devstack.embedded import settings
from nova_snowflock.virt import disk_info
from tests.cloud import console
from tests.guest import client as guest_client

DISK = "vda"
MIB = 1 << 20


def compute(user: str = "demo") -> Any:
    return identity.client(user).compute


def request(method: str, path: str, body: Any = None, user: str = "demo") -> Any:
    """Nova's answer.

    :raises AssertionError: it is a refusal
    """
    answer = compute(user).request(path, method, json=body)
    assert answer.status_code < 400, answer.text
    return answer.json() if answer.content else None


def refusal(method: str, path: str, body: Any = None, user: str = "demo") -> tuple[int, str]:
    """Nova's status and reason, which is no success."""
    answer = compute(user).request(path, method, json=body)
    assert answer.status_code >= 400, answer.text
    [fault] = answer.json().values()
    return answer.status_code, fault["message"]


@contextlib.contextmanager
def server(name: str, flavor: str = "tiny", **options: Any) -> Iterator[str]:
    """The UUID of a server of the demo project, whose workload answers; as of :func:`create`."""
    booted = create(name, flavor, **options)
    try:
        wait_for(booted)
        yield booted
    finally:
        delete(booted)


def create(name: str, flavor: str = "tiny", image_name: str = image.NAME, **options: Any) -> str:
    """The UUID of a server of the demo project that is not there yet.

    :param image_name: or the ID of an image
    :param options: more of those of openstacksdk's ``create_server``
    """
    booted = compute().create_server(
        name=name,
        image_id=identity.client("demo").image.find_image(image_name).id,
        flavor_id=compute().find_flavor(flavor).id,
        **{"networks": "none", **options},
    )
    return str(booted.id)


def wait_for(server: str) -> None:
    """Until a server's workload answers."""
    wait_for_status(server)
    with talk(server) as guest:
        guest.call("tick")


def wait_for_status(server: str, status: str = "ACTIVE", seconds: float = 120) -> None:
    compute().wait_for_server(compute().get_server(server), status, wait=seconds)


def act(server: str, action: str, argument: Any = None, user: str = "demo") -> Any:
    """Nova's answer to an action on a server.

    :raises AssertionError: it is a refusal
    """
    return request("POST", f"/servers/{server}/action", {action: argument}, user)


@contextlib.contextmanager
def placed(name: str, host: str, flavor: str = "tiny", **arguments: Any) -> Iterator[str]:
    """The UUID of an active server of the demo project on a host.

    :param arguments: more of those of openstacksdk's ``create_server``
    """
    admin = compute("demo-admin")
    booted = admin.create_server(
        name=name,
        flavor_id=admin.find_flavor(flavor).id,
        host=host,
        **{
            "image_id": identity.client().image.find_image(image.NAME).id,
            "networks": "none",
            **arguments,
        },
    )
    try:
        wait_for_status(booted.id)
        yield str(booted.id)
    finally:
        delete(booted.id)


@contextlib.contextmanager
def scheduled_on(*names: str) -> Iterator[None]:
    """New servers, clones too, are put on these hosts and nowhere else."""
    admin = compute("admin")
    others = [
        service
        for service in admin.services(binary="nova-compute")
        if service.host not in names and service.status == "enabled"
    ]
    try:
        for service in others:
            admin.disable_service(service, disabled_reason=f"a test needs {names}")
        yield
    finally:
        for service in others:
            admin.enable_service(service)


def delete(*servers: str) -> None:
    """Delete servers, and wait until they are gone."""
    for identifier in servers:
        compute().delete_server(identifier, ignore_missing=True)
    wait_until(lambda: not {server.id for server in compute().servers()} & set(servers), 60)


def fork(parent: str, *, wait: bool = True, user: str = "demo", **arguments: Any) -> dict[str, Any]:
    """Fork a server. The fork, as the API shows it."""
    made = act(parent, "fork", arguments, user)["fork"]
    if wait:
        _wait_for_clones(made)
    return dict(made)


def _wait_for_clones(made: dict[str, Any]) -> None:
    for clone in made["clones"]:
        wait_for_status(clone["server_id"])


@contextlib.contextmanager
def forked(parent: str, *, wait: bool = True, **arguments: Any) -> Iterator[dict[str, Any]]:
    """A fork, for as long as the context lasts; all its clones and its image go with it."""
    made = fork(parent, wait=False, **arguments)
    try:
        if wait:
            _wait_for_clones(made)
        yield made
    finally:
        clones = clones_of(show(parent, made["id"]))
        request("DELETE", f"/servers/{parent}/forks/{made['id']}")
        delete(*clones)


def clones_of(fork: dict[str, Any]) -> list[str]:
    """The UUIDs of a fork's clones."""
    return [clone["server_id"] for clone in fork["clones"]]


def clones_known(parent: str) -> list[str]:
    """The UUIDs of the servers that are clones of a server, whoever asked for them."""
    return [
        server.id
        for server in compute().servers()
        if dict(server.metadata).get("snowflock:parent") == parent
    ]


def show(server: str, fork_id: str) -> dict[str, Any]:
    return dict(request("GET", f"/servers/{server}/forks/{fork_id}")["fork"])


def host_of(server: str) -> str:
    return str(compute("admin").get_server(server).compute_host)


def talk(server: str) -> guest_client.GuestClient:
    """A connection to the workload in a server."""
    return console.connect(server, host_of(server))


def on(*networks: str) -> list[dict[str, str]]:
    """``networks`` of :func:`create`, by their names."""
    return [{"uuid": identity.client("demo").network.find_network(name).id} for name in networks]


def ports(server: str, network: str | None = None) -> list[Any]:
    """Its neutron ports, or that in the network of that name."""
    neutron = identity.client("demo").network
    wanted = {} if network is None else {"network_id": neutron.find_network(network).id}
    return list(neutron.ports(device_id=server, **wanted))


def address(server: str, network: str = "public") -> str:
    """That of its port in a network."""
    [port] = ports(server, network)
    return str(port.fixed_ips[0]["ip_address"])


def answers_ping(address: str, seconds: float = 30) -> bool:
    """Whether somebody answers a ping from the world outside within that time."""
    command = [*processes.enter(network.OUTSIDE), "busybox", "ping", "-c", "1", "-W", "1", address]
    deadline = time.monotonic() + seconds
    while subprocess.run(command, capture_output=True, check=False).returncode:
        if time.monotonic() > deadline:
            return False
    return True


def fault_of(server: str) -> str:
    """What its users are told of why a server is in ERROR."""
    found = compute().get_server(server)
    assert found.status == "ERROR", found.status
    return str((found.fault or {}).get("message", ""))


def captures(server: str) -> int:
    """How often a host was asked to capture the server."""
    actions = request("GET", f"/servers/{server}/os-instance-actions")["instanceActions"]
    return [action["action"] for action in actions].count("fork")


@contextlib.contextmanager
def runs_on(server: str) -> Iterator[None]:
    """A server whose guest counts on without a break meanwhile, and keeps its memory and disk."""
    elsewhere = 700 * MIB
    with talk(server) as guest:
        disk = write_disk(guest, 1, elsewhere)
        before = guest.call("state")
    yield
    with talk(server) as guest:
        after = guest.call("state")
        assert after["boot_id"] == before["boot_id"]
        assert after["digest"] == before["digest"]
        assert after["tick"] > before["tick"]
        checks.count_is_unbroken("the parent", guest.call("history", count=2000))
        assert disk_digest(guest, offset=elsewhere) == disk
        assert write_disk(guest, 2, elsewhere) != disk
    assert compute("admin").get_server(server).task_state is None


def write_disk(guest: guest_client.GuestClient, seed: int, offset: int = 600 * MIB) -> str:
    """Write to a server's disk, past all that is of its image; the digest of what was written."""
    guest.call("disk_write", disk=DISK, offset=offset, seed=seed, length=2 * MIB)
    return disk_digest(guest, offset=offset)


def disk_digest(guest: guest_client.GuestClient, disk: str = DISK, offset: int = 600 * MIB) -> str:
    """The digest of what is where :func:`write_disk` writes."""
    return str(guest.call("disk_digest", disk=disk, offset=offset, length=2 * MIB)["digest"])


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Hosts have no more afterwards than before, after a sweep at the latest."""
    before = leftovers()
    yield
    deadline = time.monotonic() + 90
    while left := leftovers() - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def leftovers() -> set[str]:
    """What hosts have of servers and fork images: directories, records, layers, mounts, domains,
    processes, ports; and neutron's ports."""
    found = {f"port {port.id}" for port in identity.client().network.ports()}
    for host in settings.HOSTS:
        found |= {f"{host}:{name}" for name in hosts.attach(host).run(_leftovers)}
    return found


def _leftovers() -> list[str]:
    """On a host."""
    places = (
        "/run/nova-snowflock/*",
        "/var/lib/nova-snowflock/*",
        "/var/lib/nova/snowflock/*",
        "/var/lib/nova/instances/_snowflock/*",
        "/var/lib/nova/instances/*-*-*-*-*/*",
    )
    found = [path for place in places for path in glob.glob(place) if not _is_second_name(path)]
    mounts = pathlib.Path("/proc/self/mountinfo").read_text().splitlines()
    found += [mount.split()[4] for mount in mounts if "/nova-snowflock/" in mount]
    with libvirt.open("qemu:///system") as connection:
        found += [f"domain {domain.UUIDString()}" for domain in connection.listAllDomains()]
    switched = ovn.vsctl("list-ports", "br-int").split()
    found += [f"switch port {name}" for name in switched if name.startswith("tap")]
    found += [f"interface {name}" for _, name in socket.if_nameindex()]
    programs: dict[str, int] = collections.Counter()
    for process in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_text().split("\0")
            if "-name" in words:
                programs[words[words.index("-name") + 1]] += 1
            elif any("nova_snowflock.memtap" in word for word in words):
                programs[" ".join(words)] += 1
    # A guest that was started anew is the same. A frozen process looks like its guest.
    for program, count in programs.items():
        found += [f"process {number} {program}" for number in range(count)]
    return found


def _is_second_name(path: str) -> bool:
    """Whether a layer is the file of its disk: libvirt may know that by either name."""
    disk = disk_info.disk_of(path)
    return disk != path and os.path.exists(disk) and os.path.samefile(path, disk)


def kill(*services: processes.Service) -> None:
    """End services without a chance to end well."""
    for service in services:
        pid = service.pid()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        while service.pid() is not None:
            time.sleep(0.01)


def start(*services: processes.Service) -> None:
    """Start services, and wait until they are ready."""
    for service in services:
        service.start()
    for service in services:
        service.wait()


def reboot(host: str) -> None:
    """End a host as a loss of power does, and have it come back."""
    kill(hosts.service(host))
    cloud.up(lambda _: None)


@contextlib.contextmanager
def stopped(*services: processes.Service) -> Iterator[None]:
    """Services that do nothing meanwhile, but are there."""
    assert all(service.pid() for service in services)
    # Some have workers, which do what there is to do.
    pids = [pid for service in services for pid in service.processes()]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):  # it was killed
                os.kill(pid, signal.SIGCONT)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)
