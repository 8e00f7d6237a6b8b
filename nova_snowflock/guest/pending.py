# SPDX-License-Identifier: Apache-2.0
"""What programs have asked and the host has not answered yet."""

from __future__ import annotations

import binascii
import os
import threading
from typing import Any

from nova_snowflock.guest import protocol

LIMIT = 64
"""Requests at a time."""

_READY = b"\0"


class Refusal(Exception):
    """A request that is not even sent. ``kind`` as docs/guest.rst lists them."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Request:
    """One of them. Its descriptor can be read from when it has been answered."""

    def __init__(self, call: str, arguments: dict[str, Any]) -> None:
        """:raises Refusal: it is too long"""
        self.id = os.urandom(16).hex()
        self.call = call
        self.message: protocol.Message = {
            "type": "request",
            "id": self.id,
            "call": call,
            "arguments": arguments,
        }
        try:
            protocol.encode(self.message)
        except ValueError as error:
            raise Refusal("invalid", f"The request is too long: {error}.") from error
        self._reply: dict[str, Any] = {}
        self._parts: dict[int, bytearray] = {}
        self._lock = threading.Lock()
        self._read, self._write = os.pipe()

    def fileno(self) -> int:
        """A descriptor to poll."""
        return self._read

    def wait(self) -> dict[str, Any]:
        """The answer, when it is there: an object with ``result`` or ``error``."""
        os.read(self._read, 1)
        return self._reply

    def part(self, message: protocol.Message) -> None:
        """Keep a piece of a result.

        :raises ValueError: it is none, or one before it is missing
        """
        clone_id, offset, data = (message.get(name) for name in ("clone_id", "offset", "data"))
        if not isinstance(clone_id, int) or not isinstance(offset, int) or offset < 0:
            raise ValueError("a piece of a result says neither of which clone it is, nor where")
        if not isinstance(data, str):
            raise ValueError(f"a piece of the result of clone {clone_id} has no data")
        whole = self._parts.setdefault(clone_id, bytearray())
        if offset > len(whole):
            raise ValueError(f"the result of clone {clone_id} misses a piece")
        whole[offset:] = binascii.a2b_base64(data)

    def answer(self, message: protocol.Message) -> None:
        """Give the asker what the host has answered."""
        if isinstance(message.get("result"), dict):
            self.finish(self._joined(message["result"]))
        elif isinstance(message.get("error"), dict):
            self.finish({"error": message["error"]})
        else:
            self.fail("failed", "The host's answer made no sense.")

    def fail(self, kind: str, message: str) -> None:
        """Give the asker an error."""
        self.finish({"error": {"kind": kind, "message": message}})

    def finish(self, reply: dict[str, Any]) -> None:
        """Give the asker an answer, if it waits yet."""
        with self._lock:
            if self._write >= 0 and not self._reply:
                self._reply = reply
                os.write(self._write, _READY)

    def close(self) -> None:
        """The asker waits no more."""
        with self._lock:
            if self._write >= 0:
                os.close(self._read)
                os.close(self._write)
                self._read = self._write = -1

    def _joined(self, result: dict[str, Any]) -> dict[str, Any]:
        clones = result.get("clones")
        if self.call != "join" or not isinstance(clones, list):
            return {"result": result}
        joined = []
        for clone in clones:
            if not isinstance(clone, dict):
                continue
            whole = bytes(self._parts.get(clone.get("clone_id", 0), b""))
            if len(whole) != clone.get("size", len(whole)):
                message = f"The result of clone {clone.get('clone_id')} did not come whole."
                return {"error": {"kind": "failed", "message": message}}
            text = binascii.b2a_base64(whole, newline=False).decode()
            joined.append({**clone, "result": text})
        return {"result": {**result, "clones": joined}}


class Table:
    """All of them, by ID. The agent's lock is held by whoever uses it."""

    def __init__(self) -> None:
        self._requests: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def all(self) -> list[Request]:
        """In the order in which they were asked."""
        return list(self._requests.values())

    def add(self, request: Request) -> None:
        """
        :raises Refusal: there are too many
        """
        if len(self._requests) >= LIMIT:
            raise Refusal("busy", f"{LIMIT} requests wait for an answer already.")
        self._requests[request.id] = request

    def get(self, identity: Any) -> Request | None:
        """The request of that ID, unless it was answered or forgotten."""
        return self._requests.get(identity) if isinstance(identity, str) else None

    def take(self, identity: Any) -> Request | None:
        """Likewise, and it is not in the table any more."""
        return self._requests.pop(identity, None) if isinstance(identity, str) else None

    def take_all(self) -> list[Request]:
        """Empty the table."""
        requests = self.all()
        self._requests.clear()
        return requests
