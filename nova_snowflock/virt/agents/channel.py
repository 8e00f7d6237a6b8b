# SPDX-License-Identifier: Apache-2.0
"""One guest's agent, as its host hears it."""

from collections.abc import Iterator
import contextlib
import socket
import struct
import threading
import time

from nova_snowflock.guest import protocol

_RATE = 1 << 20
_BURST = 8 << 20
"""Bytes a second that a guest is heard, and what it may say at once."""
_COST = 64 << 10
"""Bytes that a message counts for at least: handling it is what costs its host."""
_SEND_TIMEOUT = 10
"""Seconds that a guest may leave what it is told unread."""
_TIMEVAL = struct.Struct("@ll")
_READ = 64 << 10


class Closed(Exception):
    """The guest's machine has ended, or its guest does not take what is said to it."""


class Channel:
    """A connection to the port of a guest's agent.

    One thread hears, any may speak.

    :param connection: a stream socket
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        # Hearing waits for as long as it takes; speaking does not (socket(7)).
        self._connection.settimeout(None)
        self._connection.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(_SEND_TIMEOUT, 0)
        )
        self._speaking = threading.Lock()
        self._lines = protocol.Lines()
        self._allowance = float(_BURST)
        self._counted = time.monotonic()
        try:
            self._send(b"\n")
        except Closed:
            self.close()
            raise

    @property
    def dropped(self) -> int:
        """Lines that made no sense."""
        return self._lines.dropped

    def messages(self) -> Iterator[protocol.Message]:
        """What the agent says, for as long as its machine is there."""
        while True:
            try:
                data = self._connection.recv(_READ)
            except OSError:
                return
            if not data:
                return
            heard = 0
            for message in self._lines.feed(data):
                heard += _COST
                # Before each: there may be thousands in what was read.
                self._slow_down(_COST)
                yield message
            self._slow_down(max(len(data) - heard, 0))

    def say(self, message: protocol.Message) -> None:
        """
        :raises Closed: nobody hears it
        """
        self._send(protocol.encode(message))

    def close(self) -> None:
        """For the thread that hears, when it does not any more."""
        self._end()
        # Not while one speaks: its descriptor could be another guest's connection by then.
        with self._speaking:
            self._connection.close()

    def _send(self, data: bytes) -> None:
        try:
            with self._speaking:
                self._connection.sendall(data)
        except OSError as error:
            # Half a line may have been sent. A new connection begins with an end of it.
            self._end()
            raise Closed(str(error)) from error

    def _end(self) -> None:
        """Have :meth:`messages` end, and whoever speaks."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def _slow_down(self, cost: int) -> None:
        """A guest that says too much is not read for a while, so it has to wait itself."""
        now = time.monotonic()
        refilled = self._allowance + (now - self._counted) * _RATE
        self._counted = now
        self._allowance = min(refilled, _BURST) - cost
        if self._allowance < 0:
            time.sleep(-self._allowance / _RATE)
