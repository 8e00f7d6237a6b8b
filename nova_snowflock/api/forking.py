# SPDX-License-Identifier: Apache-2.0
"""What each request about forks does. No HTTP here: errors are Nova's exceptions and this
project's."""

from __future__ import annotations

from collections.abc import Callable
import copy
import dataclasses
from typing import Any

from nova import context as nova_context
from nova import exception as nova_exception
from nova import objects
from nova.compute import api as compute
from nova.compute import vm_states
import nova.conf
from nova.network import neutron
from nova.policies import servers as server_policies
from oslo_log import log as logging
from oslo_utils import excutils
from oslo_utils import uuidutils

from nova_snowflock import exception
from nova_snowflock import family_network
from nova_snowflock.api import cloning
from nova_snowflock.api import family
from nova_snowflock.api import hosts
from nova_snowflock.api import notifications
from nova_snowflock.virt import identity
from nova_snowflock.virt import marks
from nova_snowflock.virt import rpc

LOG = logging.getLogger(__name__)
CONF = nova.conf.CONF

ACTION = "fork"
"""The name of the instance action."""

ATTRIBUTES = ("flavor", "keypairs", "numa_topology", "tags", "trusted_certs")
"""What must be loaded of a server beyond what Nova always loads."""

ISOLATED = "family"
"""Whose clones have a network of their own."""

_OF_NETWORKS = {"networks", "security_groups"}
_IN_ITS_NETWORK = (
    "Clones of an isolated family are in its network and security group: 'networks' and "
    "'security_groups' cannot be given."
)

_NUMBER = "{n}"
_NAME_LENGTH = 255
_ROOM_FOR_NUMBER = 6


@dataclasses.dataclass(frozen=True)
class Report:
    """What is known of a fork."""

    fork: family.Fork
    state: str
    """"active", "lost" (its host has lost the image), "released", or "unknown" (no answer)."""
    record: rpc.Record | None
    """Its host's, if it has one."""
    clones: list[objects.Instance]
    populations: dict[str, rpc.Record | None]
    """Of :meth:`Forking.show`: what each of the clones' hosts has of the image."""


