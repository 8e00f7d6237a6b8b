# SPDX-License-Identifier: Apache-2.0
"""Servers of the embedded cloud on Xen machines, which have joined that."""

from collections.abc import Iterator, Mapping
import contextlib
from typing import Any, TypeAlias

from devstack.xen import cloud
from tests import emulation
from tests.cloud import family
from tests.xen import guest

# Machines' dom0, by the names that the cloud knows them by.
Hosts: TypeAlias = Mapping[str, emulation.Host]

SECONDS = 300
"""What one may take to get into a state, where all processors are emulated."""


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
