# SPDX-License-Identifier: Apache-2.0
"""The cloud that all tests here share: the one that runs, or one for as long as they run."""

from collections.abc import Iterator
import os
import pathlib
import time

import pytest

from devstack.embedded import cloud as embedded
from devstack.embedded import network
from devstack.embedded import processes
from devstack.embedded import settings


@pytest.fixture(scope="session")
def cloud() -> Iterator[None]:
    """The embedded cloud is up, all of it."""
    if os.geteuid() != 0:
        pytest.skip("the embedded cloud needs root")
    was_there = settings.STATE.exists()
    embedded.up(print)
    yield
    if was_there:
        return
    members = [
        process
        for service in embedded.services()
        for pid in service.processes()
        if (process := processes.inspect(pid))
    ]
    assert len(members) > 20
    embedded.down(print)
    deadline = time.monotonic() + 5
    # The kernel ends what is in a PID namespace in its own time.
    while any(processes.inspect(process.pid) == process for process in members):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert network.CLIENT_LINK not in network.links(None)
    assert str(settings.STATE) not in pathlib.Path("/proc/self/mounts").read_text()
    assert not settings.STATE.exists()
