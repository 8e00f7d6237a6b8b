# SPDX-License-Identifier: Apache-2.0
"""A bound on the start of a clone: pages that never come would have it wait for ever."""

from collections.abc import Callable, Iterator
import contextlib
import threading

from oslo_log import log as logging

from nova_snowflock import exception

LOG = logging.getLogger(__name__)

_AGAIN = 5.0


@contextlib.contextmanager
def bounded(seconds: float, name: str, give_up: Callable[[], bool]) -> Iterator[None]:
    """Bound the start of a clone.

    :param name: the clone's
    :param give_up: called from another thread if the context lasts longer, again and again until it
        ends: has whatever it waits for fail; whether it did anything
    :raises SpawnFailed: it has come too late, or what was done had it fail
    """
    lock = threading.Lock()
    over = threading.Event()
    late = given_up = False

    def watch() -> None:
        nonlocal late, given_up
        patience = seconds
        while not over.wait(patience):
            with lock:
                if over.is_set():
                    return
                late = True
                LOG.warning("The clone %s has not started in %d s and is given up", name, seconds)
                try:
                    given_up = give_up() or given_up
                except Exception:
                    LOG.exception("The clone %s waits on for what it has not got", name)
            patience = _AGAIN

    failure = exception.SpawnFailed(
        f"The clone {name} did not get what it starts with of its image within {seconds} s"
    )
    threading.Thread(target=watch, name=f"deadline-{name}", daemon=True).start()
    try:
        yield
    except Exception as error:
        if late:
            raise failure from error
        raise
    finally:
        with lock:
            over.set()
    if given_up:
        raise failure
