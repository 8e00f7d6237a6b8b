# SPDX-License-Identifier: Apache-2.0
"""The cloud that all tests here share: the one that runs, or one for as long as they run."""

from collections.abc import Generator, Iterator
import os
import pathlib
import re
import time

import pytest

from devstack.embedded import cloud as embedded
from devstack.embedded import network
from devstack.embedded import processes
from devstack.embedded import settings

_LOGS = pytest.StashKey[dict[pathlib.Path, int]]()
"""How long the services' logs were when a test began, in bytes."""
# Not of a traceback: these have a request's context, which may be none.
_FIRST_LINE = re.compile(r"[-0-9]+ [:.0-9]+ \d+ (ERROR|CRITICAL) \S+ \[")
_MAX_COMPLAINTS, _MAX_LENGTH = 20, 400


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
        complaints = "\n".join(_complaints(item.stash[_LOGS]))
        report.sections.append(("complaints of the cloud's services", complaints))
    return report


def _complaints(logs: dict[pathlib.Path, int]) -> list[str]:
    """The last errors, of what was said after these sizes; first lines only."""
    found = []
    for log in settings.LOG.glob("*.log"):
        with log.open("rb") as file:
            file.seek(logs.get(log, 0))
            for line in file.read().decode(errors="replace").splitlines():
                if _FIRST_LINE.match(line):
                    found.append((line[:_MAX_LENGTH], log.stem))
    return [f"{name}: {line}" for line, name in sorted(found)[-_MAX_COMPLAINTS:]]
