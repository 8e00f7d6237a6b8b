# SPDX-License-Identifier: Apache-2.0
"""The first Xen machine, which all tests here share: if it does not run, for as long as they do."""

from collections.abc import Iterator
import os

import pytest

from devstack.xen import machine
from tests import emulation
from tests import engine
from tests.xen import dom0
from tests.xen import guest


@pytest.fixture(scope="session")
def host() -> Iterator[emulation.Host]:
    """dom0 of the machine."""
    if os.geteuid() != 0:
        pytest.skip("the Xen machine needs root")
    xen = machine.Machine()
    was_up = xen.is_up()
    # Clones are lazy where it pages; one that runs already may be either.
    xen.up(paging=not was_up, say=print)
    try:
        dom0.keep_multicast(xen)
        with dom0.attached(xen) as attached:
            yield attached
    finally:
        if not was_up:
            xen.down()


@pytest.fixture(scope="session")
def xen(host: emulation.Host) -> engine.Engine:
    """The engine in dom0."""
    return engine.Engine(host, **guest.OPTIONS)
