# SPDX-License-Identifier: Apache-2.0
"""The one thread that does a process's work, and how other threads ask it for something."""

import collections
from collections.abc import Callable
import concurrent.futures
import os
import select
import signal
import socket
from typing import TypeVar

_T = TypeVar("_T")


class Loop:
    """Calls back for readable descriptors, and for background work when there is time."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[], None]] = {}
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._running = True
        self.add(self._wakeup, self._run_calls)

    def add(self, fd: int, callback: Callable[[], None]) -> None:
        """Call ``callback`` whenever ``fd`` is readable."""
        self._callbacks[fd] = callback
        self._epoll.register(fd, select.EPOLLIN)

    def remove(self, fd: int) -> None:
        """Stop calling back for ``fd``."""
        self._epoll.unregister(fd)
        del self._callbacks[fd]

    def call(self, function: Callable[[], _T], timeout: float = 30) -> _T:
        """Run ``function`` on the loop's thread and return its result; for any other thread.

        :raises TimeoutError: the loop did not come round to it in ``timeout`` seconds
        """
        future: concurrent.futures.Future[_T] = concurrent.futures.Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return  # whoever asked has given up
            try:
                future.set_result(function())
            except Exception as error:  # handed to the thread that asked
                future.set_exception(error)

        self._calls.append(run)
        os.eventfd_write(self._wakeup, 1)
        try:
            return future.result(timeout)
        except TimeoutError:
            if not future.cancel():  # it has begun, and will not take much longer
                return future.result()
            raise

    def stop_on(self, number: int) -> None:
        """Make :meth:`run` return on a signal; to be called by the main thread.

        Python would act on it after the next system call only, which may be the next sleep.
        """
        read, write = socket.socketpair()
        write.setblocking(False)
        signal.signal(number, lambda *_: None)
        signal.set_wakeup_fd(write.detach())
        self.add(read.detach(), self.stop)

    def stop(self) -> None:
        """Make :meth:`run` return; also from another thread."""
        self._running = False
        os.eventfd_write(self._wakeup, 1)

    def run(self, background: Callable[[], float | None]) -> None:
        """Serve until stopped.

        :param background: does a little work and says in how many seconds it wants to be called
            again at the latest; None if only a descriptor can give it more to do
        """
        poll = self._epoll.poll
        callbacks = self._callbacks
        while self._running:
            for fd, _ in poll(background()):
                callback = callbacks.get(fd)
                if callback is not None:  # else removed by one called just now
                    callback()

    def _run_calls(self) -> None:
        os.eventfd_read(self._wakeup)
        while self._calls:
            self._calls.popleft()()
