# SPDX-License-Identifier: Apache-2.0
"""Which forks a server has to do with, and which servers are clones of a fork.

All of it is in the system metadata of the servers: see :mod:`nova_snowflock.virt.rpc` for the keys.
"""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses

from nova import context as nova_context
from nova import objects
from nova.compute import api as compute

from nova_snowflock.virt import rpc


@dataclasses.dataclass(frozen=True)
class Fork:
    """A fork as its servers know it."""

    id: str
    parent: str
    """The parent's UUID."""
    host: str
    """The host that holds, or held, its image."""


def forks_of(server: objects.Instance, clones: Iterable[objects.Instance] = ()) -> dict[str, Fork]:
    """The forks a server is the parent of, and the one it is a clone of, by their IDs.

    :param clones: clones of this server, if any: they know forks whose images have been released
    """
    found = {}
    for clone in (*clones, server):
        origin = origin_of(clone)
        if origin is not None and (clone is server or origin.parent == server.uuid):
            found[origin.id] = origin
    for key, host in server.system_metadata.items():
        if key.startswith(rpc.FORK_PREFIX):
            fork_id = key.removeprefix(rpc.FORK_PREFIX)
            found[fork_id] = Fork(fork_id, server.uuid, host)
    return found


def origin_of(server: objects.Instance) -> Fork | None:
    """The fork that a server is a clone of."""
    known = server.system_metadata
    if rpc.FORK not in known:
        return None
    return Fork(known[rpc.FORK], known[rpc.PARENT], known[rpc.HOST])


def clone_id_of(clone: objects.Instance) -> int:
    """1..n, unique in the fork."""
    return int(clone.system_metadata[rpc.CLONE_ID])


def clones_with(
    compute_api: compute.API,
    context: nova_context.RequestContext,
    project_id: str,
    key: str,
    value: str,
) -> list[objects.Instance]:
    """A project's clones with that system metadata (:data:`rpc.FORK` or :data:`rpc.PARENT`), of all
    cells and those that are not yet in one, by clone ID."""
    admin = context.elevated()
    # First those without a cell: they may get one at any moment. Nova's own search would not find
    # them: it looks for what it is given in their metadata, not in their system metadata.
    building = [request.instance for request in objects.BuildRequestList.get_all(admin)]
    placed = compute_api.get_all(
        admin,
        search_opts={"project_id": project_id, "deleted": False, "system_metadata": {key: value}},
        expected_attrs=["system_metadata"],
    )
    found = {
        server.uuid: server
        for server in (*building, *placed)
        if server.project_id == project_id and server.system_metadata.get(key) == value
    }
    return sorted(found.values(), key=clone_id_of)
