# SPDX-License-Identifier: Apache-2.0
"""Talk to the workload inside a test guest."""

import json
import os
import secrets
import socket
import time
from types import TracebackType
from typing import Any, Self


class GuestError(Exception):
    """The guest could not do what it was asked, or did not answer."""


class GuestClient:
    """A connection to a guest's virtio-serial port, through the UNIX socket that QEMU made for it.

    QEMU takes one connection at a time. The commands and their arguments are those of
    :class:`tests.guest.workload.Workload`.
    """

    def __init__(self, path: str, timeout: float = 60.0) -> None:
        self._timeout = timeout
        # A socket address holds 108 bytes: too few for a path through /proc/PID/root.
        directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")
        except OSError:
            self._socket.close()
            raise
        finally:
            os.close(directory)
        self._received = b""
        # Ends the line of which the guest may have received half before it was forked.
        self._socket.sendall(b"\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def call(self, command: str, *, timeout: float | None = None, **arguments: Any) -> Any:
        """The guest's answer; answers to requests of an earlier client are passed over.

        :raises GuestError: it refused, with its reason, or did not answer within `timeout` seconds.
        """
        identity = secrets.token_hex(8)
        deadline = time.monotonic() + (timeout or self._timeout)
        request = {"id": identity, "command": command, **arguments}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            try:
                reply = json.loads(self._line(deadline))
            except ValueError:
                continue
            # A terminal that nobody has made raw yet echoes the request.
            if isinstance(reply, dict) and reply.get("id") == identity and "command" not in reply:
                break
        if "error" in reply:
            raise GuestError(f"{command}: {reply['error']}")
        return reply["result"]

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._received:
            self._socket.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                received = self._socket.recv(1 << 16)
            except TimeoutError:
                raise GuestError("no answer in time") from None
            if not received:
                raise GuestError("the guest's port was closed")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        return line
