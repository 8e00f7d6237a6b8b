# SPDX-License-Identifier: Apache-2.0
"""What a compute host knows of the forks whose images it holds, across its own restarts."""

import base64
from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
from typing import Any, Self
import uuid

from nova_snowflock import exception

_SUFFIX = ".json"
_DRAFT = ".new"


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
    """The forks of this host, one file each, which nobody but this user may read.

    :param directory: theirs; made if it is not there
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)
        for name in os.listdir(directory):
            if name.endswith(_DRAFT):  # of someone who was killed
                os.unlink(os.path.join(directory, name))

    def __iter__(self) -> Iterator[Fork]:
        for name in sorted(os.listdir(self._directory)):
            if name.endswith(_SUFFIX):
                with contextlib.suppress(exception.ForkNotFound):  # it was just released
                    yield self.get(name.removesuffix(_SUFFIX))

    def __contains__(self, fork_id: str) -> bool:
        return os.path.exists(self._path(fork_id))

    def get(self, fork_id: str) -> Fork:
        """:raises ForkNotFound: there is none with this ID"""
        try:
            with open(self._path(fork_id), encoding="ascii") as file:
                return Fork._decode(file.read())
        except FileNotFoundError:
            raise exception.ForkNotFound(f"There is no fork {fork_id} on this host") from None

    def put(self, fork: Fork) -> None:
        """Keep a fork, or what has changed of it; whole or not at all."""
        path = self._path(fork.id)
        with open(path + _DRAFT, "w", encoding="ascii", opener=_private) as file:
            file.write(fork._encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + _DRAFT, path)

    def remove(self, fork_id: str) -> None:
        """Forget a fork, if it is known."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(fork_id))

    def _path(self, fork_id: str) -> str:
        if str(uuid.UUID(fork_id)) != fork_id:
            raise ValueError(f"The fork {fork_id} is not named by a UUID")
        return os.path.join(self._directory, f"{fork_id}{_SUFFIX}")


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
