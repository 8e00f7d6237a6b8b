# SPDX-License-Identifier: Apache-2.0
"""Creating the servers that clones are.

This is Nova's own creation of servers, by a subclass: what it checks (networks, quota, key, zone,
...) and what it does (records, scheduling) is what it does for any server. Three of its methods are
overridden; tests/unit/test_api_seams.py watches them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nova import block_device
from nova import context as nova_context
from nova import exception
from nova import objects
from nova import utils
from nova.compute import api as compute
from nova.compute import utils as compute_utils

from nova_snowflock.virt import marks
from nova_snowflock.virt import rpc

_IMAGE_PREFIX = utils.SM_IMAGE_PROP_PREFIX


class Cloning(compute.API):
    """Creates the clones of one request.

    :param shared: Nova's API object, whose clients are used
    :param parent: the server whose clones they are, with its key pairs and system metadata
    :param prepare: called when nothing but the records of the clones is left to be made: makes the
        image, or room for them in one, and returns the fork's record
    :param confirm: called when those are made, and nothing has been done with them yet
    :param name: a clone's name, of its ID
    :param known: what all of them have in their system metadata
    """

    def __init__(
        self,
        shared: compute.API,
        parent: objects.Instance,
        *,
        prepare: Callable[[], rpc.Record],
        confirm: Callable[[], None],
        name: Callable[[int], str],
        known: dict[str, str],
    ) -> None:
        super().__init__(shared.image_api, shared.network_api, shared.volume_api)
        self._parent = parent
        self._prepare = prepare
        self._confirm = confirm
        self._name = name
        self._known = known
        self.record: rpc.Record | None = None
        """The fork's record, once there is one."""
        self._provisioned: list[Any] = []

    def discard(self) -> None:
        """Remove the records of clones that will not be built."""
        self._cleanup_build_artifacts(None, self._provisioned)

    def _get_image(
        self, context: nova_context.RequestContext, image_href: str
    ) -> tuple[str, dict[str, Any]]:
        """The image as the parent knows it. It may be gone from the image service: a clone's disk
        does not come from there."""
        known = {
            key: value
            for key, value in self._parent.system_metadata.items()
            if key.startswith(_IMAGE_PREFIX)
        }
        image = utils.get_image_from_system_metadata(known)
        for number in ("min_ram", "min_disk"):
            if number in image:
                image[number] = int(image[number])
        image.update(id=image_href, status="active")
        return image_href, image

    def _provision_instances(
        self,
        context: nova_context.RequestContext,
        flavor: objects.Flavor,
        min_count: int,
        max_count: int,
        base_options: dict[str, Any],
        *rest: Any,
        **more: Any,
    ) -> list[Any]:
        """All that was asked for is there: only now is the parent stopped."""
        # Nova's method begins with these two, too, but then it is too late for the parent.
        compute_utils.check_num_instances_quota(context, flavor, min_count, max_count)
        self._enforce_create_unified_limits(
            context,
            flavor,
            False,
            base_options["port_resource_requests"],
            [],
            min_count,
            max_count,
        )
        self.record = self._prepare()
        # Not a property of the image: those stay with a server, and it may move to any host later.
        required = base_options["request_level_params"] or objects.RequestLevelParams()
        required.root_required.add(self.record["trait"])
        base_options["request_level_params"] = required
        self._provisioned = super()._provision_instances(
            context, flavor, min_count, max_count, base_options, *rest, **more
        )
        self._confirm()
        return self._provisioned

    def _populate_instance_for_create(
        self,
        context: nova_context.RequestContext,
        instance: objects.Instance,
        image: dict[str, Any],
        index: int,
        security_groups: objects.SecurityGroupList,
        flavor: objects.Flavor,
        num_instances: int,
    ) -> objects.Instance:
        """A clone has its own name, and knows what it is a clone of."""
        assert self.record is not None
        clone_id = self.record["first"] + index
        instance.display_name = self._name(clone_id)
        if instance.key_name == self._parent.key_name and not instance.keypairs.objects:
            instance.keypairs = self._parent.keypairs.obj_clone()
        # As if it were the only one: Nova would number the names of several.
        super()._populate_instance_for_create(
            context, instance, image, index, security_groups, flavor, 1
        )
        instance.system_metadata.update({**self._known, rpc.CLONE_ID: str(clone_id)})
        instance.metadata = {**instance.metadata, marks.CLONE_ID: str(clone_id)}
        return instance


_DISK = (
    "source_type",
    "destination_type",
    "guest_format",
    "device_type",
    "disk_bus",
    "device_name",
    "boot_index",
    "volume_size",
    "delete_on_termination",
)


def inherited_disks(
    parent: objects.Instance, bdms: objects.BlockDeviceMappingList
) -> list[block_device.BlockDeviceDict]:
    """The disks of a server, all local, as what its clones are created with."""
    disks = []
    for bdm in bdms:
        disk = {field: bdm[field] for field in _DISK}
        if bdm.source_type == "image":
            disk["image_id"] = parent.image_ref
        disks.append(block_device.BlockDeviceDict(disk))
    return disks


def interfaces_of(
    shared: compute.API, context: nova_context.RequestContext, parent: objects.Instance
) -> list[Any]:
    """A server's network interfaces, in order, as Nova knows them."""
    interfaces = parent.get_network_info()
    if not interfaces and objects.VirtualInterfaceList.get_by_instance_uuid(context, parent.uuid):
        # Nova's cache of them has not been filled yet.
        interfaces = shared.network_api.get_instance_nw_info(context, parent, force_refresh=True)
    return list(interfaces)


def inherited_security_groups(ports: list[dict[str, Any]]) -> list[str]:
    """The security groups of a server's ports, by their IDs, since names need not be unique.

    :raises nova.exception.InvalidInput: each port has its own: Nova gives new ports all the same
    """
    groups = {tuple(sorted(port.get("security_groups", []))) for port in ports}
    if len(groups) > 1:
        raise exception.InvalidInput(
            reason="The server's network interfaces have different security groups, and those of "
            "its clones will have the same: 'security_groups' must say which."
        )
    return [group for same in groups for group in same]


def inherited_networks(interfaces: list[Any]) -> objects.NetworkRequestList:
    """A new port in the network of each of the parent's interfaces."""
    networks = [interface["network"]["id"] for interface in interfaces]
    # An empty list would have Nova make a network.
    return objects.NetworkRequestList(
        objects=[objects.NetworkRequest(network_id=network) for network in networks or ["none"]]
    )


def requested_networks(
    networks: list[dict[str, Any]] | str, interfaces: list[Any]
) -> objects.NetworkRequestList:
    """What a user asks for instead.

    :raises nova.exception.InvalidInput: a clone has each of its parent's interfaces: its guest
        runs on with them
    """
    if isinstance(networks, str):
        requests = [objects.NetworkRequest(network_id=networks)]
    else:
        requests = [
            objects.NetworkRequest(
                network_id=None if network.get("port") else network["uuid"],
                port_id=network.get("port"),
                address=network.get("fixed_ip"),
                tag=network.get("tag"),
            )
            for network in networks
        ]
    asked = 0 if networks == "none" else len(requests)
    if asked != len(interfaces):
        raise exception.InvalidInput(
            reason=f"The server has {len(interfaces)} network interfaces, and its clones will "
            f"have as many: 'networks' must name a network for each of them, not {asked}."
        )
    return objects.NetworkRequestList(objects=requests)
