# SPDX-License-Identifier: Apache-2.0
"""The control socket of a memory server or memtap, and its client.

A UNIX stream socket that only root may use. A connection carries one request, a JSON object with
``command`` and its arguments on one line, descriptors beside it if the command takes some, and one
answer: ``{"result": {...}}`` or ``{"error": "a sentence"}``.
"""

import argparse
import base64
from collections.abc import Callable, Mapping, Sequence
import json
import logging
import os
import socket
import struct
import sys
import threading
from typing import Any, NamedTuple

from nova_snowflock import exception
from nova_snowflock.memtap import loop as event_loop

LOG = logging.getLogger(__name__)

_MAX_REQUEST = 64 << 20
_MAX_FDS = 64
_TIMEOUT = 10.0
_CREDENTIALS = struct.Struct("=iII")

Command = Callable[[dict[str, Any], list[int]], dict[str, Any]]
"""Takes arguments and descriptors, returns the result. The descriptors it leaves are closed."""


class ControlServer:
    """Answers on the control socket from a thread of its own; commands run on the loop's."""

    def __init__(self, path: str, commands: Mapping[str, Command], loop: event_loop.Loop) -> None:
        self._commands = commands
        self._loop = loop
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        previous = os.umask(0o177)
        try:
            self._socket.bind(path)
        finally:
            os.umask(previous)
        self._socket.listen()
        self._answering = threading.Lock()

    def start(self) -> None:
        """Answer from now on."""
        threading.Thread(target=self._serve, name="control", daemon=True).start()

    def drain(self) -> None:
        """Let the last answer get out, and answer no more."""
        self._answering.acquire(timeout=_TIMEOUT)

    def _serve(self) -> None:
        while True:
            connection, _ = self._socket.accept()
            with connection, self._answering:
                connection.settimeout(_TIMEOUT)
                try:
                    self._answer(connection)
                except OSError as error:
                    LOG.warning("A control connection broke off: %s", error)

    def _answer(self, connection: socket.socket) -> None:
        if _credentials(connection)[1] != 0:
            LOG.warning("A control connection was refused: it is not from root")
            return
        data, fds = _receive(connection)
        if not data:
            return  # whoever connected wanted to know only that someone listens
        answer: dict[str, object]
        try:
            answer = {"result": self._run(data, fds)}
        except (exception.SnowFlockError, ValueError, TimeoutError) as error:
            answer = {"error": str(error) or type(error).__name__}
        except Exception as error:
            LOG.exception("A control command failed")
            answer = {"error": f"{type(error).__name__}: {error}"}
        finally:
            for fd in fds:
                os.close(fd)
        connection.sendall(json.dumps(answer).encode() + b"\n")

    def _run(self, data: bytes, fds: list[int]) -> dict[str, Any]:
        try:
            arguments = json.loads(data)
            command = self._commands[arguments.pop("command")]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise exception.ControlError(f"not a command: {error!r}") from error
        return self._loop.call(lambda: command(arguments, fds))


class ControlClient:
    """Asks one memory server or memtap."""

    def __init__(self, path: str, timeout: float = _TIMEOUT) -> None:
        """
        :param path: its control socket
        :param timeout: how many seconds to wait for an answer
        """
        self.path = path
        self.timeout = timeout

    def call(self, command: str, fds: Sequence[int] = (), **arguments: object) -> dict[str, Any]:
        """Run a command and return its result.

        :param fds: descriptors that the process gets copies of
        :raises ControlError: it does not answer, or refuses; the message is its own
        """
        request = json.dumps({"command": command, **arguments}).encode() + b"\n"
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self.timeout)
                connection.connect(self.path)
                sent = socket.send_fds(connection, [request], list(fds))
                if sent < len(request):
                    connection.sendall(request[sent:])
                data, _ = _receive(connection)
        except OSError as error:
            raise exception.ControlError(f"{self.path} does not answer: {error}") from error
        try:
            answer = json.loads(data)
        except ValueError as error:
            raise exception.ControlError(f"{self.path} closed without an answer") from error
        if "error" in answer:
            raise exception.ControlError(f"{self.path}: {answer['error']}")
        result: dict[str, Any] = answer["result"]
        return result

    def peer(self) -> int:
        """The process's PID.

        :raises ControlError: no process listens
        """
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self.timeout)
                connection.connect(self.path)
                return _credentials(connection)[0]
        except OSError as error:
            raise exception.ControlError(f"{self.path} does not answer: {error}") from error

    def status(self) -> dict[str, Any]:
        """State and counters; docs/control.rst lists them."""
        return self.call("status")

    def stop(self) -> None:
        """End the process."""
        self.call("stop")


class PublishedFile(NamedTuple):
    """A file of an image as its memory server has it: ``size`` in bytes, ``page_map`` encoded."""

    number: int
    name: str
    size: int
    page_map: bytes


class Published(NamedTuple):
    """What a memory server is ready to serve, and from where (``host:port``)."""

    files: tuple[PublishedFile, ...]
    servers: tuple[str, ...]
    group: str | None


class MemoryServerClient(ControlClient):
    """Asks a memory server."""

    def publish(self, files: Sequence[dict[str, Any]], fds: Sequence[int]) -> Published:
        """Have it open the image's files.

        :param files: as the command ``publish`` takes them (docs/control.rst)
        :param fds: their descriptors, in order; it gets copies
        :raises ControlError: it refuses
        """
        result = self.call("publish", fds, files=list(files))
        return Published(
            tuple(
                PublishedFile(
                    file["number"], file["name"], file["size"], base64.b64decode(file["page_map"])
                )
                for file in result["files"]
            ),
            tuple(result["servers"]),
            result["group"],
        )

    def serve(self, descriptor: bytes) -> None:
        """Have it answer requests from now on, for the encoded descriptor too.

        :raises ControlError: it refuses
        """
        self.call("serve", descriptor=base64.b64encode(descriptor).decode())


class MemtapClient(ControlClient):
    """Asks a memtap."""

    def detach(self, population: str = "background") -> dict[str, Any]:
        """Have it fetch what is missing and then let go of the memory server.

        :raises ControlError: it knows no such policy, or does not answer
        """
        return self.call("detach", population=population)


def _credentials(connection: socket.socket) -> tuple[int, int, int]:
    """PID, user ID and group ID of the other end (unix(7), SO_PEERCRED)."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(data)
    return pid, uid, gid


def _receive(connection: socket.socket) -> tuple[bytes, list[int]]:
    data, fds, _, _ = socket.recv_fds(connection, 1 << 16, _MAX_FDS)
    parts = [data]
    size = len(data)
    try:
        while data and not data.endswith(b"\n"):
            data = connection.recv(1 << 20)
            parts.append(data)
            size += len(data)
            if size > _MAX_REQUEST:
                raise OSError("the message is too long")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return b"".join(parts), fds


def main() -> int:
    """Entry point of ``snowflock-control``."""
    parser = argparse.ArgumentParser(description="Ask a memory server or memtap.")
    parser.add_argument("socket", help="its control socket")
    parser.add_argument("command", choices=("status", "detach", "stop"))
    arguments = parser.parse_args()
    try:
        result = ControlClient(arguments.socket).call(arguments.command)
    except exception.ControlError as error:
        print(error, file=sys.stderr)
        return 1
    json.dump(result, sys.stdout, indent=2)
    print()
    return 0
