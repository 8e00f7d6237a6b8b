# SPDX-License-Identifier: Apache-2.0
"""Servers forked through the API of a real cloud, and what they are to their users."""

from collections.abc import Iterator
import contextlib
import secrets
import socket
from typing import Any

import pytest

from devstack.embedded import hosts
from devstack.embedded import settings
from tests.cloud import console
from tests.cloud import family

pytestmark = pytest.mark.usefixtures("cloud")

MIB = family.MIB


@pytest.fixture(scope="module")
def parent(cloud: None) -> Iterator[str]:
    with family.server(f"parent-{secrets.token_hex(2)}") as identifier:
        yield identifier


@contextlib.contextmanager
def forked(parent: str, **arguments: Any) -> Iterator[dict[str, Any]]:
    """A fork with running clones; all of it is gone afterwards."""
    with family.nothing_left(), family.forked(parent, **arguments) as fork:
        yield fork


def test_clones_go_on_where_the_parent_was(parent: str) -> None:
    with family.talk(parent) as guest:
        content = family.write_disk(guest, 1)
        state = guest.call("state")
    with forked(parent, count=3) as fork:
        assert [clone["clone_id"] for clone in fork["clones"]] == [1, 2, 3]
        with family.talk(parent) as guest:
            theirs = family.write_disk(guest, 2)
            guest.call("write", seed=1, pages=8)
        digests = set()
        for clone in fork["clones"]:
            server = family.compute().get_server(clone["server_id"])
            assert server.name == clone["name"]
            with family.talk(server.id) as guest:
                now = guest.call("state")
                assert now["boot_id"] == state["boot_id"]
                assert now["digest"] == state["digest"]
                assert now["tick"] > state["tick"]
                assert family.disk_digest(guest) == content
                digests.add(family.write_disk(guest, 10 + clone["clone_id"]))
        assert len(digests) == 3
        with family.talk(parent) as guest:
            assert family.disk_digest(guest) == theirs
        shown = family.show(parent, fork["id"])
        assert shown["state"] == "active"
        assert all(clone["faults"] for clone in shown["clones"])


def test_more_clones_of_an_image_start_at_its_instant(parent: str) -> None:
    with family.talk(parent) as guest:
        content = family.write_disk(guest, 3)
    with forked(parent, count=0, checkpoint=True) as checkpoint:
        assert checkpoint["clones"] == []
        with family.talk(parent) as guest:
            family.write_disk(guest, 4)
        more = family.fork(parent, fork_id=checkpoint["id"], count=2)
        try:
            assert [clone["clone_id"] for clone in more["clones"]] == [1, 2]
            for clone in more["clones"]:
                with family.talk(clone["server_id"]) as guest:
                    assert family.disk_digest(guest) == content
        finally:
            family.delete(*family.clones_of(more))


def test_clone_outlives_its_parent() -> None:
    with family.nothing_left():
        with family.server("mortal") as mortal:
            with family.talk(mortal) as guest:
                content = family.write_disk(guest, 5)
                state = guest.call("state")
            fork = family.fork(mortal, count=1, population="lazy")
            [clone] = family.clones_of(fork)
        # The parent is deleted now.
        try:
            with family.talk(clone) as guest:
                assert guest.call("digest") == state["digest"]
                assert family.disk_digest(guest) == content
            assert family.show(clone, fork["id"])["clones"][0]["server_id"] == clone
        finally:
            family.request("DELETE", f"/servers/{clone}/forks/{fork['id']}")
            family.delete(clone)


def test_clone_can_be_forked(parent: str) -> None:
    with family.talk(parent) as guest:
        content = family.write_disk(guest, 6)
        state = guest.call("state")
    with forked(parent, count=1, population="lazy") as first:
        [clone] = family.clones_of(first)
        with forked(clone, count=1) as second:
            [grandchild] = family.clones_of(second)
            with family.talk(grandchild) as guest:
                assert guest.call("digest") == state["digest"]
                assert family.disk_digest(guest) == content


