# SPDX-License-Identifier: Apache-2.0
"""What can be done with forks."""

import base64
import hmac
from typing import Any

from nova import objects
from nova.compute import api as compute
import nova.conf
from nova.tests import fixtures as nova_fixtures
import requests

from nova_snowflock.virt import marks
from nova_snowflock.virt import rpc
from tests.functional import base

CONF = nova.conf.CONF

_PUBLIC_KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIHqZ0cLz8vm8Yw0f2Yx2v9k7cXq5iYlq3b8b9S0m6q1L a"
_USER_DATA = base64.b64encode(b"#!/bin/sh").decode()


class ForkTest(base.ForkTestCase):
    """Making clones."""

    def test_a_clone_is_what_its_parent_is(self) -> None:
        self.start_plain_host()
        self.admin_api.post_keypair({"keypair": {"name": "key", "public_key": _PUBLIC_KEY}})
        parent = self.boot(
            name="web",
            description="The shop",
            metadata={"a": "1", "b": "2", marks.GUEST_FORK_MAX: "4"},
            key_name="key",
            user_data=_USER_DATA,
            config_drive=True,
            tags=["shop"],
        )

        fork = self.fork(parent)

        assert fork["parent_id"] == parent["id"]
        assert fork["state"] == "active"
        assert fork["created_at"] == self.images[fork["id"]]["created"]
        (clone,) = self.clones(fork)
        assert fork["clones"] == [{"clone_id": 1, "server_id": clone["id"], "name": "web-clone-1"}]
        for same in (
            "config_drive",
            "description",
            "flavor",
            "image",
            "key_name",
            "OS-EXT-SRV-ATTR:user_data",
            "tags",
            "tenant_id",
        ):
            assert clone[same] == parent[same], same
        assert clone["metadata"] == {
            **{"a": "1", "b": "2", marks.CLONE_ID: "1"},
            **marks.of(fork["id"], parent["id"], {}),
        }
        assert clone["name"] == clone["OS-EXT-SRV-ATTR:hostname"] == "web-clone-1"
        assert list(clone["addresses"]) == ["private"]
        assert clone["pinned_availability_zone"] is None
        # Nowhere but where there is the plugin.
        assert clone["OS-EXT-SRV-ATTR:host"] in ("host1", "host2")
        # The key is another user's; its content came along.
        assert clone["user_id"] != parent["user_id"]
        instance = self.orders.spawned[clone["id"]]
        assert instance.key_data == _PUBLIC_KEY
        assert [key.public_key for key in instance.keypairs] == [_PUBLIC_KEY]
        known = self.instance(clone["id"]).system_metadata
        assert {key: known[key] for key in known if key.startswith("snowflock")} == {
            rpc.FORK: fork["id"],
            rpc.HOST: "host1",
            rpc.PARENT: parent["id"],
            rpc.CLONE_ID: "1",
        }
        assert not [key for key in known if "trait" in key]

    def test_a_clone_knows_what_it_is(self) -> None:
        """By the metadata service, which its guest asks through neutron's proxy."""
        self.flags(service_metadata_proxy=True, group="neutron")
        metadata = self.useFixture(nova_fixtures.OSMetadataServer())
        parent = self.boot(metadata={"a": "1"})
        (clone,) = self.clones(self.fork(parent, params={"job": "7"}))

        signature = hmac.new(b"", clone["id"].encode(), "sha256").hexdigest()
        answer = requests.get(
            f"{metadata.md_url}openstack/latest/meta_data.json",
            headers={
                "X-Instance-ID": clone["id"],
                "X-Tenant-ID": clone["tenant_id"],
                "X-Forwarded-For": "192.168.1.3",
                "X-Instance-ID-Signature": signature,
            },
            timeout=60,
        )

        assert answer.status_code == 200, answer.text
        told = answer.json()
        assert told["uuid"] == clone["id"]
        assert told["name"] == told["hostname"].partition(".")[0] == clone["name"]
        assert told["meta"] == clone["metadata"]
        assert told["meta"][marks.CLONE_ID] == "1"
        assert told["meta"][marks.PARENT] == parent["id"]

    def test_several_clones(self) -> None:
        parent = self.boot(name="web")
        fork = self.fork(parent, count=3, name="worker {n} of web", population="eager")

        clones = self.clones(fork)
        assert [clone["name"] for clone in clones] == [f"worker {n} of web" for n in (1, 2, 3)]
        hostnames = [clone["OS-EXT-SRV-ATTR:hostname"] for clone in clones]
        assert hostnames == ["worker-1-of-web", "worker-2-of-web", "worker-3-of-web"]
        for number, clone in enumerate(clones, 1):
            known = self.orders.spawned[clone["id"]].system_metadata
            assert known[rpc.CLONE_ID] == str(number)
            assert known[rpc.POPULATION] == "eager"
        assert self.orders.captures == 1

    def test_capture_that_takes_long(self) -> None:
        parent = self.boot()
        self.flags(rpc_response_timeout=2)
        self.orders.capture_seconds = 3.0
        self.fork(parent)

    def test_what_is_asked_for_is_not_inherited(self) -> None:
        self.api.post_keypair({"keypair": {"name": "mine", "public_key": _PUBLIC_KEY}})
        parent = self.boot(metadata={"a": "1", "b": "2"}, user_data=_USER_DATA)
        group = self.api.post_server_groups({"name": "g", "policy": "anti-affinity"})
        other = base64.b64encode(b"other").decode()

        fork = self.fork(
            parent,
            count=2,
            key_name="mine",
            metadata={"b": "3"},
            user_data=other,
            availability_zone="nova",
            hints={"group": group["id"]},
            networks=[{"uuid": base.NETWORK}],
            security_groups=[{"name": "default"}],
            params={"job": "7"},
            keep=60,
        )

        clones = self.clones(fork)
        assert {clone["OS-EXT-SRV-ATTR:host"] for clone in clones} == {"host1", "host2"}
        for clone in clones:
            assert clone["key_name"] == "mine"
            assert clone["metadata"].pop(marks.CLONE_ID) in "12"
            own = {"a": "1", "b": "3", **marks.of(fork["id"], parent["id"], {"job": "7"})}
            assert clone["metadata"] == own
            assert clone["OS-EXT-SRV-ATTR:user_data"] == other
            assert clone["pinned_availability_zone"] == "nova"
            assert clone["server_groups"] == [group["id"]]
        image = self.images[fork["id"]]
        assert image["params"] == {"job": "7"}
        (more,) = self.clones(self.fork(parent, fork_id=fork["id"]))
        assert marks.params(more["metadata"]) == {"job": "7"}
        assert image["keep"] == 60

    def test_port_that_claims_to_be_the_servers(self) -> None:
        """Anybody may give a port of his own any server's ID."""
        parent = self.boot()
        foreign = "11111111-2222-4333-8444-555555555555"
        [own] = self.neutron.list_ports(is_admin=True, device_id=parent["id"])["ports"]
        self.neutron._ports[foreign] = {**own, "id": foreign, "security_groups": ["another"]}
        (clone,) = self.clones(self.fork(parent))
        (port,) = self.neutron.list_ports(is_admin=True, device_id=clone["id"])["ports"]
        assert port["security_groups"] == own["security_groups"]

    def test_no_networks(self) -> None:
        parent = self.boot(networks="none")
        for options in ({}, {"networks": "none"}):
            (clone,) = self.clones(self.fork(parent, **options))
            assert clone["addresses"] == {}
        assert "0 network interfaces" in self.refused(
            400, parent, networks=[{"uuid": base.NETWORK}]
        )

    def test_a_pinned_zone_is_inherited(self) -> None:
        parent = self.boot(availability_zone="nova")
        (clone,) = self.clones(self.fork(parent))
        assert clone["pinned_availability_zone"] == "nova"

    def test_an_administrator_chooses_the_host(self) -> None:
        parent = self.boot()
        zone = "nova:host2"
        (clone,) = self.clones(self.fork(parent, api=self.admin_api, availability_zone=zone))
        assert clone["OS-EXT-SRV-ATTR:host"] == "host2"
        self.refused(403, parent, availability_zone=zone)

    def test_all_local_disks(self) -> None:
        self.flags(max_local_block_devices=-1)
        flavor = self._create_flavor(ephemeral=10, swap=512)
        disks = [
            {
                "boot_index": 0,
                "uuid": self.boot()["image"]["id"],
                "source_type": "image",
                "destination_type": "local",
                "delete_on_termination": True,
            },
            *(
                {
                    "boot_index": -1,
                    "source_type": "blank",
                    "destination_type": "local",
                    "volume_size": size,
                    "delete_on_termination": True,
                }
                for size in (3, 4)
            ),
        ]
        parent = self.boot(flavorRef=flavor, block_device_mapping_v2=disks)

        (clone,) = self.clones(self.fork(parent))

        assert self._disks(clone["id"]) == self._disks(parent["id"])
        assert len(self._disks(clone["id"])) == 4

    def test_the_image_may_be_gone(self) -> None:
        parent = self.boot()
        self.glance.delete(None, parent["image"]["id"])
        (clone,) = self.clones(self.fork(parent))
        assert clone["image"]["id"] == parent["image"]["id"]

    def test_a_checkpoint_then_clones(self) -> None:
        parent = self.boot(name="web")
        fork = self.fork(parent, count=0, checkpoint=True)
        assert fork["clones"] == []
        assert self.images[fork["id"]]["checkpoint"]

        more = self.fork(parent, fork_id=fork["id"], count=2)
        assert more["id"] == fork["id"]
        assert more["created_at"] == fork["created_at"]
        clones = self.clones(more)
        # Also from a clone, and from a parent that no longer runs.
        last = self.fork(clones[0], fork_id=fork["id"], name="third {n}")
        assert last["parent_id"] == parent["id"]
        assert [(clone["clone_id"], clone["name"]) for clone in last["clones"]] == [(3, "third 3")]
        self._stop_server(parent)
        fourth = self.fork(parent, fork_id=fork["id"])
        assert [clone["clone_id"] for clone in fourth["clones"]] == [4]
        assert self.orders.captures == 1

    def test_a_clone_of_a_clone(self) -> None:
        parent = self.boot(name="a")
        (child,) = self.clones(self.fork(parent, name="b"))
        (grandchild,) = self.clones(self.fork(child, name="c"))
        (of_child,) = [
            fork for fork in self.get_forks(child["id"]) if fork["parent_id"] == child["id"]
        ]
        (origin,) = [
            fork for fork in self.get_forks(child["id"]) if fork["parent_id"] == parent["id"]
        ]
        assert [clone["server_id"] for clone in of_child["clones"]] == [grandchild["id"]]
        assert [clone["server_id"] for clone in origin["clones"]] == [child["id"]]

    def test_all_microversions(self) -> None:
        parent = self.boot()
        self.api.microversion = None
        fork = self.fork(parent)
        assert [listed["id"] for listed in self.get_forks(parent["id"])] == [fork["id"]]
        self.get_fork(parent["id"], fork["id"])

    def test_an_administrators_clones_are_the_projects(self) -> None:
        parent = self.boot()
        fork = self.fork(parent, api=self.stranger_admin_api)
        (clone,) = self.clones(fork)
        assert clone["tenant_id"] == parent["tenant_id"]
        shown = self.get_fork(parent["id"], fork["id"])
        assert [clone["server_id"] for clone in shown["clones"]] == [clone["id"]]

    def test_a_locked_server_is_an_administrators_to_fork(self) -> None:
        parent = self.boot()
        self.admin_api.post_server_action(parent["id"], {"lock": {}})
        assert "locked" in self.refused(409, parent)
        self.fork(parent, api=self.admin_api)

    def test_actions_and_notifications(self) -> None:
        parent = self.boot()
        self.notifier.reset()
        fork = self.fork(parent, count=2)

        assert "fork" in [
            action["action"] for action in self.admin_api.get_instance_actions(parent["id"])
        ]
        start, end = (
            notification
            for notification in self.notifier.versioned_notifications
            if notification["event_type"].startswith("instance.fork.")
        )
        assert (start["event_type"], end["event_type"]) == (
            "instance.fork.start",
            "instance.fork.end",
        )
        assert end["publisher_id"] == f"nova-api:{CONF.host}"
        said = end["payload"]["nova_object.data"]
        assert said["uuid"] == parent["id"]
        assert said["fork_id"] == fork["id"]
        assert said["count"] == 2
        assert said["clones"] == [clone["server_id"] for clone in fork["clones"]]
        assert start["payload"]["nova_object.data"]["clones"] == []

    def _disks(self, uuid: str) -> list[tuple[str, str, int, str]]:
        context = self.instance(uuid)._context
        disks = objects.BlockDeviceMappingList.get_by_instance_uuid(context, uuid)
        return sorted(
            (disk.device_name, disk.source_type, disk.volume_size, disk.guest_format)
            for disk in disks
        )

    def test_snapshots_know_nothing_of_forks(self) -> None:
        parent = self.boot()
        (clone,) = self.clones(self.fork(parent))
        for server in (parent, clone):
            self._snapshot_server(server, "snapshot")
        for image in self.glance.detail(None):
            assert not [key for key in image["properties"] if "snowflock" in key]


