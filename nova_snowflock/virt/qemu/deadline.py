# SPDX-License-Identifier: Apache-2.0
"""A bound on the start of a clone: pages that never come would have it wait for ever."""

from collections.abc import Callable, Iterator
import contextlib
import threading

from oslo_log import log as logging

from nova_snowflock import exception

LOG = logging.getLogger(__name__)


@contextlib.contextmanager
def bounded(seconds: float, name: str, give_up: Callable[[], None]) -> Iterator[None]:
    """Bound the start of a clone.

    :param name: the clone's
    :param give_up: called from another thread if the context lasts longer: has whatever it waits
        for fail
    :raises SpawnFailed: that was called
    """
    lock = threading.Lock()
    over = late = False

    def expire() -> None:
        nonlocal late
        with lock:
            if over:
                return
            late = True
            LOG.warning("The clone %s has not started within %d s and is given up", name, seconds)
            try:
                give_up()
            except Exception:
                LOG.exception("The clone %s waits on for what it has not got", name)

    timer = threading.Timer(seconds, expire)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            over = True
        if late:
            raise exception.SpawnFailed(
                f"The clone {name} did not get what it starts with of its image within {seconds} s"
            )
