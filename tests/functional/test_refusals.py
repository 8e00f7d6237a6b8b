# SPDX-License-Identifier: Apache-2.0
"""Forks that must be refused, and that must leave nothing behind."""

from typing import Any
from unittest import mock

from nova import context as nova_context
from nova import exception as nova_exception
from nova import objects
from nova.compute import api as compute
from nova.tests import fixtures as nova_fixtures
from oslo_db import exception as db_exception

from nova_snowflock import exception
from nova_snowflock.virt import rpc
from tests.functional import base

_NOBODY = "00000000-0000-4000-8000-000000000000"


class RequestTest(base.ForkTestCase):
    """Requests that make no sense."""

    def test_bad_requests(self) -> None:
        parent = self.boot()
        uuid = base.NETWORK
        options: dict[str, Any]
        for options in (
            {"count": -1},
            {"count": 0},
            {"count": 65},
            {"count": 10**9},
            {"count": "two"},
            {"count": 1.5},
            {"count": True},
            {"count": None},
            {"checkpoint": "yes"},
            {"name": ""},
            {"name": "x" * 256},
            {"name": "x" * 250 + "{n}"},
            {"name": "all the same", "count": 2},
            {"fork_id": "nonsense"},
            {"fork_id": _NOBODY, "count": 0, "checkpoint": True},
            {"fork_id": _NOBODY, "params": {}},
            {"fork_id": _NOBODY, "keep": 1},
            {"networks": []},
            {"networks": "some"},
            {"networks": "none"},
            {"networks": [{"uuid": uuid}, {"uuid": uuid}]},
            {"networks": [{}]},
            {"networks": [{"uuid": "nonsense"}]},
            {"networks": [{"uuid": uuid, "colour": "red"}]},
            {"networks": [{"port": uuid}, {"port": uuid}]},
            {"networks": [{"port": uuid, "fixed_ip": "192.168.1.5"}]},
            {"networks": [{"uuid": uuid, "fixed_ip": "192.168.1.5"}], "count": 2},
            {"networks": [{"uuid": _NOBODY}]},
            {"availability_zone": "nowhere"},
            {"availability_zone": "a:b:c:d"},
            {"hints": []},
            {"hints": {"group": "nonsense"}},
            {"hints": {"group": _NOBODY}},
            {"key_name": "unknown"},
            {"user_data": "not base64!"},
            {"user_data": "QUJD" * 20000},
            {"metadata": {"a": 1}},
            {"metadata": {"a": "x" * 256}},
            {"security_groups": [{"name": "unknown"}]},
            {"security_groups": ["default"]},
            {"params": {"a": 1}},
            {"params": {"a": "x" * 256}},
            {"params": {str(number): "" for number in range(65)}},
            {"params": {"x" * 201: ""}},
            {"population": "fast"},
            {"keep": -1},
            {"keep": 10**9},
            {"colour": "red"},
        ):
            message = self.refused(400, parent, **options)
            assert message, options
        body: dict[str, Any]
        for body in ({"fork": None}, {"fork": []}, {"fork": {}, "x": {}}, {"fork": "x"}):
            answer = self.post(f"/servers/{parent['id']}/action", body)
            assert answer.status_code == 400, body
        self.api.api_get(f"/servers/{parent['id']}/forks?x=1", check_response_status=[400])
        assert self.orders.captures == 0

    def test_too_large(self) -> None:
        parent = self.boot()
        self.flags(max_request_body_size=1000, group="oslo_middleware")
        answer = self.ask_to_fork(parent, user_data="QUJD" * 1000)
        assert answer.status_code == 413
        assert "too large" in answer.text

    def test_too_much_metadata(self) -> None:
        parent = self.boot(metadata={"a": "1"})
        self.flags(metadata_items=2, group="quota")
        assert "metadata" in self.refused(403, parent, metadata={"b": "2", "c": "3"})


