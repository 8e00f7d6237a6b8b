# SPDX-License-Identifier: Apache-2.0
"""A cloud in one process, with two hosts that fork servers."""

import datetime
import json
import os
import sys
import time
from typing import Any

import fixtures
from neutronclient.common import exceptions as neutron_exceptions
from nova import context as nova_context
from nova import objects
import nova.policy
from nova.tests.functional import integrated_helpers
from nova.tests.functional.api import client
from nova.virt import fake
import oslo_messaging as messaging

from nova_snowflock import exception
from nova_snowflock.virt import rpc

NETWORK = "3cb9bc59-5699-4588-a4b1-b87f96708bc6"
NOVAS_APP = "nova.api.openstack.compute:APIRouterV21.factory"
TRAIT = rpc.trait("qemu")
OUR_APP = "nova_snowflock.api.router:APIRouter.factory"


class Endpoint:
    """The compute side of forks, with records instead of images."""

    target = messaging.Target(namespace=rpc.NAMESPACE, version=rpc.VERSION)

    def __init__(self, host: str, images: dict[str, rpc.Record], orders: "Orders") -> None:
        self._host = host
        self._images = images
        self._orders = orders

    @messaging.expected_exceptions(exception.CannotFork, exception.CaptureFailed)
    def fork(
        self,
        context: nova_context.RequestContext,
        instance: objects.Instance,
        fork_id: str,
        count: int,
        keep: int | None,
        params: dict[str, str],
        checkpoint: bool,
        network: dict[str, str] | None,
    ) -> rpc.Record:
        self._orders.captures += 1
        time.sleep(self._orders.capture_seconds)
        if self._orders.capture_error is not None:
            raise self._orders.capture_error
        record = {
            "id": fork_id,
            "parent": instance.uuid,
            "project_id": instance.project_id,
            "host": self._host,
            "trait": TRAIT,
            "state": "active",
            "reason": None,
            "created": datetime.datetime.now(datetime.UTC).isoformat(),
            "confirmed": False,
            "checkpoint": checkpoint,
            "keep": keep,
            "params": params,
            "clones": count,
            "method": "copy-on-write",
            "pause": 0.006,
            "stages": {"freeze": 0.004},
            "after": {"publish": 0.02},
            "size": instance.flavor.memory_mb << 20,
            "vcpus": instance.flavor.vcpus,
            "image_ref": instance.image_ref,
            "agent": False,
            "network": network,
            "problems": [],
            "users": 0,
        }
        self._images[fork_id] = record
        instance.system_metadata[rpc.FORK_PREFIX + fork_id] = self._host
        instance.save()
        return {**record, "first": 1}

    @messaging.expected_exceptions(exception.ForkNotFound)
    def confirm(self, context: nova_context.RequestContext, fork_id: str) -> None:
        self._get(fork_id)["confirmed"] = True

    @messaging.expected_exceptions(exception.ForkNotFound)
    def extend(self, context: nova_context.RequestContext, fork_id: str, count: int) -> rpc.Record:
        record = self._get(fork_id)
        record["clones"] += count
        return {**record, "first": record["clones"] - count + 1}

    @messaging.expected_exceptions(exception.ForkNotFound)
    def show(self, context: nova_context.RequestContext, fork_id: str) -> rpc.Record:
        return self._get(fork_id)

    @messaging.expected_exceptions(exception.ForkNotFound, exception.ForkInUse)
    def release(self, context: nova_context.RequestContext, fork_id: str, force: bool) -> None:
        record = self._get(fork_id)
        if record["users"] and not force:
            raise exception.ForkInUse(f"Clones still fetch from the image of fork {fork_id}")
        del self._images[fork_id]
        context = nova_context.get_admin_context()
        for parent in objects.InstanceList.get_by_filters(context, {"uuid": record["parent"]}):
            if parent.system_metadata.pop(rpc.FORK_PREFIX + fork_id, None):
                parent.save()

    def population(
        self, context: nova_context.RequestContext, fork_id: str
    ) -> dict[str, Any] | None:
        self._orders.populations.append(self._host)
        return {
            "state": "filling",
            "population": "background",
            "resident": 10,
            "zero": 20,
            "missing": 30,
            "faults": 4,
            "bytes_multicast": 40960,
            "bytes_unicast": 0,
        }

    def _get(self, fork_id: str) -> rpc.Record:
        if fork_id not in self._images:
            raise exception.ForkNotFound(f"There is no image of fork {fork_id}")
        return self._images[fork_id]