class Forking:
    """The verbs. One object serves all requests."""

    def __init__(self) -> None:
        self.compute_api = compute.API()
        self._hosts = hosts.Hosts()
        self._rpc = rpc.ComputeAPI()

    def create(
        self,
        context: nova_context.RequestContext,
        server: objects.Instance,
        options: dict[str, Any],
    ) -> tuple[family.Fork, rpc.Record, list[objects.Instance]]:
        """Fork a server, or make more clones of one of its forks.

        :param server: the server that is forked or, with a ``fork_id``, its parent or a clone
        :param options: valid by the schema and :func:`invalid`
        :returns: the fork, its record, and its new clones by clone ID
        """
        more = "fork_id" in options
        if more:
            fork = self._find(context, server, options["fork_id"])
            self._check_launched(context, server)
        else:
            fork = family.Fork(uuidutils.generate_uuid(), server.uuid, server.host)
            self._check_runs(context, server)
        disks = _local_disks(context, server)
        identity.chosen(server)
        params = options.get("params", {})
        private: family_network.FamilyNetwork | None = None
        # Before anything is looked up or reserved for clones.
        with self._hosts.reach(context, fork.host) as targeted:
            if more:
                record = self._rpc.show(targeted, fork.host, fork.id)
                _check_same(server, record)
                params = record["params"]
                private = record["network"]

        count = options.get("count", 1)
        began = False
        if options.get("isolation") == ISOLATED:
            private = self._isolate(context, server, fork)
        if private is not None:
            if _OF_NETWORKS & options.keys():
                raise nova_exception.InvalidInput(reason=_IN_ITS_NETWORK)
            options = {
                **options,
                **{"networks": [{"uuid": private["network"]}]},
                **{"security_groups": [{"name": private["group"]}]},
            }

        def prepare() -> rpc.Record:
            nonlocal began
            began = True
            objects.InstanceAction.action_start(context, server.uuid, ACTION, want_result=False)
            notifications.notify(context, server, fork.id, count, "start")
            with self._hosts.reach(context, fork.host) as targeted:
                if more:
                    return self._rpc.extend(targeted, fork.host, fork.id, count)
                return self._rpc.fork(
                    targeted,
                    server,
                    fork.id,
                    count,
                    keep=options.get("keep"),
                    params=params,
                    checkpoint=options.get("checkpoint", False),
                    network=private,
                )

        def confirm() -> None:
            if more:
                return
            try:
                with self._hosts.reach(context, fork.host) as targeted:
                    self._rpc.confirm(targeted, fork.host, fork.id)
            except exception.ForkNotFound as error:
                raise exception.CaptureFailed("its host was restarted meanwhile") from error

        clones: list[objects.Instance] = []
        try:
            if count:
                record, clones = self._create_clones(
                    context, server, fork, {**options, "params": params}, disks, prepare, confirm
                )
            else:
                record = prepare()
                confirm()
        except Exception as error:
            if began:
                notifications.notify(context, server, fork.id, count, "error", error=error)
                if not more:
                    self._undo(context, fork)
            if private is not None and not more:
                # Also if its host was told of it: nobody is in it yet.
                family_network.undo(neutron.get_client(context), private)
            raise
        uuids = tuple(clone.uuid for clone in clones)
        notifications.notify(context, server, fork.id, count, "end", clones=uuids)
        return fork, record, clones

    def index(self, context: nova_context.RequestContext, server: objects.Instance) -> list[Report]:
        """The forks that a server is the parent of, and the one it is a clone of."""
        clones = self._clones(context, server, rpc.PARENT, server.uuid)
        origin = family.origin_of(server)
        if origin is not None:
            clones += self._clones(context, server, rpc.FORK, origin.id)
        return [
            Report(
                fork,
                *self._ask(context, fork),
                [clone for clone in clones if clone.system_metadata[rpc.FORK] == fork.id],
                {},
            )
            for fork in family.forks_of(server, clones).values()
        ]

    def show(
        self, context: nova_context.RequestContext, server: objects.Instance, fork_id: str
    ) -> Report:
        """A fork, and how far its clones' hosts have its image.

        :raises exception.ForkNotFound: the server has no such fork
        """
        fork = self._find(context, server, fork_id)
        state, record = self._ask(context, fork)
        clones = self._clones(context, server, rpc.FORK, fork_id)
        populations = {
            host: self._population(context, host, fork_id)
            for host in {clone.host for clone in clones if clone.host}
        }
        return Report(fork, state, record, clones, populations)

    def delete(
        self, context: nova_context.RequestContext, server: objects.Instance, fork_id: str
    ) -> None:
        """Delete all clones of a fork, then release its image. Nothing happens if the image cannot
        be released or one of the clones is locked.

        :raises exception.ForkNotFound: the server has no such fork
        :raises exception.HostUnavailable: the host of its image is down
        """
        fork = self._find(context, server, fork_id)
        clones = self._clones(context, server, rpc.FORK, fork_id)
        for clone in clones:
            if clone.locked and not context.is_admin:
                raise nova_exception.InstanceIsLocked(instance_uuid=clone.uuid)
        image = True
        try:
            with self._hosts.reach(context, fork.host) as targeted:
                self._rpc.show(targeted, fork.host, fork_id)
        except (exception.ForkNotFound, hosts.HostGone):
            image = False
        for clone in clones:
            self._delete_server(context, clone.uuid)
        if image:
            self._release(context, fork, force=True)
        else:
            self._forget(context, fork)

    def release(
        self,
        context: nova_context.RequestContext,
        server: objects.Instance,
        fork_id: str,
        *,
        force: bool,
    ) -> None:
        """Release a fork's image only.

        :param force: also if clones still need it
        :raises exception.ForkNotFound: the server has no such fork, or it has no image any more
        :raises exception.ForkInUse: clones still need it
        :raises exception.HostUnavailable: its host is down
        """
        fork = self._find(context, server, fork_id)
        if not force:
            for clone in self._clones(context, server, rpc.FORK, fork_id):
                if clone.vm_state == vm_states.BUILDING:
                    raise exception.ForkInUse(
                        f"Clone {clone.uuid} of fork {fork_id} is being built"
                    )
        try:
            with self._hosts.reach(context, fork.host) as targeted:
                self._rpc.release(targeted, fork.host, fork_id, force=force)
        except (exception.ForkNotFound, hosts.HostGone):
            if not self._forget(context, fork):
                raise exception.ForkNotFound(
                    f"The image of fork {fork_id} has been released already"
                ) from None

    def _isolate(
        self, context: nova_context.RequestContext, server: objects.Instance, fork: family.Fork
    ) -> family_network.FamilyNetwork:
        return family_network.make(
            neutron.get_client(context),
            fork.id,
            server.uuid,
            server.project_id,
            CONF.snowflock.family_networks,
        )

    @compute.check_instance_lock
    @compute.check_instance_state(vm_state=[vm_states.ACTIVE])
    @compute.check_instance_host()
    def _check_runs(self, context: nova_context.RequestContext, server: objects.Instance) -> None:
        """Nova's own checks, by its decorators: a server that can be captured."""

    @compute.check_instance_lock
    @compute.check_instance_state(vm_state=None, task_state=None)
    def _check_launched(
        self, context: nova_context.RequestContext, server: objects.Instance
    ) -> None:
        """Nova's own checks, by its decorators: a server from which another can inherit."""

    def _find(
        self, context: nova_context.RequestContext, server: objects.Instance, fork_id: str
    ) -> family.Fork:
        known = family.forks_of(server)
        if fork_id not in known:
            # The image may be gone while clones of it live.
            known = family.forks_of(server, self._clones(context, server, rpc.FORK, fork_id))
        if fork_id not in known:
            raise exception.ForkNotFound(f"Server {server.uuid} has no fork {fork_id}")
        return known[fork_id]

    def _clones(
        self, context: nova_context.RequestContext, server: objects.Instance, key: str, value: str
    ) -> list[objects.Instance]:
        return family.clones_with(self.compute_api, context, server.project_id, key, value)

    def _ask(
        self, context: nova_context.RequestContext, fork: family.Fork
    ) -> tuple[str, rpc.Record | None]:
        try:
            with self._hosts.reach(context, fork.host) as targeted:
                record = self._rpc.show(targeted, fork.host, fork.id)
        except exception.ForkNotFound:
            return "released", None
        except hosts.HostGone:
            return "lost", None
        except exception.HostUnavailable as error:
            LOG.warning("The state of fork %s is unknown: %s", fork.id, error)
            return "unknown", None
        return record["state"], record

    def _population(
        self, context: nova_context.RequestContext, host: str, fork_id: str
    ) -> rpc.Record | None:
        try:
            with self._hosts.reach(context, host) as targeted:
                return self._rpc.population(targeted, host, fork_id)
        except exception.HostUnavailable as error:
            LOG.warning("What there is of fork %s is unknown: %s", fork_id, error)
            return None

    def _create_clones(
        self,
        context: nova_context.RequestContext,
        server: objects.Instance,
        fork: family.Fork,
        options: dict[str, Any],
        disks: list[Any],
        prepare: Callable[[], rpc.Record],
        confirm: Callable[[], None],
    ) -> tuple[rpc.Record, list[objects.Instance]]:
        known = {rpc.FORK: fork.id, rpc.HOST: fork.host, rpc.PARENT: fork.parent}
        if "population" in options:
            known[rpc.POPULATION] = options["population"]
        creation = cloning.Cloning(
            self.compute_api,
            server,
            prepare=prepare,
            confirm=confirm,
            name=_namer(server, options),
            known=known,
        )
        owner = _owner(context, server)
        try:
            clones, _reservation = creation.create(
                owner,
                server.flavor,
                server.image_ref,
                block_device_mapping=disks,
                legacy_bdm=False,
                **self._arguments(context, owner, server, fork, options),
            )
        except Exception:
            with excutils.save_and_reraise_exception():
                creation.discard()
        assert creation.record is not None
        return creation.record, clones

    def _arguments(
        self,
        context: nova_context.RequestContext,
        owner: nova_context.RequestContext,
        server: objects.Instance,
        fork: family.Fork,
        options: dict[str, Any],
    ) -> dict[str, Any]:
        """What Nova's creation of servers is given: as requested, or else inherited."""
        target = {"project_id": owner.project_id, "user_id": owner.user_id}
        zone, host, node = self.compute_api.parse_availability_zone(
            context, options.get("availability_zone") or _pinned_zone(context, server)
        )
        if host or node:
            context.can(server_policies.SERVERS % "create:forced_host", target)
            zone = None  # that of the host, whichever it is

        interfaces = cloning.interfaces_of(self.compute_api, context, server)
        if "networks" in options:
            networks = cloning.requested_networks(options["networks"], interfaces)
            if not networks.no_allocate:
                context.can(server_policies.SERVERS % "create:attach_network", target)
        else:
            networks = cloning.inherited_networks(interfaces)

        if "security_groups" in options:
            groups = [group["name"] for group in options["security_groups"] if "name" in group]
        elif networks.no_allocate:
            groups = []
        else:
            ports = self.compute_api.network_api.list_ports(context, device_id=server.uuid)["ports"]
            # Anybody may say of a port that it is this server's.
            own = {interface["id"] for interface in interfaces}
            groups = cloning.inherited_security_groups(
                [port for port in ports if port["id"] in own]
            )
            origin = family.origin_of(server)
            groups = family_network.outsiders(
                neutron.get_client(context), groups, origin.id if origin else None
            )

        key: dict[str, Any]
        if "key_name" in options:
            key = {"key_name": options["key_name"]}
        else:
            # With its content: it may be another user's, or deleted.
            key = {"key_name": server.key_name, "key_data": server.key_data}

        count = options.get("count", 1)
        return {
            **key,
            "min_count": count,
            "max_count": count,
            "display_description": server.display_description,
            "security_groups": list(dict.fromkeys(groups)),
            "availability_zone": zone,
            "forced_host": host,
            "forced_node": node,
            "user_data": options.get("user_data", server.user_data),
            "metadata": {
                **marks.inherited(server.metadata),
                **options.get("metadata", {}),
                **marks.of(fork.id, fork.parent, options["params"]),
            },
            "requested_networks": networks,
            "config_drive": server.config_drive,
            "scheduler_hints": options.get("hints", {}),
            "check_server_group_quota": True,
            "tags": [tag.tag for tag in server.tags],
            "trusted_certs": server.trusted_certs.ids if server.trusted_certs else None,
            "supports_port_resource_request": True,
        }

    def _release(
        self, context: nova_context.RequestContext, fork: family.Fork, *, force: bool
    ) -> None:
        try:
            with self._hosts.reach(context, fork.host) as targeted:
                self._rpc.release(targeted, fork.host, fork.id, force=force)
        except exception.ForkNotFound:
            LOG.debug("Fork %s has been released already", fork.id)

    def _undo(self, context: nova_context.RequestContext, fork: family.Fork) -> None:
        """Release the image of a fork that has failed, if it was made. Its host may have made it
        although there was no answer; and it releases by itself what was not confirmed."""
        try:
            self._release(context, fork, force=True)
        except Exception:
            LOG.exception("The image of fork %s, if any, is left to its host", fork.id)

    def _forget(self, context: nova_context.RequestContext, fork: family.Fork) -> bool:
        """Have the parent no longer say that it has a fork of which there is no image.

        :returns: whether it said so
        """
        try:
            parent = self.compute_api.get(context, fork.parent)
        except nova_exception.InstanceNotFound:
            return False
        if parent.system_metadata.pop(rpc.FORK_PREFIX + fork.id, None) is None:
            return False
        parent.save()
        return True

    def _delete_server(self, context: nova_context.RequestContext, uuid: str) -> None:
        try:
            # Through here, so that the context is that of the server's cell.
            server = self.compute_api.get(context, uuid, expected_attrs=["flavor", "numa_topology"])
            self.compute_api.delete(context, server)
        except nova_exception.InstanceNotFound:
            LOG.debug("Clone %s has been deleted already", uuid)


