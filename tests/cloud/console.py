# SPDX-License-Identifier: Apache-2.0
"""Talk to the test guest in a server of the embedded cloud, over its serial console."""

import libvirt
from lxml import etree

from devstack.embedded import hosts
from tests.guest import client as guest_client
from tests.guest import terminal as guest_terminal


def connect(server: str, host: str, timeout: float = 120.0) -> guest_client.GuestClient:
    """A connection to the workload of the server of that UUID, which runs on the host.

    Returns once it answers. The console takes one connection at a time.

    :raises GuestError: it does not, within `timeout` seconds
    """
    machine = hosts.attach(host)
    path = machine.path(machine.run(terminal, server))
    return guest_terminal.connect(str(path), timeout)


def terminal(server: str) -> str:
    """On the host: the pseudo terminal of the domain's serial port."""
    source = description(server).find("devices/serial[@type='pty']/source")
    if source is None:
        raise LookupError(f"domain {server} has no pseudo terminal")
    return str(source.attrib["path"])


def description(server: str) -> etree._Element:
    """On the host: XML of the server's domain."""
    with libvirt.open("qemu:///system") as connection:
        return etree.fromstring(connection.lookupByUUIDString(server).XMLDesc())