class Orders:
    """What the compute side is to do, and what it has done."""

    def __init__(self) -> None:
        self.capture_error: Exception | None = None
        self.captures = 0
        self.populations: list[str] = []
        self.capture_seconds = 0.0
        self.spawned: dict[str, objects.Instance] = {}


class Driver(fake.FakeDriver):
    """A driver that forks servers. :attr:`images` and :attr:`orders` are each test's own."""

    vcpus = 32
    memory_mb = 64 * 1024
    local_gb = 1024

    images: dict[str, rpc.Record]
    orders: Orders

    def init_host(self, host: str) -> None:
        super().init_host(host)
        endpoint = Endpoint(host, self.images, self.orders)
        self.virtapi._compute.additional_endpoints.append(endpoint)

    def update_provider_tree(
        self, provider_tree: Any, nodename: str, allocations: Any = None
    ) -> None:
        super().update_provider_tree(provider_tree, nodename, allocations)
        provider_tree.add_traits(nodename, TRAIT)

    def spawn(
        self,
        context: nova_context.RequestContext,
        instance: objects.Instance,
        *rest: Any,
        **more: Any,
    ) -> None:
        super().spawn(context, instance, *rest, **more)
        self.orders.spawned[instance.uuid] = instance


class ForkTestCase(integrated_helpers._IntegratedTestBase):
    """What all functional tests need.

    ``api`` is a member's, ``admin_api`` an administrator's, ``reader_api`` a reader's, all of one
    project; ``stranger_api`` is a member's of another.
    """

    microversion = "latest"

    def setUp(self) -> None:
        self.images: dict[str, rpc.Record] = {}
        self.orders = Orders()
        driver = type("Driver", (Driver,), {"images": self.images, "orders": self.orders})
        self.useFixture(fixtures.MonkeyPatch("nova.virt.fake.SnowFlockTestDriver", driver))
        self.useFixture(
            fixtures.MonkeyPatch("nova.tests.fixtures.NeutronFixture.find_resource", _find_resource)
        )
        self._paste_config = self.useFixture(fixtures.TempDir()).join("api-paste.ini")
        _write_paste_config(self._paste_config)
        super().setUp()
        self.reader_api = self.api_fixture.reader_api
        self.reader_api.microversion = self.microversion
        self.stranger_api = self._client("stranger", ["reader", "member"])
        self.stranger_admin_api = self._client("admin", ["reader", "member", "admin"])

    def _setup_services(self) -> None:
        self.flags(api_paste_config=self._paste_config, group="wsgi")
        # Nova's tests run with the rules of before there were readers.
        self.flags(enforce_new_defaults=True, group="oslo_policy")
        nova.policy.reset()
        nova.policy.init(suppress_deprecation_warnings=True)
        super()._setup_services()

    def _setup_compute_service(self) -> Any:
        self.flags(compute_driver="fake.SnowFlockTestDriver")
        self._start_compute("host2")
        return self._start_compute("host1")

    def start_plain_host(self) -> None:
        """A third host, "plain", without the plugin."""
        self.flags(compute_driver="fake.FakeDriver")
        self._start_compute("plain")

    def _client(self, user: str, roles: list[str]) -> client.TestOpenStackClient:
        api = client.TestOpenStackClient(
            user, self.api_fixture.base_url, project_id="another", roles=roles
        )
        api.microversion = self.microversion
        return api

    def boot(self, *, host: str = "host1", **options: Any) -> dict[str, Any]:
        """An ACTIVE server of the project. Only an administrator may say where."""
        server = self._build_server(host=host, networks=[{"uuid": NETWORK}])
        body = {"server": {**server, **options}}
        return self._wait_for_state_change(self.admin_api.post_server(body), "ACTIVE")

    def fork(
        self, server: dict[str, Any], *, api: Any = None, status: str = "ACTIVE", **options: Any
    ) -> dict[str, Any]:
        """Fork a server, successfully.

        :param status: what becomes of its clones
        """
        answer = self.ask_to_fork(server, api=api, **options)
        assert answer.status_code == 202, answer.text
        fork: dict[str, Any] = answer.json()["fork"]
        for clone in fork["clones"]:
            self._wait_for_state_change({"id": clone["server_id"]}, status)
        return fork

    def clones(self, fork: dict[str, Any]) -> list[dict[str, Any]]:
        """The servers of :meth:`fork`, as an administrator sees them."""
        return [self.admin_api.get_server(clone["server_id"]) for clone in fork["clones"]]

    def ask_to_fork(self, server: dict[str, Any], *, api: Any = None, **options: Any) -> Any:
        """Whatever comes of it.

        :returns: the response, of requests
        """
        return self.post(f"/servers/{server['id']}/action", {"fork": options}, api=api)

    def refused(
        self, status: int, server: dict[str, Any], *, api: Any = None, **options: Any
    ) -> str:
        """A fork that must be refused, and must have no effect.

        :returns: what the user is told
        """
        before = self._everything()
        answer = self.ask_to_fork(server, api=api, **options)
        assert answer.status_code == status, (answer.status_code, answer.text)
        assert self._everything() == before
        ((_kind, fault),) = answer.json().items()
        message: str = fault["message"]
        return message

    def post(self, path: str, body: dict[str, Any], *, api: Any = None) -> Any:
        """:returns: the response, of requests"""
        api = api or self.api
        return api.api_request(path, method="POST", body=json.dumps(body))

    def get_forks(self, server_id: str, *, api: Any = None) -> list[dict[str, Any]]:
        """The forks of a server."""
        forks: list[dict[str, Any]] = (
            (api or self.api).api_get(f"/servers/{server_id}/forks").body["forks"]
        )
        return forks

    def get_fork(self, server_id: str, fork_id: str, *, api: Any = None) -> dict[str, Any]:
        """A fork in detail."""
        path = f"/servers/{server_id}/forks/{fork_id}"
        fork: dict[str, Any] = (api or self.api).api_get(path).body["fork"]
        return fork

    def instance(self, uuid: str) -> objects.Instance:
        """A server as Nova knows it."""
        context = nova_context.get_admin_context()
        cell = objects.InstanceMapping.get_by_instance_uuid(context, uuid).cell_mapping
        with nova_context.target_cell(context, cell) as targeted:
            return objects.Instance.get_by_uuid(
                targeted, uuid, expected_attrs=["system_metadata", "metadata", "flavor", "tags"]
            )

    def stop_host(self, host: str) -> None:
        """Have a host's service be down."""
        service = self.admin_api.get_services(host=host, binary="nova-compute")[0]
        self.admin_api.put_service_force_down(service["id"], True)

    def _everything(self) -> tuple[Any, ...]:
        context = nova_context.get_admin_context()
        return (
            sorted(server["id"] for server in self.admin_api.get_servers(detail=False)),
            len(objects.BuildRequestList.get_all(context)),
            sorted(self.images),
        )


def _find_resource(
    neutron: Any, kind: str, name_or_id: str, project_id: str | None, *rest: Any
) -> dict[str, Any]:
    """What Nova's double of Neutron lacks."""
    for resource in neutron.list_security_groups()["security_groups"]:
        if name_or_id in (resource["id"], resource["name"]):
            found: dict[str, Any] = resource
            return found
    raise neutron_exceptions.NotFound(message=f"There is no {kind} {name_or_id}")


def _write_paste_config(path: str) -> None:
    with open(os.path.join(sys.prefix, "etc", "nova", "api-paste.ini")) as file:
        nova = file.read()
    assert nova.count(NOVAS_APP) == 1
    with open(path, "w") as file:
        file.write(nova.replace(NOVAS_APP, OUR_APP))