class StateTest(base.ForkTestCase):
    """Servers that cannot be forked, and users who may not."""

    def test_unknown(self) -> None:
        assert _NOBODY in self.refused(404, {"id": _NOBODY})
        parent = self.boot()
        assert _NOBODY in self.refused(404, parent, fork_id=_NOBODY)
        other = self.fork(self.boot(), count=0, checkpoint=True)
        assert other["id"] in self.refused(404, parent, fork_id=other["id"])

    def test_others(self) -> None:
        parent = self.boot()
        assert "Policy" in self.refused(403, parent, api=self.reader_api)
        self.refused(404, parent, api=self.stranger_api)
        assert "Policy" in self.refused(403, parent, api=self.api_fixture.other_api)

    def test_not_running(self) -> None:
        parent = self.boot()
        self.api.post_server_action(parent["id"], {"pause": None})
        self._wait_for_state_change(parent, "PAUSED")
        assert "paused" in self.refused(409, parent)
        self.api.post_server_action(parent["id"], {"unpause": None})
        self._wait_for_state_change(parent, "ACTIVE")

        self._stop_server(parent)
        assert "stopped" in self.refused(409, parent)
        self._start_server(parent)

        instance = self.instance(parent["id"])
        instance.task_state = "rebooting"
        instance.save()
        assert "rebooting" in self.refused(409, parent)
        instance.task_state = None
        instance.save()

        self._shelve_server(parent)
        assert "shelved" in self.refused(409, parent)

    def test_building(self) -> None:
        parent = self._build_server(networks="none")
        # No scheduler gets to see it.
        with mock.patch("nova.conductor.api.ComputeTaskAPI.schedule_and_build_instances"):
            parent = self.api.post_server({"server": parent})
        assert "building" in self.refused(409, parent)
        fork = self.fork(self.boot(), count=0, checkpoint=True)
        self.refused(404, parent, fork_id=fork["id"])

    def test_without_a_host(self) -> None:
        parent = self.boot()
        instance = self.instance(parent["id"])
        instance.host = None
        instance.save()
        assert "not ready" in self.refused(409, parent)

    def test_volumes(self) -> None:
        self.useFixture(nova_fixtures.CinderFixture(self))
        parent = self.boot()
        self._attach_volume(parent, nova_fixtures.CinderFixture.IMAGE_BACKED_VOL)
        self._wait_for_volume_attach(parent["id"], nova_fixtures.CinderFixture.IMAGE_BACKED_VOL)
        assert "volume" in self.refused(409, parent)

    def test_identity(self) -> None:
        [flavor] = [one for one in self.api.get_flavors() if one["name"] == "m1.small"]
        self.admin_api.post_extra_spec(flavor["id"], {"extra_specs": {"snowflock:identity": "x"}})
        parent = self.boot(flavorRef=flavor["id"])
        assert "snowflock:identity=x" in self.refused(409, parent)

    def test_its_host(self) -> None:
        self.start_plain_host()
        message = self.refused(409, self.boot(host="plain"))
        assert "cannot fork" in message
        assert "plain" not in message

        parent = self.boot()
        fork = self.fork(parent, count=0, checkpoint=True)
        self.stop_host("host1")
        message = self.refused(409, parent)
        assert "down" in message
        assert "host1" not in message
        self.refused(409, parent, fork_id=fork["id"])


