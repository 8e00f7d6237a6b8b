# SPDX-License-Identifier: Apache-2.0
"""Servers of the embedded cloud on the Xen machine, which has joined that."""

from collections.abc import Iterator
import contextlib
from typing import Any

from devstack.xen import cloud
from tests import emulation
from tests.cloud import family
from tests.xen import guest

SECONDS = 300
"""What one may take to get into a state, where all processors are emulated."""


@contextlib.contextmanager
def server(host: emulation.Host, name: str) -> Iterator[str]:
    """The UUID of a server there, whose workload answers.

    :param host: the machine's dom0
    """
    booted = family.create(name, image_name=cloud.IMAGE)
    try:
        family.wait_for_status(booted, seconds=SECONDS)
        assert family.host_of(booted) == cloud.HOST
        ask(host, booted, "tick")
        yield booted
    finally:
        family.delete(booted)


def ask(host: emulation.Host, server: str, command: str, **arguments: Any) -> Any:
    """What the workload of a server answers, on its console."""
    name = family.compute("admin").get_server(server).instance_name
    return host.run(guest.ask, name, command, **arguments)