def invalid(options: dict[str, Any]) -> str | None:
    """What is wrong with a request that the schema lets pass.

    :returns: a sentence for the user, or None
    """
    count = options.get("count", 1)
    if count == 0 and not options.get("checkpoint"):
        return "A fork without clones ('count': 0) must be a checkpoint ('checkpoint': true)."
    if count > CONF.snowflock.max_clones:
        return f"At most {CONF.snowflock.max_clones} clones can be made at once, not {count}."
    name = options.get("name")
    if name is not None:
        if count > 1 and _NUMBER not in name:
            return f"The name of several clones must contain {_NUMBER}: their number."
        if len(name.replace(_NUMBER, "0" * _ROOM_FOR_NUMBER)) > _NAME_LENGTH:
            return "The clones' names would be longer than 255 characters."
    if "fork_id" in options:
        if count == 0:
            return "No clones ('count': 0) of an existing fork make no sense."
        captured = sorted({"checkpoint", "isolation", "keep", "params"} & options.keys())
        if captured:
            return f"An existing fork's {captured[0]!r} cannot be changed."
    if options.get("isolation") == ISOLATED and _OF_NETWORKS & options.keys():
        return _IN_ITS_NETWORK
    return _invalid_networks(options.get("networks"))


def _invalid_networks(networks: list[dict[str, Any]] | str | None) -> str | None:
    if networks is None or isinstance(networks, str):
        return None
    if not networks:
        return "Say 'none' for no networks."
    ports = [network["port"] for network in networks if network.get("port")]
    if len(ports) != len(set(ports)):
        return "A port can be given only once."
    for network in networks:
        if network.get("port"):
            if "fixed_ip" in network:
                return "A port has its own address: 'fixed_ip' cannot be given with 'port'."
        elif "uuid" not in network:
            return "Each of the networks must have a 'uuid' or a 'port'."
    return None


