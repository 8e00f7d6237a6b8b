# SPDX-License-Identifier: Apache-2.0
"""The monitor of the QEMU that libxl runs for a guest.

There are two (tools/libs/light/libxl_dm.c): libxl's own, on which it must not be kept waiting, and
one for libxenstat, which this is. Each takes one client at a time, others wait; so a connection is
made for a command, and ends with it.
"""

from collections.abc import Iterator, Mapping
import contextlib
import io
import json
import os
import socket
import struct
from typing import Any

from nova_snowflock import exception

_RUN_PATH = "/run/xen"
_PATIENCE = 30.0
_LONGEST = 16 << 20
_CREDENTIALS = struct.Struct("iII")  # struct ucred: PID, user, group


class Monitor:
    """Every call raises MonitorError if QEMU refuses, with its own message, or does not answer.

    :param domain: Xen's number of the guest
    """

    def __init__(self, domain: int, run_path: str = _RUN_PATH) -> None:
        self._path = os.path.join(run_path, f"qmp-libxenstat-{domain}")

    def command(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """What a command returns."""
        with self._connected() as (_, stream):
            return _ask(stream, name, arguments or {})

    def pid(self) -> int:
        """QEMU's."""
        with self._connected() as (connection, _):
            peer = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid: int = _CREDENTIALS.unpack(peer)[0]
            return pid

    @contextlib.contextmanager
    def _connected(self) -> Iterator[tuple[socket.socket, io.BufferedRWPair]]:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(_PATIENCE)
                connection.connect(self._path)
                with connection.makefile("rwb") as stream:
                    # Of what happens just now it may tell first.
                    while "QMP" not in _hear(stream):
                        pass
                    _ask(stream, "qmp_capabilities", {})
                    yield connection, stream
        except OSError as error:
            raise exception.MonitorError(f"QEMU's monitor {self._path}: {error}") from error


def _ask(stream: io.BufferedRWPair, name: str, arguments: Mapping[str, Any]) -> Any:
    stream.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
    stream.flush()
    while True:
        said = _hear(stream)
        if "return" in said:
            return said["return"]
        if "error" in said:
            raise exception.MonitorError(f"QEMU refused {name}: {said['error'].get('desc')}")


def _hear(stream: io.BufferedRWPair) -> dict[str, Any]:
    line = stream.readline(_LONGEST)
    try:
        said = json.loads(line)
    except ValueError as error:
        raise exception.MonitorError(f"QEMU's monitor said {line[:80]!r}") from error
    if not isinstance(said, dict):
        raise exception.MonitorError(f"QEMU's monitor said {line[:80]!r}")
    return said
