# SPDX-License-Identifier: Apache-2.0
"""Daemons as the embedded cloud starts, finds and ends them; no cloud is needed."""

import os
import pathlib
import signal
import time
from typing import Any

import pytest

from devstack.embedded import processes
from devstack.embedded import settings


@pytest.fixture(autouse=True)
def state(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOG", "RUN"):
        monkeypatch.setattr(settings, name, tmp_path)


def daemon(script: str, **options: Any) -> processes.Service:
    return processes.Service("daemon", ["sh", "-c", script], **options)


def test_a_daemon_is_found_again_and_ends_with_its_children() -> None:
    service = daemon("sleep 1000 & sleep 1000 & wait")
    assert service.pid() is None
    assert service.start()
    again = daemon("never run")
    assert again.pid() == service.pid() is not None
    assert not again.start()
    while len(list(service.processes())) < 3:
        time.sleep(0.01)
    again.stop()
    assert service.pid() is None
    assert list(service.processes()) == []


def test_a_start_ends_what_a_killed_daemon_left() -> None:
    service = daemon("sleep 1000 & wait")
    service.start()
    while len(list(service.processes())) < 2:
        time.sleep(0.01)
    pid = service.pid()
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while service.pid() is not None:
        time.sleep(0.01)
    (left,) = service.processes()
    service.start()
    assert left not in service.processes()
    service.stop()


def test_a_number_used_again_misleads_nobody() -> None:
    service = daemon("sleep 1000")
    other = processes.inspect(os.getpid())
    assert other is not None
    service.pid_file.write_text(f"{other.pid} {other.started + 1} {processes.boot_id()}")
    assert service.pid() is None
    assert list(service.processes()) == []
    service.pid_file.write_text(f"{other.pid} {other.started} of-another-boot")
    assert service.pid() is None
    assert list(service.processes()) == []


def test_a_daemon_that_will_not_end_is_killed() -> None:
    service = daemon("trap '' TERM; echo deaf; while :; do sleep 1; done", patience=0.3)
    service.start()
    while "deaf" not in service.last_words():
        time.sleep(0.01)
    service.stop()
    assert list(service.processes()) == []


def test_a_daemon_that_ends_says_why() -> None:
    service = daemon("echo no such luck; exit 3", ready=lambda: False)
    service.start()
    with pytest.raises(processes.CloudError, match="no such luck"):
        service.wait()


def test_a_daemon_that_is_never_ready() -> None:
    service = processes.Service("daemon", ["sleep", "1000"], ready=lambda: False, patience=0.3)
    service.start()
    with pytest.raises(processes.CloudError, match="not ready after"):
        service.wait()
    service.kill()
    assert list(service.processes()) == []
