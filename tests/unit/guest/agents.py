# SPDX-License-Identifier: Apache-2.0
"""An agent for the programs of a guest, on a real socket, and the host behind it."""

from __future__ import annotations

import base64
from collections.abc import Callable
import json
import os
import pathlib
import random
import signal
import socket
import struct
import threading
from typing import Any

_CREDENTIALS = struct.Struct("=iII")

MAX_LINE = 64 << 10
MAX_PIECE = 32 << 10


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, kind: Any, message: Any = "not today") -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message


Answer = dict[str, Any] | bytes | Refusal | Callable[[dict[str, Any]], dict[str, Any]]
"""A result; or a line as it is sent, empty to break off; or an error; or what makes a result."""


class Agent:
    """Answers each call as it has been told to."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = str(path)
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.answers: dict[str, Answer] = {}
        self.connections = 0
        self.wrong: list[str] = []
        """What programs did against the protocol."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind(self.path)
        self._socket.listen(64)
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return  # closed
            self.connections += 1
            threading.Thread(target=self._converse, args=[connection], daemon=True).start()

    def _converse(self, connection: socket.socket) -> None:
        credentials = connection.getsockopt(
            socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size
        )
        pid = _CREDENTIALS.unpack(credentials)[0]
        with connection, connection.makefile("rb") as lines:
            try:
                for line in lines:
                    if not line.endswith(b"\n"):
                        self.wrong.append(f"half a line: {line[:100]!r}")
                    answer = self._answer(pid, line)
                    if not answer:
                        return
                    connection.sendall(answer)
                    self.answered(pid, line)
            except (BrokenPipeError, ConnectionResetError):
                return  # the program was killed

    def _answer(self, pid: int, line: bytes) -> bytes:
        if len(line) > MAX_LINE:
            self.wrong.append(f"a line of {len(line)} bytes")
        try:
            request = json.loads(line.decode())
            call, arguments = request.pop("call"), request.pop("arguments")
        except (ValueError, KeyError) as error:
            self.wrong.append(f"{line[:100]!r}: {error!r}")
            return b""
        if request:
            self.wrong.append(f"unknown: {request}")
        self.calls.append((call, arguments))
        try:
            result = self.result(pid, call, arguments)
        except Refusal as error:
            told = {"error": {"kind": error.kind, "message": error.message}}
            return json.dumps(told).encode() + b"\n"
        if isinstance(result, bytes):
            return result
        return json.dumps({"result": result}).encode() + b"\n"

    def result(self, pid: int, call: str, arguments: dict[str, Any]) -> dict[str, Any] | bytes:
        answer = self.answers.get(call, Refusal("invalid", f"unexpected: {call}"))
        if isinstance(answer, Refusal):
            raise answer
        if callable(answer):
            return answer(arguments)
        return answer

    def answered(self, pid: int, line: bytes) -> None:
        """The answer is on its way."""


class Host(Agent):
    """Grants tickets, keeps what clones leave, and stops them.

    What a clone is is up to the test: a process that is in ``clones`` when it calls, or any while
    there is a ``role``.
    """

    def __init__(self, path: pathlib.Path) -> None:
        super().__init__(path)
        self.granted = 100
        self.limit = 1 << 20
        self.role = 0
        self.clones: dict[int, int] = {}
        self.results: dict[int, bytes] = {}
        self.statuses: dict[int, int] = {}
        self.exited: list[int] = []
        self.ended: dict[int, int] = {}
        """How the processes ended: their exit status, or minus the signal."""

    def fork(self, ticket: Any, params: Any = None) -> int:
        """In place of ``clone``: processes are the machines."""
        state = random.getstate()
        for clone_id in range(1, ticket.n + 1):
            reading, writing = os.pipe()
            pid = os.fork()
            if not pid:
                os.close(writing)
                os.read(reading, 1)  # nobody calls before it is known who it is
                random.setstate(state)  # Python knows of forked processes, but not of machines
                return clone_id
            self.clones[pid] = clone_id
            os.close(reading)
            os.close(writing)
        return 0

    def result(self, pid: int, call: str, arguments: dict[str, Any]) -> dict[str, Any] | bytes:
        clone_id = self.clones.get(pid, self.role)
        if call in self.answers:
            return super().result(pid, call, arguments)
        if call == "request_ticket":
            return {"ticket": "a-ticket", "n": min(arguments["n"], self.granted)}
        if call == "clone":
            return {"clone_id": clone_id}
        if call == "put":
            return self._put(clone_id, **arguments)
        if call == "exit":
            if not clone_id:
                raise Refusal("refused", "this is no clone")
            self.statuses[clone_id] = arguments["status"]
            return {}
        if call == "join":
            return {"clones": self._join()}
        return super().result(pid, call, arguments)

    def _put(self, clone_id: int, offset: int, data: str) -> dict[str, Any]:
        piece = base64.b64decode(data, validate=True)
        result = b"" if offset == 0 else self.results[clone_id]
        if offset != len(result) or not 0 < len(piece) <= MAX_PIECE:
            self.wrong.append(f"a piece of {len(piece)} bytes at {offset}, not {len(result)}")
        if offset + len(piece) > self.limit:
            raise Refusal("refused", "the result is too large")
        self.results[clone_id] = result + piece
        return {}

    def answered(self, pid: int, line: bytes) -> None:
        if json.loads(line)["call"] == "exit" and self.clones.get(pid, self.role) in self.statuses:
            self.exited.append(pid)
            os.kill(pid, signal.SIGKILL)

    def _join(self) -> list[dict[str, Any]]:
        for pid, clone_id in self.clones.items():
            self.ended[clone_id] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        joined = []
        for clone_id in sorted({*self.clones.values(), *self.statuses}, reverse=True):
            status = self.statuses.get(clone_id)
            result = b"" if status is None else self.results.get(clone_id, b"")
            error = "the clone has crashed" if status is None else None
            joined.append(
                {
                    "clone_id": clone_id,
                    "status": status,
                    "error": error,
                    "size": len(result),
                    "result": base64.b64encode(result).decode(),
                }
            )
        self.clones.clear()
        return joined
