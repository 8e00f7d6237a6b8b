# SPDX-License-Identifier: Apache-2.0
"""What libvirt says to its callers' threads, with libvirt's own test driver."""

import inspect
import pathlib
import threading

from nova.virt import event as virtevent
from nova.virt.libvirt import host as libvirt_host
import pytest

from nova_snowflock.virt import driver
from nova_snowflock.virt import host

REASON = "it has hung up"
GUEST = "11111111-2222-4333-8444-555555555555"


@pytest.fixture
def connected(tmp_path: pathlib.Path) -> host.Host:
    # Unlike the default one, this is nobody else's: connections to it may stay open.
    node = tmp_path / "node.xml"
    node.write_text("<node/>")
    return host.Host(f"test://{node}", conn_event_handler=lambda *_: None)


def told(connected: host.Host) -> int:
    """How often the driver is to be told of the connection."""
    connected._closings.shutdown()
    count = 0
    while not connected._conn_event_handler_queue.empty():
        connected._conn_event_handler_queue.get()
        count += 1
    return count


def test_who_tells_of_events_is_not_held_up() -> None:
    """That is the thread that answers libvirt's questions whether anybody is there."""
    go_on, noted = threading.Event(), []

    def slow(event: virtevent.Event) -> None:
        assert go_on.wait(10)
        noted.append(event)

    telling = host.Host("test:///default", lifecycle_event_handler=slow)
    events = [
        virtevent.LifecycleEvent(GUEST, transition)
        for transition in (virtevent.EVENT_LIFECYCLE_PAUSED, virtevent.EVENT_LIFECYCLE_RESUMED)
    ]
    for event in events:
        telling._event_emit_delayed(event)
    assert not noted
    go_on.set()
    telling._events.shutdown()
    assert noted == events


def test_who_tests_it_is_told_so(connected: host.Host) -> None:
    """On the thread that has the lock."""
    connection = connected.get_connection()
    with connected._wrapped_conn_lock:
        connected._connection_closed(connection, False, REASON)
        assert connected._wrapped_conn is connection
    assert told(connected) == 2
    assert connected._wrapped_conn is None


def test_there_is_another_already(connected: host.Host) -> None:
    """The host has not lost that, and is not to be disabled."""
    old = connected.get_connection()
    connected._wrapped_conn = None
    new = connected.get_connection()
    connected._connection_closed(old, False, REASON)
    assert told(connected) == 2  # that it has connected, each time
    assert connected._wrapped_conn is new


def test_seams() -> None:
    theirs = inspect.getsource(libvirt_host.Host)
    assert "create(\n            self._connection_closed, self._event_emit_delayed)" in theirs
    assert "self._event_emit(event)" in theirs
    assert "self._event_emit, event)" in theirs  # by who tells later that a guest has stopped
    assert "with self._wrapped_conn_lock:\n            if conn == self._wrapped_conn:" in theirs
    assert issubclass(driver.SnowFlockDriver._host_class, host.Host)
