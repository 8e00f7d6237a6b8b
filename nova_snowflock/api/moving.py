# SPDX-License-Identifier: Apache-2.0
"""Refusing to move a server that is bound to its host by a fork.

The driver refuses too, but Nova has answered its user by then, who would not get to know why
nothing happens.
"""

from __future__ import annotations

from collections.abc import Callable
import functools
from typing import Any

from nova.api.openstack import common
from nova.api.openstack import wsgi
from nova.compute import api as compute
from webob import exc

from nova_snowflock.virt import rpc

ACTIONS = {"migrate", "resize"}

Action = Callable[..., Any]


def guard(actions: dict[str, Action], compute_api: compute.API) -> None:
    """Have those of a server's actions that move its disks refuse what cannot be moved."""
    for name in actions.keys() & ACTIONS:
        actions[name] = _guarded(actions[name], compute_api)


def _guarded(action: Action, compute_api: compute.API) -> Action:
    @functools.wraps(action)
    def guarded(req: wsgi.Request, id: str, **arguments: Any) -> Any:
        context = req.environ["nova.context"]
        server = common.get_instance(compute_api, context, id, expected_attrs=["system_metadata"])
        reason = rpc.why_disks_bound(server.system_metadata)
        if reason is not None:
            raise exc.HTTPConflict(explanation=f"Server {id} cannot be moved: {reason}")
        return action(req=req, id=id, **arguments)

    return guarded
