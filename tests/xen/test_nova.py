# SPDX-License-Identifier: Apache-2.0
"""Servers of Nova's on the Xen machine, which is a host of the embedded cloud then."""

from collections.abc import Iterator
from typing import Any

import pytest

from devstack.embedded import cloud as embedded
from devstack.embedded import settings
from devstack.xen import cloud
from devstack.xen import machine
from tests import emulation
from tests.cloud import family
from tests.xen import dom0
from tests.xen import guest
from tests.xen import servers

pytestmark = pytest.mark.long

DISK = "xvda"


@pytest.fixture(scope="module")
def host() -> Iterator[emulation.Host]:
    """The machine's dom0. Both it and the cloud were there, or are there as long as these tests."""
    was_there, was_up = settings.STATE.exists(), machine.is_up()
    embedded.up(print)
    try:
        cloud.join(paging=False, say=print)
        with dom0.attached() as attached:
            yield attached
    finally:
        if not was_up:
            machine.down()
        if not was_there:
            embedded.down(print)


def act(server: str, action: str, status: str, argument: Any = None) -> None:
    """Have Nova do something with a server, and wait until it is in that state."""
    family.act(server, action, argument)
    family.wait_for_status(server, status, servers.SECONDS)


def test_life_of_a_server(*, host: emulation.Host) -> None:
    with servers.server(host, "xen-life") as life:
        before = servers.ask(host, life, "state")
        for action, status in (
            ("pause", "PAUSED"),
            ("unpause", "ACTIVE"),
            ("suspend", "SUSPENDED"),
            ("resume", "ACTIVE"),
        ):
            act(life, action, status)
        after = servers.ask(host, life, "state")
        assert after["boot_id"] == before["boot_id"]
        assert after["digest"] == before["digest"]
        for actions in (
            (("os-stop", "SHUTOFF", None), ("os-start", "ACTIVE", None)),
            (("reboot", "ACTIVE", {"type": "HARD"}),),
        ):
            for action, status, argument in actions:
                act(life, action, status, argument)
            again = servers.ask(host, life, "state")
            assert again["boot_id"] != before["boot_id"]
            before = again
        act(life, "suspend", "SUSPENDED")
    assert host.run(domains) == ["Domain-0"]


def test_server_is_forked(*, host: emulation.Host) -> None:
    with servers.server(host, "xen-parent") as parent:
        servers.ask(host, parent, "disk_write", disk=DISK, offset=0, seed=1, length=1 << 20)
        before = servers.ask(host, parent, "state")
        disk = disk_digest(host, parent)
        with family.forked(parent, wait=False, count=1) as fork:
            [clone] = family.clones_of(fork)
            family.wait_for_status(clone, seconds=servers.SECONDS)
            assert family.host_of(clone) == cloud.HOST
            for one in (clone, parent):
                after = servers.ask(host, one, "state")
                assert after["boot_id"] == before["boot_id"]
                assert after["digest"] == before["digest"]
                assert after["tick"] > before["tick"]
                assert disk_digest(host, one) == disk
            # It is a server like any other then.
            act(clone, "reboot", "ACTIVE", {"type": "HARD"})
            assert servers.ask(host, clone, "state")["boot_id"] != before["boot_id"]
    assert host.run(domains) == ["Domain-0"]


def disk_digest(host: emulation.Host, server: str) -> str:
    """Of a server's first megabyte."""
    found = servers.ask(host, server, "disk_digest", disk=DISK, offset=0, length=1 << 20)
    return str(found["digest"])


def domains() -> list[str]:
    """Those of the host."""
    return [domain.name() for domain in guest.connection().listAllDomains()]
