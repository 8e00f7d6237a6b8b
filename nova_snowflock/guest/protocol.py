# SPDX-License-Identifier: Apache-2.0
"""What an agent in a guest and the guest's host say to each other; docs/guest.rst has it all.

JSON objects, one a line, over a virtio-serial port. Both sides begin with an empty line, which ends
what the other may have read half of: a guest is forked between any two of its instructions.
"""

from __future__ import annotations

from collections.abc import Iterator
import json
from typing import Any

PORT = "org.nova-snowflock.0"
"""The name of the port."""

VERSION = 1
"""Both sides say theirs, and use what both know."""

MAX_LINE = 64 << 10
"""Bytes of a line, its end included. Longer ones are dropped."""

MAX_PIECE = 32 << 10
"""Bytes of a result in one message, before they are written in base64."""

Message = dict[str, Any]


def encode(message: Message) -> bytes:
    """A message as it is sent.

    :raises ValueError: it is too long
    """
    line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    if len(line) > MAX_LINE:
        raise ValueError(f"a message of {len(line)} bytes is longer than {MAX_LINE}")
    return line


class Lines:
    """Makes messages of the bytes that come, whatever they are."""

    def __init__(self) -> None:
        self.dropped = 0
        """Lines that were no messages: too long, or no JSON objects with a ``type``."""
        self._begun = b""
        self._skipping = False

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are complete with these bytes."""
        *lines, rest = (self._begun + data).split(b"\n")
        for line in lines:
            skipped, self._skipping = self._skipping, False
            message = None if skipped or len(line) >= MAX_LINE else _decode(line)
            if message is not None:
                yield message
            elif line or skipped:
                self.dropped += 1
        # Of a line that is too long already, only its end is waited for.
        self._skipping = self._skipping or len(rest) >= MAX_LINE
        self._begun = b"" if self._skipping else rest


def _decode(line: bytes) -> Message | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if isinstance(message, dict) and isinstance(message.get("type"), str):
        return message
    return None
