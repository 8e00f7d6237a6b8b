# SPDX-License-Identifier: Apache-2.0
"""The lock of a domain's disks: one at a time, and a fork comes first."""

import pathlib
import threading

import pytest

from nova_snowflock import exception
from nova_snowflock.virt import domain_lock

DOMAIN = "11111111-1111-4111-8111-111111111111"


def test_nothing_is_left(tmp_path: pathlib.Path) -> None:
    for _ in range(2):
        with domain_lock.held(str(tmp_path), DOMAIN) as lock:
            assert lock.noted() == ""
            assert not lock.interrupted()
            lock.note("working")
            lock.note("stopped")
            assert lock.noted() == "stopped"
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="body"), domain_lock.held(str(tmp_path), DOMAIN):
        raise ValueError("body")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_holder_noted_is_read(tmp_path: pathlib.Path) -> None:
    (tmp_path / f"{DOMAIN}.lock").write_text("stopped\ninterrupted\n")
    with domain_lock.held(str(tmp_path), DOMAIN) as lock:
        assert lock.noted() == "stopped"


def test_fork_interrupts_and_gets_it(tmp_path: pathlib.Path) -> None:
    given_up = threading.Event()
    calls: list[bool] = []

    def interrupt() -> None:
        calls.append(holder.interrupted())
        holder.note("still working")  # which must not hide that somebody waits
        if len(calls) == 3:
            given_up.set()

    def fork() -> None:
        with domain_lock.held(str(tmp_path), DOMAIN, interrupt):
            calls.append(True)

    with domain_lock.held(str(tmp_path), DOMAIN) as holder:
        holder.note("working")
        thread = threading.Thread(target=fork)
        thread.start()
        assert given_up.wait(10)
        assert holder.noted() == "still working"
    thread.join(10)
    assert calls[:3] == [True] * 3
    assert list(tmp_path.iterdir()) == []


def test_patience_has_an_end(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(domain_lock, "_PATIENCE", 0.1)
    with (
        domain_lock.held(str(tmp_path), DOMAIN),
        pytest.raises(exception.DiskError, match="does not come to an end"),
        domain_lock.held(str(tmp_path), DOMAIN, lambda: None),
    ):
        pass


def test_what_a_holder_could_not_put_right_is_kept(tmp_path: pathlib.Path) -> None:
    def fail() -> None:
        with domain_lock.held(str(tmp_path), DOMAIN) as lock:
            lock.note("stopped")
            lock.kept = True
            raise ValueError("body")

    with pytest.raises(ValueError, match="body"):
        fail()
    with domain_lock.held(str(tmp_path), DOMAIN) as lock:
        assert lock.noted() == "stopped"
    assert list(tmp_path.iterdir()) == []
