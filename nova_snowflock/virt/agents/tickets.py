# SPDX-License-Identifier: Apache-2.0
"""Tickets: what programs in this host's guests have been granted, and what came of it."""

from collections.abc import Iterator
import contextlib
import dataclasses
import glob
import json
import os
import time

from nova_snowflock.virt import record_files

GRANTED = "granted"
CLONING = "cloning"
CLONED = "cloned"
JOINED = "joined"
"""Its clones are deleted; it is kept for a while, for who did not hear that."""


class NoTicket(Exception):
    """There is no such ticket. The message is for the guest."""


@dataclasses.dataclass
class Ticket:
    """Good for ``n`` clones, once.

    :param id: its UUID
    :param server: UUID of the server whose program asked for it
    :param granted_to: the request that it answers
    :param state: one of the above
    :param used_by: the request that uses, or has used, it, and those before that got no answer
    :param fork: UUID of the fork whose clones they are
    :param first: the clone ID of the first of them
    :param clones: the clones' servers, by clone ID, in text as JSON has it
    :param exits: the status of each clone that has exited, by clone ID
    :param joined_by: the request that joined it
    :param joined_at: seconds since the epoch
    :param outcome: what that was told
    """

    id: str
    server: str
    n: int
    granted_to: str
    state: str = GRANTED
    used_by: list[str] = dataclasses.field(default_factory=list)
    fork: str | None = None
    first: int = 1
    clones: dict[str, str] = dataclasses.field(default_factory=dict)
    exits: dict[str, int] = dataclasses.field(default_factory=dict)
    joined_by: str | None = None
    joined_at: float | None = None
    outcome: list[dict[str, object]] = dataclasses.field(default_factory=list)

    def is_of(self, fork: str, clone_id: int) -> bool:
        """Whether that clone of that fork is one of its clones."""
        return self.fork == fork and self.first <= clone_id < self.first + self.n

    @property
    def clone_ids(self) -> range:
        return range(self.first, self.first + self.n)


class Tickets:
    """Those of this host, and the results of their clones.

    :param directory: theirs; made if it is not there
    """

    def __init__(self, directory: str) -> None:
        self._files = record_files.RecordFiles(directory)

    def __iter__(self) -> Iterator[Ticket]:
        for identity in self._files:
            with contextlib.suppress(NoTicket):  # it was just removed
                yield self.get(identity)

    def of(self, server: str) -> list[Ticket]:
        """A server's, but those that have been joined."""
        return [one for one in self if one.server == server and one.state != JOINED]

    def get(self, identity: str) -> Ticket:
        """:raises NoTicket: there is none"""
        try:
            return Ticket(**json.loads(self._files.read(identity)))
        except (FileNotFoundError, TypeError, ValueError):
            raise NoTicket(f"There is no ticket {identity[:36]!r}") from None

    def find(self, fork: str, clone_id: int) -> Ticket | None:
        """That which a clone was made with."""
        return next((one for one in self if one.is_of(fork, clone_id)), None)

    def put(self, ticket: Ticket) -> None:
        """Keep a ticket, or what has changed of it."""
        self._files.write(ticket.id, json.dumps(dataclasses.asdict(ticket)))

    def remove(self, ticket: Ticket) -> None:
        """Forget a ticket, and the results of its clones."""
        # Nobody would find the results of one that is not there any more.
        for path in glob.glob(glob.escape(self._files.path(ticket.id, "")) + ".result.*"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
        self._files.remove(ticket.id)

    def sweep(self, seconds: float) -> None:
        """Forget those that were joined longer ago."""
        for one in self:
            if one.joined_at is not None and time.time() - one.joined_at > seconds:
                self.remove(one)

    def write_result(self, ticket: Ticket, clone_id: int, offset: int, data: bytes) -> None:
        """Have these bytes at that place of a clone's result, which ends with them.

        :raises ValueError: what comes before them is not there
        """
        with open(self._result(ticket, clone_id), "ab", opener=record_files.private) as file:
            if offset > file.tell():
                raise ValueError(f"The result has {file.tell()} bytes, not {offset}")
            file.truncate(offset)
            file.write(data)

    def read_result(self, ticket: Ticket, clone_id: int, offset: int, size: int) -> bytes:
        """At most ``size`` bytes of a clone's result; none behind its end."""
        try:
            with open(self._result(ticket, clone_id), "rb") as file:
                file.seek(offset)
                return file.read(size)
        except FileNotFoundError:
            return b""

    def _result(self, ticket: Ticket, clone_id: int) -> str:
        return self._files.path(ticket.id, f".result.{clone_id:d}")
