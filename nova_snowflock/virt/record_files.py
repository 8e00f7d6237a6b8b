# SPDX-License-Identifier: Apache-2.0
"""Files of a compute host that outlive its services, one for each record."""

from collections.abc import Iterator
import contextlib
import os
import uuid

_SUFFIX = ".json"
_DRAFT = ".new"


class RecordFiles:
    """Texts by UUIDs, which nobody but this user may read.

    :param directory: theirs; made if it is not there
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        os.makedirs(directory, mode=0o700, exist_ok=True)
        for name in os.listdir(directory):
            if name.endswith(_DRAFT):  # of someone who was killed
                os.unlink(os.path.join(directory, name))

    def __iter__(self) -> Iterator[str]:
        for name in sorted(os.listdir(self._directory)):
            if name.endswith(_SUFFIX):
                yield name.removesuffix(_SUFFIX)

    def __contains__(self, identity: str) -> bool:
        return os.path.exists(self.path(identity))

    def read(self, identity: str) -> str:
        """:raises FileNotFoundError: there is none"""
        with open(self.path(identity), encoding="ascii") as file:
            return file.read()

    def write(self, identity: str, text: str) -> None:
        """Keep a text, in place of what there was; whole or not at all."""
        path = self.path(identity)
        with open(path + _DRAFT, "w", encoding="ascii", opener=private) as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + _DRAFT, path)

    def remove(self, identity: str) -> None:
        """Forget one, if it is known."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(identity))

    def path(self, identity: str, suffix: str = _SUFFIX) -> str:
        """:raises ValueError: it is not named by a UUID"""
        if str(uuid.UUID(identity)) != identity:
            raise ValueError(f"The record {identity} is not named by a UUID")
        return os.path.join(self._directory, f"{identity}{suffix}")


def private(path: str, flags: int) -> int:
    """An opener of files that only their owner may read."""
    return os.open(path, flags, 0o600)
