# SPDX-License-Identifier: Apache-2.0
import threading

import pytest

from nova_snowflock import exception
from nova_snowflock.virt import deadline


def never() -> bool:
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

    def give_up() -> bool:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise OSError("not now")
        failed.set()
        return True

    with (
        pytest.raises(exception.SpawnFailed, match="what it starts with"),
        deadline.bounded(0.01, "clone", give_up),
    ):
        assert failed.wait(60)
    assert attempts >= 2


@pytest.mark.parametrize("failure", [None, OSError("not now")])
def test_it_comes_late_but_whole(monkeypatch: pytest.MonkeyPatch, failure: OSError | None) -> None:
    """Nothing was ended that it needs: nothing could be, or others need it."""
    monkeypatch.setattr(deadline, "_AGAIN", 60)
    asked = threading.Event()

    def give_up() -> bool:
        asked.set()
        if failure is not None:
            raise failure
        return False

    with deadline.bounded(0.01, "clone", give_up):
        assert asked.wait(60)


def test_it_fails_late() -> None:
    asked = threading.Event()

    def give_up() -> bool:
        asked.set()
        return True

    def wait() -> None:
        assert asked.wait(60)
        raise KeyError

    with (
        pytest.raises(exception.SpawnFailed, match="what it starts with") as caught,
        deadline.bounded(0.01, "clone", give_up),
    ):
        wait()
    assert isinstance(caught.value.__cause__, KeyError)
