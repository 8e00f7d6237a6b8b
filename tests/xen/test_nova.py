# SPDX-License-Identifier: Apache-2.0
"""Servers of Nova's on Xen machines, which are hosts of the embedded cloud then."""

from collections.abc import Iterator
import contextlib
from typing import Any

import pytest

from devstack.embedded import cloud as embedded
from devstack.embedded import settings
from devstack.xen import cloud
from devstack.xen import machine
from tests.cloud import family
from tests.xen import guest
from tests.xen import servers

pytestmark = pytest.mark.long

DISK: dict[str, Any] = {"disk": "xvda", "offset": 600 << 20, "length": 1 << 20}
"""A part of it that nothing else uses."""


@pytest.fixture(scope="module")
def hosts() -> Iterator[servers.Hosts]:
    """One of them and the cloud: as they are there, or as long as these tests run."""
    with contextlib.ExitStack() as stack:
        if not settings.STATE.exists():
            stack.callback(embedded.down, print)
        embedded.up(print)
        xen = machine.Machine(1)
        yield {cloud.name(xen): servers.join(xen, stack, paging=False, say=print)}


@pytest.fixture
def both(hosts: servers.Hosts) -> Iterator[servers.Hosts]:
    """That one, and another."""
    with contextlib.ExitStack() as stack:
        xen = machine.Machine(2)
        yield {**hosts, cloud.name(xen): servers.join(xen, stack, paging=False, say=print)}


def act(server: str, action: str, status: str, argument: Any = None) -> None:
    """Have Nova do something with a server, and wait until it is in that state."""
    family.act(server, action, argument)
    family.wait_for_status(server, status, servers.SECONDS)


def test_life_of_a_server(*, hosts: servers.Hosts) -> None:
    with servers.server(hosts, "xen-life") as life:
        before = servers.ask(hosts, life, "state")
        for action, status in (
            ("pause", "PAUSED"),
            ("unpause", "ACTIVE"),
            ("suspend", "SUSPENDED"),
            ("resume", "ACTIVE"),
        ):
            act(life, action, status)
        after = servers.ask(hosts, life, "state")
        assert after["boot_id"] == before["boot_id"]
        assert after["digest"] == before["digest"]
        for actions in (
            (("os-stop", "SHUTOFF", None), ("os-start", "ACTIVE", None)),
            (("reboot", "ACTIVE", {"type": "HARD"}),),
        ):
            for action, status, argument in actions:
                act(life, action, status, argument)
            again = servers.ask(hosts, life, "state")
            assert again["boot_id"] != before["boot_id"]
            before = again
        act(life, "suspend", "SUSPENDED")
    nothing_is_left(hosts)


@pytest.mark.parametrize("image", [cloud.IMAGE, cloud.HVM_IMAGE])
def test_server_is_forked(*, image: str, hosts: servers.Hosts) -> None:
    with servers.server(hosts, "xen-parent", image) as parent:
        servers.ask(hosts, parent, "disk_write", seed=1, **DISK)
        before = servers.ask(hosts, parent, "state")
        disk = servers.disk_digest(hosts, parent, **DISK)
        with family.forked(parent, wait=False, count=1) as fork:
            [clone] = family.clones_of(fork)
            family.wait_for_status(clone, seconds=servers.SECONDS)
            for one in (clone, parent):
                after = servers.ask(hosts, one, "state")
                assert after["boot_id"] == before["boot_id"]
                assert after["digest"] == before["digest"]
                assert after["tick"] > before["tick"]
                assert servers.disk_digest(hosts, one, **DISK) == disk
            # Emulated, a BIOS takes minutes beside a guest that counts every 10 ms.
            act(parent, "pause", "PAUSED")
            # It is a server like any other then.
            act(clone, "reboot", "ACTIVE", {"type": "HARD"})
            assert servers.ask(hosts, clone, "state")["boot_id"] != before["boot_id"]
    nothing_is_left(hosts)


def test_clone_on_another_host(*, both: servers.Hosts) -> None:
    """Its memory and its disk's content come over the network."""
    with servers.server(both, "xen-far") as parent:
        servers.ask(both, parent, "disk_write", seed=1, **DISK)
        before = servers.ask(both, parent, "state")
        disk = servers.disk_digest(both, parent, **DISK)
        [other] = set(both) - {family.host_of(parent)}
        zone = f"nova:{other}"
        with family.forked(
            parent, wait=False, user="demo-admin", count=1, availability_zone=zone
        ) as fork:
            [clone] = family.clones_of(fork)
            family.wait_for_status(clone, seconds=servers.SECONDS)
            assert family.host_of(clone) == other
            after = servers.ask(both, clone, "state")
            assert after["boot_id"] == before["boot_id"]
            assert after["digest"] == before["digest"]
            assert servers.disk_digest(both, clone, **DISK) == disk
    nothing_is_left(both)


def nothing_is_left(hosts: servers.Hosts) -> None:
    for host in hosts.values():
        assert host.run(domains) == ["Domain-0"]


def domains() -> list[str]:
    """Those of the host."""
    return [domain.name() for domain in guest.connection().listAllDomains()]
