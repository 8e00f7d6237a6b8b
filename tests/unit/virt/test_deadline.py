# SPDX-License-Identifier: Apache-2.0
import threading

import pytest

from nova_snowflock import exception
from nova_snowflock.virt.qemu import deadline


def never() -> None:
    raise AssertionError("it was given up")


def test_in_time() -> None:
    with deadline.bounded(60, "clone", never):
        pass


def test_what_fails_in_time_is_its_own() -> None:
    with pytest.raises(KeyError), deadline.bounded(60, "clone", never):
        raise KeyError


def test_it_is_given_up_until_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first attempt does not work: libvirt has another job with it, say."""
    monkeypatch.setattr(deadline, "_AGAIN", 0.01)
    failed = threading.Event()
    attempts = 0

    def give_up() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise OSError("not now")
        failed.set()

    with (
        pytest.raises(exception.SpawnFailed, match="what it starts with"),
        deadline.bounded(0.01, "clone", give_up),
    ):
        assert failed.wait(60)
    assert attempts >= 2
