# SPDX-License-Identifier: Apache-2.0
"""A virtio-serial port whose other end comes and goes, and messages on it.

While the host is away, the port reports a hang-up and reads nothing; the descriptor stays good for
when it is there again. One thread reads and writes, and is never blocked by either.
"""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import logging
import os
import select
import threading

from nova_snowflock.guest import protocol

LOG = logging.getLogger(__name__)

_BROKEN = select.POLLERR | select.POLLNVAL


class Port:
    """The agent's end."""

    def __init__(
        self,
        open_port: Callable[[], int],
        arrived: Callable[[], None],
        received: Callable[[protocol.Message], None],
        *,
        look_again: float = 0.2,
        open_again: float = 1.0,
    ) -> None:
        """
        :param open_port: returns a descriptor that does not block, or raises OSError
        :param arrived: called when the host is there anew; what was sent before may be lost
        :param received: called with each message
        :param look_again: seconds until it looks again whether the host is there
        :param open_again: seconds until it looks again whether there is a port
        """
        self._open_port = open_port
        self._arrived = arrived
        self._received = received
        self._look_again = look_again
        self._open_again = open_again
        self._fd: int | None = None
        self._complaint = ""
        self._lines = protocol.Lines()
        self._lock = threading.Lock()
        self._here = False
        self._unsent = bytearray()
        self._stopped = False
        self._wake_read, self._wake_write = os.pipe()
        for fd in (self._wake_read, self._wake_write):
            os.set_blocking(fd, False)

    def send(self, message: protocol.Message) -> None:
        """Send it, if the host is there. For any thread.

        :raises ValueError: it is too long
        """
        line = protocol.encode(message)
        with self._lock:
            if not self._here:
                return
            self._unsent += line
        self._wake()

    def stop(self) -> None:
        """Have :meth:`run` return."""
        self._stopped = True
        self._wake()

    def run(self) -> None:
        """Send and receive until stopped."""
        try:
            while not self._stopped:
                if self._fd is None:
                    self._open()
                elif self._here:
                    self._exchange(self._fd)
                else:
                    self._look(self._fd)
        finally:
            self._close()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it is being woken already
            os.write(self._wake_write, b"\0")

    def _wait(self, fd: int | None, events: int, seconds: float | None) -> int:
        """What happens on the descriptor, unless something else is to be looked at first."""
        poll = select.poll()
        poll.register(self._wake_read, select.POLLIN)
        if fd is not None:
            poll.register(fd, events)
        happened = dict(poll.poll(None if seconds is None else seconds * 1000))
        if self._wake_read in happened:
            os.read(self._wake_read, 4096)
        return happened.get(fd, 0) if fd is not None else 0

    def _open(self) -> None:
        try:
            self._fd = self._open_port()
        except OSError as error:
            self._complain(f"The port cannot be opened, and is tried again: {error}")
            self._wait(None, 0, self._open_again)
        else:
            self._complaint = ""

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            LOG.warning("%s", complaint)
        self._complaint = complaint

    def _close(self) -> None:
        self._leave()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _look(self, fd: int) -> None:
        poll = select.poll()
        poll.register(fd, 0)
        events = dict(poll.poll(0)).get(fd, 0)
        if events & _BROKEN:
            self._close()
            self._wait(None, 0, self._look_again)
        elif events & select.POLLHUP:
            self._probe(fd)
            self._wait(None, 0, self._look_again)
        else:
            LOG.info("The host is there")
            with self._lock:
                self._here = True
                # Ends what it may have heard half of.
                self._unsent[:] = b"\n"
            self._arrived()

    def _probe(self, fd: int) -> None:
        # A port that was unplugged reports a hang-up too, but for ever; and it cannot be read.
        try:
            os.read(fd, 0)
        except BlockingIOError:
            pass  # the host has just come
        except OSError as error:
            self._complain(f"The port is gone, and is opened again: {error}")
            self._close()

    def _leave(self) -> None:
        with self._lock:
            self._here = False
            self._unsent.clear()
        self._lines = protocol.Lines()

    def _exchange(self, fd: int) -> None:
        with self._lock:
            writing = select.POLLOUT if self._unsent else 0
        events = self._wait(fd, select.POLLIN | writing, None)
        try:
            if events & ~select.POLLOUT:
                self._read(fd, events)
            elif events:
                self._write(fd)
        except BlockingIOError:
            pass  # it is asked again
        except OSError as error:
            self._complain(f"The port broke, and is opened again: {error}")
            self._close()
            self._wait(None, 0, self._look_again)

    def _read(self, fd: int, events: int) -> None:
        data = os.read(fd, 65536)
        if data:
            for message in self._lines.feed(data):
                self._received(message)
            return
        LOG.info("The host is away")
        self._leave()
        if events & _BROKEN:
            self._close()
        self._wait(None, 0, self._look_again)

    def _write(self, fd: int) -> None:
        with self._lock:
            if self._unsent:
                del self._unsent[: os.write(fd, bytes(self._unsent[:65536]))]
