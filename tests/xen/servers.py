# SPDX-License-Identifier: Apache-2.0
"""Servers of the embedded cloud on Xen machines, which have joined that."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
from typing import Any, TypeAlias

from devstack.xen import cloud
from devstack.xen import machine
from tests import emulation
from tests.cloud import family
from tests.xen import dom0
from tests.xen import guest

# Machines' dom0, by the names that the cloud knows them by.
Hosts: TypeAlias = Mapping[str, emulation.Host]

SECONDS = 300
"""What one may take to get into a state, where all processors are emulated."""


def join(
    xen: machine.Machine,
    stack: contextlib.ExitStack,
    *,
    paging: bool,
    say: Callable[[str], None],
) -> emulation.Host:
    """Have a machine be a host of the cloud; its dom0, until the stack is closed.

    The machine ends then, unless it was up before.
    """
    if not xen.is_up():
        stack.callback(xen.down)
    cloud.join(xen, paging=paging, say=say)
    return stack.enter_context(dom0.attached(xen))


@contextlib.contextmanager
def server(hosts: Hosts, name: str, image: str = cloud.IMAGE) -> Iterator[str]:
    """The UUID of a server there, whose workload answers."""
    booted = family.create(name, image_name=image)
    try:
        family.wait_for_status(booted, seconds=SECONDS)
        ask(hosts, booted, "tick")
        yield booted
    finally:
        family.delete(booted)


def ask(hosts: Hosts, server: str, command: str, **arguments: Any) -> Any:
    """What the workload of a server answers, on its console."""
    name = family.compute("admin").get_server(server).instance_name
    return hosts[family.host_of(server)].run(guest.ask, name, command, **arguments)


def disk_digest(hosts: Hosts, server: str, **where: Any) -> str:
    """Of a part of a server's disk; `where` is as of the workload's command."""
    return str(ask(hosts, server, "disk_digest", **where)["digest"])
