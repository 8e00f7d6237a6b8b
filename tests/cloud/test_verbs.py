# SPDX-License-Identifier: Apache-2.0
"""What users do with servers that are parents or clones: the table in docs/nova.rst, verb by verb.

The everyday ones are in test_fork.py.
"""

from collections.abc import Iterator
import contextlib
import secrets
from typing import Any

import pytest

from devstack.embedded import identity
from tests.cloud import family
from tests.guest import client as guest_client

pytestmark = pytest.mark.usefixtures("cloud")


@pytest.fixture(scope="module")
def content(cloud: None) -> dict[str, Any]:
    """What the module's parent has on its disk and in its memory, when it is forked."""
    return {}


@pytest.fixture(scope="module")
def qcow2_hosts(cloud: None) -> Iterator[None]:
    """Disks of servers are qcow2; those of hosts that keep them raw are in test_disks.py."""
    with family.scheduled_on("host1", "host2"):
        yield


@pytest.fixture(scope="module")
def parent(qcow2_hosts: None, content: dict[str, Any]) -> Iterator[str]:
    with family.server(f"parent-{secrets.token_hex(2)}") as identifier:
        with family.talk(identifier) as guest:
            content["disk"] = family.write_disk(guest, 1)
            content["boot_id"] = guest.call("state")["boot_id"]
        yield identifier


@contextlib.contextmanager
def clone_of(parent: str, **arguments: Any) -> Iterator[str]:
    """The UUID of a clone, of which nothing is left afterwards. It has to fetch all it reads."""
    with (
        family.nothing_left(),
        family.forked(parent, **{"population": "lazy", **arguments}) as fork,
    ):
        yield str(fork["clones"][0]["server_id"])


@contextlib.contextmanager
def snapshot_of(server: str) -> Iterator[str]:
    """The ID of an image of a server."""
    images = identity.client("demo").image
    image = family.compute().create_server_image(server, f"of-{server}", wait=True, timeout=60)
    try:
        yield str(image.id)
    finally:
        images.delete_image(image.id)


def boots_with(image: str, disk: str) -> bool:
    """Whether a server of an image has that on its disk."""
    with family.server("of-snapshot", image_name=image) as booted, family.talk(booted) as guest:
        return family.disk_digest(guest) == disk


def test_soft_reboot(parent: str, content: dict[str, Any]) -> None:
    with clone_of(parent) as clone:
        for server in (clone, parent):
            family.act(server, "reboot", {"type": "SOFT"})
            # It cannot answer.
            with contextlib.suppress(guest_client.GuestError), family.talk(server) as guest:
                guest.call("power_off", timeout=5.0)
            family.wait_for_status(server)
            with family.talk(server) as guest:
                assert guest.call("state")["boot_id"] != content["boot_id"]
                assert family.disk_digest(guest) == content["disk"]
        with family.talk(parent) as guest:
            content["boot_id"] = guest.call("state")["boot_id"]


def test_snapshots(parent: str, content: dict[str, Any]) -> None:
    """Of a parent that has an image, and was started when it had another, and of a clone that has
    to fetch its disk for it."""
    with clone_of(parent) as clone:
        with family.talk(clone) as guest:
            theirs = family.write_disk(guest, 2)
        for server, disk in ((parent, content["disk"]), (clone, theirs)):
            with snapshot_of(server) as image:
                properties = identity.client("demo").image.get_image(image).to_dict()
                assert "snowflock" not in str(properties).replace("snowflock-test", "")
                assert boots_with(image, disk)
        with family.talk(clone) as guest:
            assert guest.call("state")["boot_id"] == content["boot_id"]


def test_rescue(parent: str, content: dict[str, Any]) -> None:
    """From the rescue image, with the disk of the server as the second one."""
    with clone_of(parent) as clone:
        for server in (clone, parent):
            family.act(server, "rescue", {})
            family.wait_for_status(server, "RESCUE")
            with family.talk(server) as guest:
                assert family.disk_digest(guest, "vdb") == content["disk"]
            family.act(server, "unrescue")
            family.wait_for_status(server)
            with family.talk(server) as guest:
                assert family.disk_digest(guest) == content["disk"]
        with family.talk(parent) as guest:
            content["boot_id"] = guest.call("state")["boot_id"]


def test_rebuild(parent: str, content: dict[str, Any]) -> None:
    """A clone that is built again is a server of its image."""
    image = family.compute().get_server(parent).image["id"]
    with clone_of(parent) as clone:
        family.act(clone, "rebuild", {"imageRef": image})
        family.wait_for_status(clone)
        with family.talk(clone) as guest:
            assert guest.call("state")["boot_id"] != content["boot_id"]
            assert family.disk_digest(guest) != content["disk"]
        # It needs nothing of its fork any more.
        [fork] = family.request("GET", f"/servers/{clone}/forks")["forks"]
        family.request("POST", f"/servers/{parent}/forks/{fork['id']}/action", {"release": {}})
        family.compute().reboot_server(clone, "HARD")
        family.wait_for_status(clone)
        with family.talk(clone) as guest:
            assert family.disk_digest(guest) != content["disk"]


def test_shelve(parent: str, content: dict[str, Any]) -> None:
    """An unshelved clone is a server of its snapshot; its host needs nothing of the image."""
    with clone_of(parent) as clone:
        with family.talk(clone) as guest:
            theirs = family.write_disk(guest, 3)
        family.act(clone, "shelve")
        family.wait_for_status(clone, "SHELVED_OFFLOADED")
        family.act(clone, "unshelve")
        family.wait_for_status(clone)
        with family.talk(clone) as guest:
            assert family.disk_digest(guest) == theirs
        family.compute().reboot_server(clone, "HARD")
        family.wait_for_status(clone)
        with family.talk(clone) as guest:
            assert family.disk_digest(guest) == theirs


def test_resize(parent: str, content: dict[str, Any]) -> None:
    """Refused with the reason while disks depend on an image; then as any server's. Hosts have no
    way to bring a disk to each other, so it stays where it is."""
    body = {"resize": {"flavorRef": family.compute().find_flavor("small").id}}
    with clone_of(parent, population="eager") as clone, family.scheduled_on(family.host_of(clone)):
        status, reason = family.refusal("POST", f"/servers/{parent}/action", body)
        assert status == 409
        assert "release them first" in reason

        def accepted() -> bool:
            answer = family.compute().request(f"/servers/{clone}/action", "POST", json=body)
            assert answer.status_code in (202, 409), answer.text
            return bool(answer.status_code == 202)

        family.wait_until(accepted, 90)
        family.wait_for_status(clone, "VERIFY_RESIZE")
        family.act(clone, "confirmResize")
        family.wait_for_status(clone)
        with family.talk(clone) as guest:
            assert family.disk_digest(guest) == content["disk"]