class LookTest(base.ForkTestCase):
    """Seeing forks, and getting rid of them."""

    def setUp(self) -> None:
        super().setUp()
        self.parent = self.boot(name="web")
        self.forked = self.fork(self.parent, count=2)
        self.servers = self.clones(self.forked)
        self.path = f"/servers/{self.parent['id']}/forks/{self.forked['id']}"

    def test_list(self) -> None:
        checkpoint = self.fork(self.parent, count=0, checkpoint=True)
        forks = {fork["id"]: fork for fork in self.get_forks(self.parent["id"])}
        assert forks.keys() == {self.forked["id"], checkpoint["id"]}
        assert forks[checkpoint["id"]]["clones"] == []
        expected = [{**clone, "status": "ACTIVE"} for clone in self.forked["clones"]]
        assert forks[self.forked["id"]]["clones"] == expected
        # The same for readers, and of a clone its own fork only.
        (listed,) = self.get_forks(self.servers[1]["id"], api=self.reader_api)
        assert listed == forks[self.forked["id"]]
        assert self.get_forks(self.boot()["id"]) == []

    def test_show(self) -> None:
        fork = self.get_fork(self.parent["id"], self.forked["id"], api=self.reader_api)
        assert fork["method"] == "copy-on-write"
        assert fork["pause"] == 0.006
        assert fork["stages"] == {"freeze": 0.004}
        assert fork["size"] == 512 << 20
        for clone in fork["clones"]:
            assert clone["pages"] == {"resident": 10, "zero": 20, "missing": 30}
            assert clone["population"] == "background"
            assert clone["faults"] == 4
            assert clone["times"] == {}
            assert "host" not in clone
        assert "host" not in fork
        # One question for each host.
        assert len(self.orders.populations) == len(set(self.orders.populations))
        # Only administrators know hosts.
        fork = self.get_fork(self.servers[0]["id"], self.forked["id"], api=self.admin_api)
        assert fork["host"] == "host1"
        assert [clone["host"] for clone in fork["clones"]] == [
            clone["OS-EXT-SRV-ATTR:host"] for clone in self.servers
        ]

    def test_show_what_is_known(self) -> None:
        self.stop_host("host1")
        self.stop_host("host2")
        fork = self.get_fork(self.parent["id"], self.forked["id"])
        assert fork["state"] == "unknown"
        assert fork["size"] is None
        assert [clone["pages"]["resident"] for clone in fork["clones"]] == [None, None]
        assert self.orders.populations == []

    def test_the_parent_may_be_gone(self) -> None:
        self._delete_server(self.parent)
        clone = self.servers[0]["id"]
        fork = self.get_fork(clone, self.forked["id"])
        assert fork["state"] == "active"
        assert fork["parent_id"] == self.parent["id"]
        self.fork(self.servers[0], fork_id=self.forked["id"])

    def test_delete(self) -> None:
        self.fork(self.parent, fork_id=self.forked["id"])
        other = self.fork(self.parent)
        self.api.api_delete(self.path, check_response_status=[204])
        for clone in self.servers:
            self._wait_until_deleted(clone)
        assert list(self.images) == [other["id"]]
        self._gone()
        remaining = {server["id"] for server in self.api.get_servers()}
        assert remaining == {self.parent["id"], other["clones"][0]["server_id"]}

    def test_delete_all_or_nothing(self) -> None:
        self.admin_api.post_server_action(self.forked["clones"][1]["server_id"], {"lock": {}})
        self._refused(409, "DELETE", "locked")
        self.stop_host("host1")
        self._refused(409, "DELETE", "down", api=self.admin_api)
        self._refused(409, "release", "down")
        assert len(self.get_fork(self.parent["id"], self.forked["id"])["clones"]) == 2
        assert self.images

    def test_delete_after_the_host(self) -> None:
        self._remove_host1()
        assert self.get_fork(self.parent["id"], self.forked["id"])["state"] == "lost"
        self.api.api_delete(self.path, check_response_status=[204])
        self._gone()

    def test_release(self) -> None:
        self.images[self.forked["id"]]["users"] = 1
        release: dict[str, Any] = {"release": {}}
        answer = self.post(f"{self.path}/action", release)
        assert answer.status_code == 409
        assert "still fetch" in answer.text
        bad: dict[str, Any]
        for bad in ({}, {"release": {"force": 1}}, {"release": {"x": 1}}, {"keep": {}}):
            assert self.post(f"{self.path}/action", bad).status_code == 400, bad
        answer = self.post(f"{self.path}/action", {"release": {"force": True}})
        assert answer.status_code == 204
        assert not self.images
        # Its clones live on, and so does the knowledge of what they are.
        fork = self.get_fork(self.parent["id"], self.forked["id"])
        assert fork["state"] == "released"
        assert len(fork["clones"]) == 2
        assert self.post(f"{self.path}/action", release).status_code == 404
        self.refused(404, self.parent, fork_id=self.forked["id"])
        # There is nothing to release, but there are clones to delete.
        self.api.api_delete(self.path, check_response_status=[204])
        self._gone()

    def test_unknown_forks(self) -> None:
        other = self.boot()
        for server, fork in (
            (self.parent["id"], self.parent["id"]),
            (self.parent["id"], "nonsense"),
            (other["id"], self.forked["id"]),
            (other["id"].replace(other["id"][:8], "00000000"), self.forked["id"]),
        ):
            path = f"/servers/{server}/forks/{fork}"
            self.api.api_get(path, check_response_status=[404])
            self.api.api_delete(path, check_response_status=[404])
            assert self.post(f"{path}/action", {"release": None}).status_code == 404

    def test_who_may(self) -> None:
        for verb in ("DELETE", "release"):
            self._refused(403, verb, "Policy", api=self.reader_api)
            self._refused(404, verb, "", api=self.stranger_api)
        self.stranger_api.api_get(self.path, check_response_status=[404])
        path = f"/servers/{self.parent['id']}/forks"
        self.stranger_api.api_get(path, check_response_status=[404])
        self.api_fixture.other_api.api_get(path, check_response_status=[403])
        assert self.images

    def _refused(self, status: int, verb: str, reason: str, *, api: Any = None) -> None:
        api = api or self.api
        if verb == "release":
            answer = self.post(f"{self.path}/action", {"release": {"force": True}}, api=api)
        else:
            answer = api.api_request(self.path, method="DELETE")
        assert answer.status_code == status, answer.text
        assert reason in answer.text

    def _gone(self) -> None:
        self.api.api_get(self.path, check_response_status=[404])
        known = self.instance(self.parent["id"]).system_metadata
        assert rpc.FORK_PREFIX + self.forked["id"] not in known

    def _remove_host1(self) -> None:
        """As an operator who takes a host out of the cloud for good."""
        context = compute.nova_context.get_admin_context()
        objects.HostMapping.get_by_host(context, "host1").destroy()
