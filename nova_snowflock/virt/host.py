# SPDX-License-Identifier: Apache-2.0
"""Nova's connection to libvirt, without waiting on threads on which libvirt says something."""

from concurrent import futures
from typing import Any

from nova.virt import event as virtevent
from nova.virt.libvirt import host as libvirt_host


class Host(libvirt_host.Host):
    """Nova's, but that what libvirt says is acted on by other threads.

    With threads of its own Nova acts on the thread that it is told on. libvirt hangs up on who does
    not answer it for half a minute: where the message broker is away for that long while somebody
    is told of what a guest did (each fork pauses its parent), or the service is stopped. Whoever
    uses the connection next is told so, on its own thread: Nova waits there for a lock, which this
    thread may hold, as it tests the connection. Or another thread has made a new connection by
    then, and Nova disables the host because of the old one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._wrapped_conn: Any
        super().__init__(*args, **kwargs)
        # One thread: events stay in order. A closed connection is not to wait for them.
        self._events = futures.ThreadPoolExecutor(1, thread_name_prefix="guest-events")
        self._closings = futures.ThreadPoolExecutor(1, thread_name_prefix="libvirt-closings")

    def _event_emit(self, event: virtevent.Event) -> None:
        if isinstance(event, virtevent.LifecycleEvent):
            self._events.submit(super()._event_emit, event)
        else:
            super()._event_emit(event)

    def _connection_closed(self, conn: Any, *args: Any, **kwargs: Any) -> None:
        self._closings.submit(self._forget, conn, *args, **kwargs)

    def _forget(self, conn: Any, *args: Any, **kwargs: Any) -> None:
        with self._wrapped_conn_lock:
            if conn != self._wrapped_conn:
                return
            self._wrapped_conn = None
        self._queue_conn_event_handler(*args, **kwargs)
