# SPDX-License-Identifier: Apache-2.0
"""Connections to ports of guests, which only root can make, for who is not root."""

import contextlib
import os
import socket
import threading

from nova_snowflock.virt import privileged

_TIMEOUT = 10.0


class Courier:
    """Has the privileged process make them, and takes them from it.

    :param directory: of this user's, for the address where they are taken
    """

    def __init__(self, directory: str) -> None:
        self._address = os.path.join(directory, "courier")
        # One is taken at a time.
        self._lock = threading.Lock()

    def fetch(self, server: str) -> socket.socket:
        """A connection to the port of a server's agent.

        :raises OSError: it has no such port, or does not run
        """
        with self._lock, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as taker:
            self._forget()
            taker.bind(self._address)
            try:
                taker.settimeout(_TIMEOUT)
                privileged.send_channel(server, self._address)
                sent, descriptors, _, _ = socket.recv_fds(taker, len(server), 1)
            finally:
                self._forget()
        connections = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        if sent.decode() != server or not connections:
            raise OSError(f"The connection to server {server} did not arrive")
        return connections[0]

    def _forget(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._address)