class FailureTest(base.ForkTestCase):
    """What fails on the way."""

    def test_quota_by_one(self) -> None:
        parent = self.boot()
        self.flags(instances=3, group="quota")
        assert "instances" in self.refused(403, parent, count=3)
        assert self.orders.captures == 0
        fork = self.fork(parent, count=2)
        assert "instances" in self.refused(403, parent, fork_id=fork["id"])
        assert self.images[fork["id"]]["clones"] == 2

    def test_server_group_quota(self) -> None:
        parent = self.boot()
        group = self.api.post_server_groups({"name": "g", "policy": "affinity"})
        self.flags(server_group_members=1, group="quota")
        message = self.refused(403, parent, count=2, hints={"group": group["id"]})
        assert "group" in message
        assert not self.images

    def test_the_capture(self) -> None:
        parent = self.boot()
        for error, reason in (
            (exception.CannotFork("it has a TPM"), "cannot be forked: it has a TPM."),
            (exception.CaptureFailed("the disk is full"), "The reason: the disk is full."),
        ):
            self.notifier.reset()
            self.orders.capture_error = error
            for count in (2, 0):
                assert reason in self.refused(409, parent, count=count, checkpoint=True)
            assert self.api.get_server(parent["id"])["status"] == "ACTIVE"
            phases = [
                (said["event_type"], said["payload"]["nova_object.data"]["fault"])
                for said in self.notifier.versioned_notifications
                if said["event_type"].startswith("instance.fork")
            ]
            assert [phase for phase, _ in phases] == [
                "instance.fork.start",
                "instance.fork.error",
            ] * 2
            assert phases[1][1]["nova_object.data"]["exception_message"] == str(error)

    def test_after_the_capture(self) -> None:
        parent = self.boot()
        for broken in (
            mock.patch.object(
                compute.API,
                "_create_reqspec_buildreq_instmapping",
                side_effect=nova_exception.InvalidInput(reason="no"),
            ),
            mock.patch(
                "nova.conductor.api.ComputeTaskAPI.schedule_and_build_instances",
                side_effect=nova_exception.InvalidInput(reason="no"),
            ),
        ):
            with broken:
                self.refused(400, parent, count=2)
        assert self.orders.captures == 2
        assert not self.images
        assert not objects.InstanceMappingList.get_not_deleted_by_cell_and_project(
            nova_context.get_admin_context(), None, parent["tenant_id"]
        )
        # More clones of a fork that there is: it stays.
        fork = self.fork(parent, count=0, checkpoint=True)
        with broken:
            self.refused(400, parent, fork_id=fork["id"])
        assert fork["id"] in self.images

    def test_database_is_gone(self) -> None:
        parent = self.boot()
        with mock.patch.object(
            compute.API,
            "_create_reqspec_buildreq_instmapping",
            side_effect=db_exception.DBConnectionError(),
        ):
            assert "Try again later" in self.refused(503, parent, count=2)
        assert self.orders.captures == 1
        assert not self.images

    def test_no_answer(self) -> None:
        """The host may have captured the server all the same."""
        parent = self.boot()
        fork = rpc.ComputeAPI.fork

        def unanswered(*arguments: Any, **more: Any) -> None:
            fork(*arguments, **more)
            raise exception.HostUnavailable("The host host1 does not answer")

        with mock.patch.object(rpc.ComputeAPI, "fork", unanswered):
            self.refused(409, parent, count=0.0, checkpoint=True)
            self.refused(409, parent)
            release = exception.HostUnavailable("The host host1 does not answer")
            with mock.patch.object(rpc.ComputeAPI, "release", side_effect=release):
                assert self.ask_to_fork(parent).status_code == 409
        assert self.orders.captures == 3
        # The last one is for its host to release, when nobody has needed it for a while.
        assert len(self.images) == 1

    def test_confirmation(self) -> None:
        """Clones are built of nothing that their host may remove at any moment."""
        parent = self.boot()
        for count in (0, 2):
            fork = self.fork(parent, count=count, checkpoint=True)
            assert self.images[fork["id"]]["confirmed"]
        known = set(self.images)
        for error, reason in (
            (exception.ForkNotFound("gone"), "try again"),
            (exception.HostUnavailable("The host host1 does not answer"), "down"),
        ):
            with mock.patch.object(rpc.ComputeAPI, "confirm", side_effect=error):
                for count in (0, 2):
                    assert reason in self.refused(409, parent, count=count, checkpoint=True)
        with mock.patch.object(rpc.ComputeAPI, "confirm", side_effect=AssertionError):
            self.fork(parent, fork_id=fork["id"])
        assert set(self.images) == known

    def test_release_while_clones_are_built(self) -> None:
        parent = self.boot()
        with mock.patch("nova.conductor.api.ComputeTaskAPI.schedule_and_build_instances"):
            fork = self.fork(parent, status="BUILD")
        path = f"/servers/{parent['id']}/forks/{fork['id']}/action"
        answer = self.post(path, {"release": {}})
        assert answer.status_code == 409
        assert "being built" in answer.text
        assert self.post(path, {"release": {"force": True}}).status_code == 204
        assert not self.images

    def test_nowhere_to_go(self) -> None:
        self.start_plain_host()
        parent = self.boot()
        for host in ("host1", "host2"):
            service = self.admin_api.get_services(host=host, binary="nova-compute")[0]
            self.admin_api.put_service(service["id"], {"status": "disabled"})
        fork = self.fork(parent, status="ERROR")
        (clone,) = self.clones(fork)
        assert "No valid host" in clone["fault"]["message"]
        (listed,) = self.get_forks(parent["id"])
        assert listed["clones"][0]["status"] == "ERROR"

    def test_clones_that_have_no_host_yet(self) -> None:
        parent = self.boot()
        with mock.patch("nova.conductor.api.ComputeTaskAPI.schedule_and_build_instances"):
            fork = self.fork(parent, status="BUILD")
        (listed,) = self.get_forks(parent["id"])
        assert listed["clones"] == [{**fork["clones"][0], "status": "BUILD"}]
        shown = self.get_fork(parent["id"], fork["id"], api=self.admin_api)
        assert shown["clones"][0]["host"] is None
        self.api.api_delete(f"/servers/{parent['id']}/forks/{fork['id']}")
        assert self.get_forks(parent["id"]) == []
        assert not self.images

    def test_a_released_image(self) -> None:
        parent = self.boot()
        fork = self.fork(parent)
        # The parent does not know yet.
        self.images.clear()
        assert fork["id"] in self.refused(404, parent, fork_id=fork["id"])
        assert rpc.FORK_PREFIX + fork["id"] in self.instance(parent["id"]).system_metadata
        path = f"/servers/{parent['id']}/forks/{fork['id']}/action"
        release: dict[str, Any] = {"release": {}}
        assert self.post(path, release).status_code == 204
        assert rpc.FORK_PREFIX + fork["id"] not in self.instance(parent["id"]).system_metadata

    def test_more_clones_of_what_it_is_no_longer(self) -> None:
        """Quota and placement would be asked for less than the clones take."""
        parent = self.boot()
        fork = self.fork(parent)
        self.images[fork["id"]]["vcpus"] += 1
        assert "resized or rebuilt" in self.refused(409, parent, fork_id=fork["id"])
