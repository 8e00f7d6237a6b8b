# SPDX-License-Identifier: Apache-2.0
"""What a clone's own metadata says of its fork.

It is there for its users and its guest, by the metadata service and the config drive, as any of a
server's metadata is. Nothing here depends on it but what is done for that guest.
"""

from collections.abc import Mapping

PREFIX = "snowflock:"
"""Of all of it; a clone does not inherit its parent's."""

CLONE_ID = "snowflock:clone_id"
FORK = "snowflock:fork"
PARENT = "snowflock:parent"
_PARAM = "snowflock:param:"

REQUEST = "snowflock:request"
"""Of the params of a fork that a program in the parent asked for: the request's ID."""

GUEST_FORK_MAX = "snowflock:guest_fork_max"
"""Set by a server's owner: how many clones its programs may have at a time."""


def inherited(metadata: Mapping[str, str]) -> dict[str, str]:
    """What a clone has of its parent's metadata."""
    return {key: value for key, value in metadata.items() if not key.startswith(PREFIX)}


def of(fork: str, parent: str, params: Mapping[str, str]) -> dict[str, str]:
    """What all clones of a fork have."""
    named = {_PARAM + key: value for key, value in params.items()}
    return {FORK: fork, PARENT: parent, **named}


def params(metadata: Mapping[str, str]) -> dict[str, str]:
    """What was given to the clones of a clone's fork."""
    return {
        key.removeprefix(_PARAM): value for key, value in metadata.items() if key.startswith(_PARAM)
    }


def fork_max(metadata: Mapping[str, str]) -> int:
    """How many clones a server's programs may have at a time; 0 if its owner has not said so."""
    value = metadata.get(GUEST_FORK_MAX, "")
    return int(value) if value.isascii() and value.isdecimal() else 0


def for_hooks(params: Mapping[str, str]) -> dict[str, str]:
    """What a user, or a program, gave to the clones of a fork."""
    return {key: value for key, value in params.items() if key != REQUEST}
