# SPDX-License-Identifier: Apache-2.0
"""Guests that have stopped by themselves, with libvirt's own test driver."""

from collections.abc import Iterator
import pathlib

import libvirt
import pytest

from nova_snowflock.virt import connections
from nova_snowflock.virt.xen import driver
from nova_snowflock.virt.xen import ends
from tests import engine

URI = "test:///default"
NAME, NUMBER = "test", 1
TRANSIENT = """\
<domain type='test'>
  <name>transient</name><memory>8192</memory><os><type>hvm</type></os>
  <on_poweroff>restart</on_poweroff><on_reboot>destroy</on_reboot><on_crash>preserve</on_crash>
</domain>
"""


@pytest.fixture
def connection() -> Iterator[libvirt.virConnect]:
    with libvirt.open(URI) as opened:
        yield opened


def numbers(connection: libvirt.virConnect) -> dict[str, int]:
    """Of guests that run, by their names."""
    running = connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
    return {domain.name(): domain.ID() for domain in running}


@pytest.mark.parametrize("reason", ["poweroff", "crash"])
def test_it_ends(connection: libvirt.virConnect, reason: str) -> None:
    ends.end(connection, NUMBER, reason)
    assert numbers(connection) == {}
    assert not connection.lookupByName(NAME).isActive()


def test_it_starts_anew(connection: libvirt.virConnect) -> None:
    ends.end(connection, NUMBER, "reboot")
    assert numbers(connection)[NAME] != NUMBER


def test_what_a_domain_says(connection: libvirt.virConnect) -> None:
    first = connection.createXML(TRANSIENT).ID()
    ends.end(connection, first, "crash")
    assert numbers(connection)["transient"] == first
    ends.end(connection, first, "poweroff")
    second = numbers(connection)["transient"]
    assert second != first
    ends.end(connection, second, "reboot")
    assert "transient" not in numbers(connection)


def test_somebody_has_noticed(connection: libvirt.virConnect) -> None:
    ends.end(connection, 77, "poweroff")
    assert numbers(connection) == {NAME: NUMBER}


def test_libvirt_may_notice_first(tmp_path: pathlib.Path) -> None:
    """Only what was found twice, for the same reason, is ended here."""
    program, found = tmp_path / "snowflock-xen", tmp_path / "found"
    program.write_text(
        f"""#!/bin/sh
        [ "$*" = stopped ] || exit 2
        echo '{{"event": "listed", "domains": {{'$(cat {found})'}}}}'
        """
    )
    program.chmod(0o755)
    options = (("address", "127.0.0.1"), ("connection_uri", URI), ("xen_helper", str(program)))
    back_end = driver.XenHypervisor(connections.Connections(URI), engine.configuration(options))
    # Another connection to libvirt's test driver is to another host.
    own = back_end._connections.get()
    for text, expected in (
        ("", {NAME: NUMBER}),
        (f'"{NUMBER}": "crash"', {NAME: NUMBER}),
        ("", {NAME: NUMBER}),
        (f'"{NUMBER}": "crash"', {NAME: NUMBER}),
        (f'"{NUMBER}": "poweroff"', {NAME: NUMBER}),
        (f'"{NUMBER}": "poweroff", "9": "crash"', {}),
    ):
        found.write_text(text)
        back_end.end_stopped()
        assert numbers(own) == expected
