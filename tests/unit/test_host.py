# SPDX-License-Identifier: Apache-2.0
"""Connections to libvirt that are closed, with libvirt's own test driver."""

import inspect
import pathlib

from nova.virt.libvirt import host as libvirt_host
import pytest

from nova_snowflock.virt import driver
from nova_snowflock.virt import host

REASON = "it has hung up"


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
    assert "LibvirtEventHandler.create(\n            self._connection_closed," in theirs
    assert "with self._wrapped_conn_lock:\n            if conn == self._wrapped_conn:" in theirs
    assert issubclass(driver.SnowFlockDriver._host_class, host.Host)
