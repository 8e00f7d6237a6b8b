# SPDX-License-Identifier: Apache-2.0
"""Nova's connection to libvirt, which survives that libvirt hangs up."""

from concurrent import futures
from typing import Any

from nova.virt.libvirt import host as libvirt_host


class Host(libvirt_host.Host):
    """Nova's, but for what it does when a connection is closed.

    libvirt hangs up on who does not answer it for half a minute: on a service that is stopped for
    that long, say. Whoever uses the connection next is told so by libvirt, on the thread that it
    has: with threads of its own Nova waits there for a lock, which this thread may hold, as it
    tests the connection. Or another thread has made a new connection by then, and Nova disables
    the host because of the old one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._wrapped_conn: Any
        super().__init__(*args, **kwargs)
        self._closings = futures.ThreadPoolExecutor(1, thread_name_prefix="libvirt-closings")

    def _connection_closed(self, conn: Any, *args: Any, **kwargs: Any) -> None:
        self._closings.submit(self._forget, conn, *args, **kwargs)

    def _forget(self, conn: Any, *args: Any, **kwargs: Any) -> None:
        with self._wrapped_conn_lock:
            if conn != self._wrapped_conn:
                return
            self._wrapped_conn = None
        self._queue_conn_event_handler(*args, **kwargs)
