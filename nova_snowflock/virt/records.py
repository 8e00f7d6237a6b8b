# SPDX-License-Identifier: Apache-2.0
"""What a compute host knows of the forks whose images it holds, across its own restarts."""

import base64
from collections.abc import Iterator
import contextlib
import dataclasses
import json
from typing import Any, Self

from nova_snowflock import exception
from nova_snowflock.virt import record_files


@dataclasses.dataclass
class Fork:
    """One fork image on its host.

    :param id: its UUID
    :param parent: UUID of the server it was made of
    :param created: ISO 8601
    :param confirmed: whether whoever asked for it has got it, and has made its clones' servers
    :param keep: seconds that it outlives its last clone's need of it; None is until it is released
    :param params: what the user gives to the clones
    :param clones: how many clone IDs were given out
    :param pause: seconds that the parent was stopped
    :param stages: where that time went
    :param after: seconds of what was done after the parent ran again
    :param size: bytes of the parent's memory
    :param vcpus: of its flavor then
    :param image_ref: its image then
    :param key: 32 bytes that everything of the image is sealed with
    :param descriptor: encoded
    :param agent: whether an agent in the guest answered before the capture
    :param network: the family's own, see :mod:`nova_snowflock.family_network`
    :param problems: sentences: what of its guest's part in the fork went wrong
    :param method: how its memory was frozen; None is not known, of a fork of an earlier release
    """

    id: str
    parent: str
    project_id: str
    created: str
    confirmed: bool
    checkpoint: bool
    keep: int | None
    params: dict[str, str]
    clones: int
    pause: float
    stages: dict[str, float]
    after: dict[str, float]
    size: int
    vcpus: int
    image_ref: str
    key: bytes = dataclasses.field(repr=False)
    descriptor: bytes = dataclasses.field(repr=False)
    agent: bool = False
    network: dict[str, str] | None = None
    problems: list[str] = dataclasses.field(default_factory=list)
    method: str | None = None

    def public(self) -> dict[str, Any]:
        """All but the image's secrets."""
        entries = dataclasses.asdict(self)
        del entries["key"], entries["descriptor"]
        return entries

    def _encode(self) -> str:
        entries = self.public()
        entries["key"] = base64.b64encode(self.key).decode()
        entries["descriptor"] = base64.b64encode(self.descriptor).decode()
        return json.dumps(entries)

    @classmethod
    def _decode(cls, text: str) -> Self:
        entries = json.loads(text)
        for secret in ("key", "descriptor"):
            entries[secret] = base64.b64decode(entries[secret])
        return cls(**entries)


class Records:
    """The forks of this host.

    :param directory: theirs; made if it is not there
    """

    def __init__(self, directory: str) -> None:
        self._files = record_files.RecordFiles(directory)

    def __iter__(self) -> Iterator[Fork]:
        for fork_id in self._files:
            with contextlib.suppress(exception.ForkNotFound):  # it was just released
                yield self.get(fork_id)

    def __contains__(self, fork_id: str) -> bool:
        return fork_id in self._files

    def get(self, fork_id: str) -> Fork:
        """:raises ForkNotFound: there is none with this ID"""
        try:
            return Fork._decode(self._files.read(fork_id))
        except FileNotFoundError:
            raise exception.ForkNotFound(f"There is no fork {fork_id} on this host") from None

    def put(self, fork: Fork) -> None:
        """Keep a fork, or what has changed of it; whole or not at all."""
        self._files.write(fork.id, fork._encode())

    def remove(self, fork_id: str) -> None:
        """Forget a fork, if it is known."""
        self._files.remove(fork_id)
