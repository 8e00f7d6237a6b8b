# SPDX-License-Identifier: Apache-2.0
"""Waiting for servers, and showing it."""

from collections.abc import Callable, Iterable
import time
from typing import Any, TextIO

from openstack import exceptions

_WIDTH = 30
_INTERVAL = 0.5


class Progress:
    """How many of some servers run: a bar on a terminal, or else a line for each.

    :param stream: where to, standard error
    :param total: how many servers there are
    """

    def __init__(self, stream: TextIO, total: int) -> None:
        self._stream = stream
        self._total = total
        self._done = 0
        self._live = stream.isatty()
        if self._live:
            self._draw()

    def add(self, name: str, status: str) -> None:
        """One more has become what it will be."""
        self._done += 1
        if self._live:
            self._draw()
        else:
            self._stream.write(f"{name}: {status} ({self._done}/{self._total})\n")
            self._stream.flush()

    def end(self) -> None:
        """Leave the terminal's line."""
        if self._live:
            self._stream.write("\n")
            self._stream.flush()

    def _draw(self) -> None:
        filled = _WIDTH * self._done // self._total
        bar = "#" * filled + "." * (_WIDTH - filled)
        self._stream.write(f"\r[{bar}] {self._done}/{self._total} clones")
        self._stream.flush()


def wait(
    compute: Any,
    clones: Iterable[dict[str, Any]],
    progress: Progress,
    *,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, str]:
    """Wait until each of the clones is ACTIVE or has failed.

    :param compute: the SDK's compute client
    :param clones: as the API answers them
    :returns: why those failed that did, by name
    """
    waiting = list(clones)
    failed = {}
    try:
        while True:
            for clone in tuple(waiting):
                status, reason = _look(compute, clone["server_id"])
                if status == "BUILD":
                    continue
                waiting.remove(clone)
                progress.add(clone["name"], status)
                if status != "ACTIVE":
                    failed[clone["name"]] = reason or f"it is {status}"
            if not waiting:
                return failed
            sleep(_INTERVAL)
    finally:
        progress.end()


def _look(compute: Any, server_id: str) -> tuple[str, str | None]:
    try:
        server = compute.get_server(server_id)
    except exceptions.NotFoundException:
        return "DELETED", None
    return server.status, (server.fault or {}).get("message")
