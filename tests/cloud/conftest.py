# SPDX-License-Identifier: Apache-2.0
"""The cloud that all tests here share: the one that runs, or one for as long as they run."""

from collections.abc import Generator, Iterator
import itertools
import os
import pathlib
import time

import pytest

from devstack.embedded import cloud as embedded
from devstack.embedded import network
from devstack.embedded import processes
from devstack.embedded import settings

_LOGS = pytest.StashKey[dict[pathlib.Path, int]]()
"""How long the services' logs were when a test began, in bytes."""
_MAX_COMPLAINTS = 40


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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_LOGS] = {log: log.stat().st_size for log in settings.LOG.glob("*.log")}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What fails comes with what the services complained of meanwhile."""
    report = yield
    if report.failed:
        complaints = "\n".join(itertools.islice(_complaints(item.stash[_LOGS]), _MAX_COMPLAINTS))
        report.sections.append(("complaints of the cloud's services", complaints))
    return report


def _complaints(logs: dict[pathlib.Path, int]) -> Iterator[str]:
    """The first lines of errors and warnings, log by log, of what was said after these sizes."""
    for log in sorted(settings.LOG.glob("*.log")):
        with log.open("rb") as file:
            file.seek(logs.get(log, 0))
            for line in file.read().decode(errors="replace").splitlines():
                if any(level in line for level in (" WARNING ", " ERROR ", " CRITICAL ")):
                    yield f"{log.stem}: {line[:240]}"
