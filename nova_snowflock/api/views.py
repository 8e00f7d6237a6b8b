# SPDX-License-Identifier: Apache-2.0
"""What answers look like."""

from __future__ import annotations

import json
from typing import Any

from nova import objects
from nova.api.openstack import common

from nova_snowflock.api import family
from nova_snowflock.api import forking
from nova_snowflock.virt import rpc

_PAGES = ("resident", "zero", "missing")
_FETCHING = ("population", "faults", "bytes_multicast", "bytes_unicast")
_DETAILS = (
    *("reason", "keep", "params", "problems", "users"),
    *("method", "pause", "stages", "after"),
)


def created(
    fork: family.Fork, record: rpc.Record, clones: list[objects.Instance]
) -> dict[str, Any]:
    """A fork that has just been made, or the new clones of an old one."""
    return {
        "fork": {
            "id": fork.id,
            "parent_id": fork.parent,
            "state": record["state"],
            "created_at": record["created"],
            "clones": [_clone(clone) for clone in clones],
        }
    }


def listed(reports: list[forking.Report]) -> dict[str, Any]:
    """All forks of a server."""
    return {
        "forks": [
            {
                **_summary(report),
                "clones": [_listed_clone(clone) for clone in report.clones],
            }
            for report in reports
        ]
    }


def shown(report: forking.Report, *, hosts: bool) -> dict[str, Any]:
    """Everything about a fork.

    :param hosts: with the names of the hosts
    """
    record = report.record or {}
    fork = {**_summary(report), **{key: record.get(key) for key in _DETAILS}}
    if hosts:
        fork["host"] = report.fork.host
    fork["clones"] = [_shown_clone(clone, report, hosts) for clone in report.clones]
    return {"fork": fork}


def _summary(report: forking.Report) -> dict[str, Any]:
    record = report.record or {}
    return {
        "id": report.fork.id,
        "parent_id": report.fork.parent,
        "state": report.state,
        "created_at": record.get("created"),
        "checkpoint": record.get("checkpoint"),
        "size": record.get("size"),
    }


def _clone(clone: objects.Instance) -> dict[str, Any]:
    return {
        "clone_id": family.clone_id_of(clone),
        "server_id": clone.uuid,
        "name": clone.display_name,
    }


def _listed_clone(clone: objects.Instance) -> dict[str, Any]:
    return {
        **_clone(clone),
        "status": common.status_from_state(clone.vm_state, clone.task_state),
    }


def _shown_clone(clone: objects.Instance, report: forking.Report, hosts: bool) -> dict[str, Any]:
    population = report.populations.get(clone.host) or {}
    shown = {
        **_listed_clone(clone),
        "pages": {kind: population.get(kind) for kind in _PAGES},
        **{name: population.get(name) for name in _FETCHING},
        "times": json.loads(clone.system_metadata.get(rpc.TIMES, "{}")),
    }
    if hosts:
        shown["host"] = clone.host
    return shown
