# SPDX-License-Identifier: Apache-2.0
"""Where the API takes hold of Nova's own code. A Nova that has moved one of these fails here.

That they do what they did is seen in tests/functional.
"""

from collections.abc import Callable
import inspect
from typing import Any

from nova import objects
from nova import policy
from nova import utils
from nova.api.openstack import wsgi
from nova.api.openstack.compute import routes
from nova.api.openstack.compute import servers
from nova.api.openstack.compute.schemas import servers as server_schemas
from nova.compute import api as compute
from nova.compute import utils as compute_utils
from nova.network import neutron
from nova.notifications.objects import base as notification_base
from nova.notifications.objects import instance as instance_notification
import pytest

from nova_snowflock.api import cloning
from nova_snowflock.virt import rpc

objects.register_all()

API = compute.API


def parameters(function: Callable[..., Any]) -> list[str]:
    """Their names, in order."""
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("caller", "seam"),
    [
        (API.create, "_create_instance"),
        (API._create_instance, "_get_image"),
        (API._create_instance, "_provision_instances"),
        (API._provision_instances, "_populate_instance_for_create"),
        (API._provision_instances, "_enforce_create_unified_limits"),
    ],
)
def test_what_is_overridden_is_called(caller: Callable[..., Any], seam: str) -> None:
    assert f"self.{seam}(" in inspect.getsource(caller)


@pytest.mark.parametrize("seam", ["_get_image", "_populate_instance_for_create"])
def test_overridden_methods_have_novas_parameters(seam: str) -> None:
    assert parameters(getattr(cloning.Cloning, seam)) == parameters(getattr(API, seam))


def test_provision_instances() -> None:
    first = ["self", "context", "flavor", "min_count", "max_count", "base_options"]
    assert parameters(API._provision_instances)[:6] == first
    assert parameters(cloning.Cloning._provision_instances)[:6] == first
    source = inspect.getsource(API._provision_instances)
    for option in ("port_resource_requests", "request_level_params"):
        assert f"base_options.pop('{option}')" in source
    # Quota is the first thing it looks at: what is done before it is not in vain.
    assert source.index("check_num_instances_quota") < source.index("instances_to_build")


def test_requirements_of_a_request() -> None:
    required = objects.RequestLevelParams()
    required.root_required.add(rpc.trait("qemu"))
    assert required.root_required == {"CUSTOM_SNOWFLOCK_QEMU"}
    # Only the first scheduling is to require the plugin.
    stored = inspect.getsource(objects.RequestSpec._get_update_primitives)
    assert "del spec.request_level_params" in stored


@pytest.mark.parametrize(
    ("function", "first"),
    [
        (API._cleanup_build_artifacts, ["instances", "instances_to_build"]),
        (
            API._enforce_create_unified_limits,
            [
                "self",
                "context",
                "flavor",
                "is_bfv",
                "port_resource_requests",
                "dp_request_groups",
                "min_count",
                "num_instances",
            ],
        ),
        (
            compute_utils.check_num_instances_quota,
            ["context", "flavor", "min_count", "max_count"],
        ),
        (utils.get_image_from_system_metadata, ["system_meta"]),
        (compute.instance_has_share, ["context", "instance"]),
        (neutron.API.list_ports, ["self", "context", "search_opts"]),
        (neutron.API.get_instance_nw_info, ["self", "context", "instance"]),
        (wsgi.Resource.register_subcontroller_actions, ["self", "sub_controller"]),
        (routes.APIRouterV21.__init__, ["self", "custom_routes"]),
    ],
)
def test_called_as_expected(function: Callable[..., Any], first: list[str]) -> None:
    assert parameters(function)[: len(first)] == first


def test_creation_takes_what_it_is_given() -> None:
    given = {
        "min_count",
        "max_count",
        "display_description",
        "security_groups",
        "availability_zone",
        "forced_host",
        "forced_node",
        "user_data",
        "metadata",
        "requested_networks",
        "config_drive",
        "scheduler_hints",
        "check_server_group_quota",
        "tags",
        "trusted_certs",
        "supports_port_resource_request",
        "block_device_mapping",
        "legacy_bdm",
        "key_name",
        "key_data",
    }
    assert given <= set(parameters(API.create))


def test_the_prefix_of_image_properties() -> None:
    known = {f"{utils.SM_IMAGE_PROP_PREFIX}hw_disk_bus": "virtio", "image_min_disk": "1"}
    image = utils.get_image_from_system_metadata(known)
    assert image == {"min_disk": "1", "properties": {"hw_disk_bus": "virtio"}}


def test_schemas() -> None:
    properties = server_schemas.create_v294["properties"]["server"]["properties"]
    for key in (
        "networks",
        "availability_zone",
        "key_name",
        "user_data",
        "metadata",
        "security_groups",
    ):
        assert key in properties
    assert server_schemas.create_v294["properties"]["os:scheduler_hints"]["type"] == "object"


def test_faults_of_creation() -> None:
    assert servers.INVALID_FLAVOR_IMAGE_EXCEPTIONS


def test_the_policy_enforcer() -> None:
    assert hasattr(policy, "_ENFORCER")


def test_notifications() -> None:
    for name in ("event_type", "publisher", "priority"):
        assert name in notification_base.NotificationBase.fields
    emit = inspect.getsource(notification_base.NotificationBase.emit)
    assert "self.event_type.to_notification_event_type_field()" in emit
    assert parameters(instance_notification.InstanceActionPayload.__init__)[:4] == [
        "self",
        "context",
        "instance",
        "fault",
    ]


def test_build_requests_know_their_servers() -> None:
    assert "instance" in objects.BuildRequest.fields
    assert hasattr(objects.BuildRequestList, "get_all")


def test_what_snapshots_do_not_inherit() -> None:
    inherit = inspect.getsource(compute_utils.initialize_instance_snapshot_metadata)
    assert "key.startswith(ns)" in inherit
    assert "for ns in NON_INHERITABLE_IMAGE_NAMESPACES" in inherit
    for key in (rpc.FORK, rpc.HOST, rpc.PARENT, rpc.CLONE_ID, rpc.POPULATION, rpc.FORK_PREFIX):
        assert key.startswith(rpc.NAMESPACE)
