# SPDX-License-Identifier: Apache-2.0
"""Forks that a real cloud must refuse: with a reason, and before anything is stopped or made."""

from collections.abc import Iterator
import contextlib
import secrets
from typing import Any

import pytest

from devstack.embedded import identity
from devstack.embedded import openstack
from tests.cloud import family

pytestmark = pytest.mark.usefixtures("cloud")

NOBODY = "00000000-0000-4000-8000-000000000000"


@pytest.fixture(scope="module")
def parent(cloud: None) -> Iterator[str]:
    with (
        family.server(f"refused-{secrets.token_hex(2)}") as identifier,
        family.runs_on(identifier),
    ):
        yield identifier


@pytest.fixture(scope="module")
def checkpoint(parent: str) -> Iterator[str]:
    """A fork of the parent without clones."""
    with family.forked(parent, count=0, checkpoint=True) as fork:
        yield fork["id"]


def everything(server: str) -> tuple[Any, ...]:
    """What there is of servers, forks and images."""
    return (
        {(one.id, one.status) for one in family.compute().servers()},
        family.request("GET", f"/servers/{server}/forks"),
        family.captures(server),
        family.leftovers(),
    )


def refused(server: str, user: str = "demo", **arguments: Any) -> tuple[int, str]:
    """The answer to a fork that must be refused, and has no effect whatsoever."""
    before = everything(server)
    answer = family.refusal("POST", f"/servers/{server}/action", {"fork": arguments}, user)
    assert everything(server) == before
    return answer


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"count": 0}, "checkpoint"),
        ({"count": -1}, "minimum"),
        ({"count": 65}, "At most 64 clones"),
        ({"count": 10**9}, "At most 64 clones"),
        ({"count": 2, "name": "all-the-same"}, "{n}"),
        ({"hints": {"group": NOBODY}}, NOBODY),
        ({"availability_zone": "nowhere"}, "availability zone"),
        ({"key_name": "nobody-s"}, "nobody-s"),
        ({"networks": [{"uuid": NOBODY}]}, "0 network interfaces"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_bad_requests(parent: str, arguments: dict[str, Any], reason: str) -> None:
    status, message = refused(parent, **arguments)
    assert status == 400
    assert reason in message


def test_unknown(parent: str) -> None:
    body = {"fork": {"fork_id": NOBODY}}
    for server in (parent, NOBODY):
        status, message = family.refusal("POST", f"/servers/{server}/action", body)
        assert status == 404
        assert NOBODY in message


def test_readers_and_strangers(parent: str, checkpoint: str) -> None:
    forks = f"/servers/{parent}/forks"
    fork = f"{forks}/{checkpoint}"
    release: dict[str, Any] = {"release": {"force": True}}
    for user, forbidden in (("demo-reader", 403), ("other", 404)):
        before = everything(parent)
        assert refused(parent, user)[0] == forbidden
        assert refused(parent, user, fork_id=checkpoint)[0] == forbidden
        assert family.refusal("POST", f"{fork}/action", release, user)[0] == forbidden
        assert family.refusal("DELETE", fork, None, user)[0] == forbidden
        assert everything(parent) == before
    family.request("GET", fork, user="demo-reader")
    for path in (forks, fork):
        assert family.refusal("GET", path, None, "other")[0] == 404


def test_released_fork(parent: str) -> None:
    with family.forked(parent, count=1) as fork:
        path = f"/servers/{parent}/forks/{fork['id']}/action"
        family.request("POST", path, {"release": {"force": True}})
        assert family.show(parent, fork["id"])["state"] == "released"
        body = {"fork": {"fork_id": fork["id"]}}
        status, message = family.refusal("POST", f"/servers/{parent}/action", body)
        assert status == 404
        assert fork["id"] in message
        status, message = family.refusal("POST", path, {"release": {}})
        assert status == 404
        assert "already" in message


@pytest.mark.parametrize("resource", ["instances", "cores", "ram"])
def test_quota_by_one(parent: str, checkpoint: str, resource: str) -> None:
    admin = family.compute("admin")
    project = family.compute().get_project_id()
    limits = family.compute().get_limits().absolute
    used = {
        "instances": limits.instances_used,
        "cores": limits.total_cores_used,
        "ram": limits.total_ram_used,
    }[resource]
    each = 256 if resource == "ram" else 1
    with quota(admin, project, resource, used + 3 * each - 1):
        for arguments in ({}, {"fork_id": checkpoint}):
            status, message = refused(parent, count=3, **arguments)
            assert status == 403
            assert resource in message


@contextlib.contextmanager
def quota(admin: Any, project: str, resource: str, limit: int) -> Iterator[None]:
    before = admin.get_quota_set(project)[resource]
    admin.update_quota_set(project, **{resource: limit})
    try:
        yield
    finally:
        admin.update_quota_set(project, **{resource: before})


def test_states_of_one_that_runs(parent: str, checkpoint: str) -> None:
    compute = family.compute()
    for do, undo, wanted, reason in (
        (compute.lock_server, compute.unlock_server, "ACTIVE", "locked"),
        (compute.pause_server, compute.unpause_server, "PAUSED", "paused"),
        (compute.suspend_server, compute.resume_server, "SUSPENDED", "suspended"),
    ):
        do(parent)
        try:
            family.wait_for_status(parent, wanted, 60)
            status, message = refused(parent)
            assert status == 409
            assert reason in message
            if reason == "locked":
                assert refused(parent, fork_id=checkpoint)[0] == 409
        finally:
            undo(parent)
            family.wait_for_status(parent, seconds=60)


def test_states_of_one_that_does_not(checkpoint: str) -> None:
    compute = family.compute()
    with family.server("resting") as resting:
        status, message = refused(resting, fork_id=checkpoint)
        assert status == 404
        assert "no fork" in message
        compute.stop_server(resting)
        family.wait_for_status(resting, "SHUTOFF", 60)
        status, message = refused(resting)
        assert status == 409
        assert "stopped" in message
        compute.shelve_server(resting)
        family.wait_for_status(resting, "SHELVED_OFFLOADED")
        status, message = refused(resting)
        assert status == 409
        assert "shelved" in message
        shelved = identity.client().image.find_image("resting-shelved")
        identity.client().image.delete_image(shelved)
    status, message = family.refusal("POST", f"/servers/{resting}/action", {"fork": {}})
    assert status == 404


def test_building(parent: str) -> None:
    compute = family.compute()
    like = compute.get_server(parent)
    with family.stopped(openstack.CONDUCTOR):
        building = compute.create_server(
            name="building",
            image_id=like.image.id,
            flavor_id=compute.find_flavor("tiny").id,
            networks="none",
        )
        status, message = family.refusal("POST", f"/servers/{building.id}/action", {"fork": {}})
        assert status == 409
        assert "building" in message
        compute.delete_server(building.id)
    family.delete(building.id)