def _local_disks(context: nova_context.RequestContext, server: objects.Instance) -> list[Any]:
    """
    :raises exception.CannotFork: some of its storage is not its own
    """
    disks = objects.BlockDeviceMappingList.get_by_instance_uuid(context, server.uuid)
    if any(disk.is_volume for disk in disks):
        raise exception.CannotFork(
            "it boots from a volume or has volumes attached, and volumes cannot be forked yet"
        )
    if compute.instance_has_share(context, server):
        raise exception.CannotFork("it has a share attached, and shares cannot be forked")
    return cloning.inherited_disks(server, disks)


def _pinned_zone(context: nova_context.RequestContext, server: objects.Instance) -> str | None:
    """The availability zone that was asked for when the server was created. The one it is in says
    nothing: its host's."""
    try:
        spec = objects.RequestSpec.get_by_instance_uuid(context, server.uuid)
    except nova_exception.RequestSpecNotFound:
        return None
    return spec.availability_zone


def _check_same(server: objects.Instance, record: rpc.Record) -> None:
    """
    :raises CannotFork: the server is not what its fork is of: quota and placement would be asked
        for something else than the clones are
    """
    flavor = (server.flavor.memory_mb << 20, server.flavor.vcpus)
    if (*flavor, server.image_ref) != (record["size"], record["vcpus"], record["image_ref"]):
        raise exception.CannotFork(
            "it has been resized or rebuilt since; ask for clones of the fork through its parent "
            "or another of its clones"
        )


def _owner(
    context: nova_context.RequestContext, server: objects.Instance
) -> nova_context.RequestContext:
    """A clone is its parent's project's, also if an administrator of another one makes it."""
    owner = copy.copy(context)
    nova_context.set_target_cell(owner, None)
    if owner.project_id != server.project_id:
        owner.project_id = server.project_id
        owner.user_id = server.user_id
    return owner


def _namer(server: objects.Instance, options: dict[str, Any]) -> Callable[[int], str]:
    template = options.get("name")
    if template is not None:
        return lambda number: template.replace(_NUMBER, str(number))
    # Only the number is put in: the parent's name may hold anything.
    suffix = "-clone-"
    stem = server.display_name[: _NAME_LENGTH - len(suffix) - _ROOM_FOR_NUMBER]
    return lambda number: f"{stem}{suffix}{number}"