def test_hard_reboot_makes_it_an_ordinary_server(parent: str) -> None:
    with family.talk(parent) as guest:
        content = family.write_disk(guest, 7)
        boot_id = guest.call("state")["boot_id"]
    with forked(parent, count=1, population="lazy") as fork:
        [clone] = family.clones_of(fork)
        family.compute().reboot_server(clone, "HARD")
        family.wait_for_status(clone)
        with family.talk(clone) as guest:
            assert guest.call("state")["boot_id"] != boot_id
            assert family.disk_digest(guest) == content


def test_everyday_verbs(parent: str) -> None:
    compute = family.compute()
    with forked(parent, count=1) as fork:
        [clone] = family.clones_of(fork)
        with family.talk(clone) as guest:
            digest = guest.call("digest")
        for verb, undo, status in (
            (compute.pause_server, compute.unpause_server, "PAUSED"),
            (compute.suspend_server, compute.resume_server, "SUSPENDED"),
        ):
            verb(clone)
            family.wait_for_status(clone, status)
            undo(clone)
            family.wait_for_status(clone)
            with family.talk(clone) as guest:
                assert guest.call("digest") == digest
        assert "output" in compute.get_server_console_output(clone)
        assert screen(clone).startswith(b"RFB ")
        compute.stop_server(clone)
        family.wait_for_status(clone, "SHUTOFF")
        compute.start_server(clone)
        family.wait_for_status(clone)
        with family.talk(clone) as guest:
            assert guest.call("tick")


def screen(server: str) -> bytes:
    """What the console that Nova names to users says first."""
    body = {"remote_console": {"protocol": "vnc", "type": "novnc"}}
    answer = family.compute().post(
        f"/servers/{server}/remote-consoles", json=body, microversion="2.90"
    )
    assert answer.status_code == 200, answer.text
    return bytes(hosts.attach(family.host_of(server)).run(_screen, server))


def _screen(server: str) -> bytes:
    """On its host."""
    [graphics] = console.description(server).iterfind("devices/graphics[@type='vnc']")
    assert graphics.get("listen") == "127.0.0.1"
    with socket.create_connection(("127.0.0.1", int(str(graphics.get("port")))), 10) as vnc:
        return vnc.recv(12)


def test_clones_are_placed_as_servers_are(parent: str) -> None:
    """By server groups and availability zones, the parent's host as any other."""
    compute, admin = family.compute(), family.compute("admin")
    group = compute.create_server_group(name="apart", policy="anti-affinity")
    empty = next(host for host in settings.HOSTS if host != family.host_of(parent))
    zone = admin.create_aggregate(name="far", availability_zone="far")
    admin.add_host_to_aggregate(zone, empty)
    try:
        with forked(parent, count=2, hints={"group": group.id}) as fork:
            clones = family.clones_of(fork)
            assert len({family.host_of(clone) for clone in clones}) == 2
            assert set(compute.get_server_group(group).member_ids) == set(clones)
        with forked(parent, count=2, availability_zone="far") as fork:
            for clone in fork["clones"]:
                assert family.host_of(clone["server_id"]) == empty
    finally:
        admin.remove_host_from_aggregate(zone, empty)
        admin.delete_aggregate(zone)
        compute.delete_server_group(group)


def test_live_migration_is_refused_with_the_reason(parent: str) -> None:
    with forked(parent, count=1, population="lazy") as fork:
        [clone] = family.clones_of(fork)
        target = next(host for host in ("host1", "host2") if host != family.host_of(clone))
        status, reason = family.refusal(
            "POST",
            f"/servers/{clone}/action",
            {
                "os-migrateLive": {
                    "host": target,
                    "block_migration": True,
                    "disk_over_commit": False,
                }
            },
            user="admin",
        )
        assert status == 400
        assert "image" in reason
        with family.talk(clone) as guest:
            assert guest.call("tick")


def test_compute_service_may_end_at_any_time(parent: str) -> None:
    """The memory server and memtaps go on, and are found again."""
    with family.talk(parent) as guest:
        digest = guest.call("digest")
    with forked(parent, count=1, population="lazy") as fork:
        [clone] = family.clones_of(fork)
        for host in {family.host_of(parent), family.host_of(clone)}:
            family.kill(hosts.nova_compute(host))
            family.start(hosts.nova_compute(host))
        with family.talk(clone) as guest:
            assert guest.call("digest") == digest
        family.wait_until(lambda: family.show(parent, fork["id"])["state"] == "active", 60)
