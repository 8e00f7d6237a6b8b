# SPDX-License-Identifier: Apache-2.0
"""Servers with an agent, and the programs in them."""

from collections.abc import Iterator
import contextlib
import secrets
import time
from typing import Any

from nova_snowflock.virt import marks
from tests.cloud import family
from tests.guest import client as guest_client

LOG = "/run/agent.log"
PID = "/run/agent.pid"


@contextlib.contextmanager
def parent(clones: int = 0, host: str = "host1", **options: Any) -> Iterator[str]:
    """A server on a host, whose agent knows who it is, and whose programs may have clones."""
    if clones:
        options["metadata"] = {marks.GUEST_FORK_MAX: str(clones)}
    with family.placed(f"agent-{secrets.token_hex(2)}", host, **options) as server:
        start(server)
        yield server


def start(server: str) -> None:
    """Start the agent of a server, and wait until its host has told it who it is."""
    with family.talk(server) as guest:
        shell(guest, f"snowflock-guest >{LOG} 2>&1 & echo $! >{PID}")
        family.wait_until(lambda: server in shell(guest, "snowflock info 2>&1"), 60)


def shell(guest: guest_client.GuestClient, command: str) -> str:
    """What a command in a guest says."""
    return str(guest.call("output", argv=["sh", "-c", command], timeout=120))


class Program:
    """A Python program in a server, and in the clones that it makes.

    What it says is kept on each server from its start on.
    """

    def __init__(self, server: str, source: str) -> None:
        self.server = server
        self._file = f"/run/{secrets.token_hex(4)}"
        with family.talk(server) as guest:
            shell(
                guest, f"cat >{self._file} <<'END'\nfrom nova_snowflock import guest\n{source}\nEND"
            )
            # Its last line says that it has ended, and how.
            run = f"python3 -u {self._file}; echo ended $?"
            shell(guest, f"({run}) >{self._file}.log 2>&1 &")

    def said(self, server: str | None = None) -> list[str]:
        """The lines that it has said on a server; on its own, unless another is named."""
        with family.talk(server or self.server) as guest:
            return shell(guest, f"cat {self._file}.log").splitlines()

    def ended(self, seconds: float = 120) -> list[str]:
        """All that it has said on its own server, when it has ended there.

        :raises AssertionError: not well, or not within that time
        """
        deadline = time.monotonic() + seconds
        while not (lines := self.said()) or not lines[-1].startswith("ended "):
            assert time.monotonic() < deadline, lines
            time.sleep(0.5)
        assert lines.pop() == "ended 0", lines
        return lines
