# SPDX-License-Identifier: Apache-2.0
"""What a compute host does for forks: the other side of :mod:`nova_snowflock.virt.rpc`."""

import base64
from collections.abc import Callable, Iterator
import contextlib
import json
import os
import secrets
import threading
import time
from typing import Any

import libvirt
from lxml import etree
from nova import conf as nova_conf
from nova import context as nova_context
from nova import exception as nova_exception
from nova import objects
from nova import utils
from nova.compute import utils as compute_utils
from nova.compute import vm_states
from nova.network import neutron
from nova.virt.libvirt import host as libvirt_host
from nova.virt.libvirt import imagecache
from nova.virt.libvirt import utils as libvirt_utils
from oslo_log import log as logging
import oslo_messaging as messaging

from nova_snowflock import exception
from nova_snowflock import family_network
from nova_snowflock.guest import protocol
from nova_snowflock.virt import agent_port
from nova_snowflock.virt import disk_info
from nova_snowflock.virt import identity
from nova_snowflock.virt import marks
from nova_snowflock.virt import privileged
from nova_snowflock.virt import record_files
from nova_snowflock.virt import records
from nova_snowflock.virt import rpc
from nova_snowflock.virt.agents import agents
from nova_snowflock.virt.agents import calls
from nova_snowflock.virt.agents import cloud as agents_cloud
from nova_snowflock.virt.agents import courier
from nova_snowflock.virt.agents import description
from nova_snowflock.virt.agents import tickets

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)

FORKING = "forking"
"""Task state of a parent while it is captured."""

_IMAGES_TYPES = ("default", "qcow2", "raw", "flat")
"""Nova's image types whose disks are files, whether qcow2 or raw."""
# A disk whose server is in another state may be part of what that is left with.
_MERGED_STATES = (vm_states.ACTIVE, vm_states.STOPPED)
_UNCONFIRMED = 60.0
"""Seconds in which nova-api has made the clones' servers, or has failed."""
_BUILDING = 300.0
"""Seconds in which the host of a clone that was asked for has its memory, as a rule."""

# Nova writes all of a server's system metadata if one entry has changed.
_NOTING = threading.Lock()


class ForkManager:
    """An endpoint of nova-compute's RPC server, and the owner of this host's fork images.

    :param host: this compute service's name
    :param guests: what Nova finds the domains of its servers with
    """

    target = messaging.Target(namespace=rpc.NAMESPACE, version=rpc.VERSION)

    def __init__(self, host: str, guests: libvirt_host.Host) -> None:
        self._host = host
        self._guests = guests
        self._records = records.Records(os.path.join(CONF.state_path, "snowflock"))
        self._networks = record_files.RecordFiles(
            os.path.join(CONF.state_path, "snowflock", "networks")
        )
        agents_cloud.register_opts(CONF)
        cloud = agents_cloud.Cloud(CONF)
        self._calls = calls.Calls(
            CONF,
            cloud,
            self._records,
            tickets.Tickets(os.path.join(CONF.state_path, "snowflock", "tickets")),
            rpc.ComputeAPI(),
            _guests_server,
            self._stop,
        )
        self.agents = agents.Agents(
            courier.Courier(os.path.join(CONF.state_path, "snowflock")).fetch,
            privileged.guests_with_agents,
            _describe,
            self._go_online,
            self._calls,
        )
        # Until when each image is known to be in use, by clones or by whoever makes them.
        self._used: dict[str, float] = {}
        # Images that are just being captured here, or started from, and how often.
        self._busy: dict[str, int] = {}
        self._lock = threading.Lock()

    # Remote procedures

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
        network: family_network.FamilyNetwork | None = None,
    ) -> rpc.Record:
        """Capture a server of this host."""

        # Nova holds this lock for whatever changes a server.
        @utils.synchronized(instance.uuid)
        def capture() -> rpc.Record:
            with (
                compute_utils.EventReporter(
                    context, "compute_fork", self._host, instance.uuid, graceful_exit=True
                ),
                self.busy(fork_id),
                _task_state(instance),
            ):
                if network is not None:
                    # Whatever becomes of the fork, it goes when nobody is in it.
                    self._networks.write(fork_id, json.dumps(network))
                domain = self._running_domain(instance)
                disks = _forked_disks(instance, domain)
                with self._told(instance, domain, fork_id, params) as quiesced:
                    fork = self._capture(
                        instance,
                        domain,
                        disks,
                        quiesced,
                        fork_id,
                        count,
                        keep,
                        params,
                        checkpoint,
                        network,
                    )
                    # What fails from here on is seen by nova-api, which does not confirm the fork.
                    _note(instance.uuid, f"{rpc.FORK_PREFIX}{fork_id}", self._host)
            return {**self._describe(fork), "first": 1}

        try:
            return capture()
        except messaging.MessagingException as error:
            LOG.exception("The fork %s cannot be noted", fork_id, instance=instance)
            # What there is of it, nova-api removes or, as nobody confirms it, the sweep.
            raise exception.CaptureFailed("its host cannot reach Nova's database") from error

    def _capture(
        self,
        instance: objects.Instance,
        domain: etree._Element,
        disks: list[str],
        quiesced: agents.Quiesced,
        fork_id: str,
        count: int,
        keep: int | None,
        params: dict[str, str],
        checkpoint: bool,
        network: family_network.FamilyNetwork | None,
    ) -> records.Fork:
        if keep is None and not checkpoint:
            keep = CONF.snowflock.keep
        identity.check(
            instance,
            domain,
            len(instance.get_network_info()),
            agent=quiesced.agent,
            allow_unseeded=CONF.snowflock.allow_unseeded,
        )
        key = secrets.token_bytes(32)
        with disk_info.forking(libvirt_utils.get_instance_path(instance), fork_id, disks):
            captured = _captured(instance, fork_id, key)
        fork = records.Fork(
            id=fork_id,
            parent=instance.uuid,
            project_id=instance.project_id,
            created=captured["created"],
            confirmed=False,
            checkpoint=checkpoint,
            keep=keep,
            params=params,
            clones=count,
            method=captured["method"],
            pause=captured["pause"],
            stages=captured["stages"],
            after=captured["after"],
            size=captured["size"],
            vcpus=instance.flavor.vcpus,
            image_ref=instance.image_ref,
            key=key,
            descriptor=captured["descriptor"],
            agent=quiesced.agent,
            network=network,
            problems=quiesced.problems,
        )
        try:
            self._records.put(fork)
        except OSError as error:
            privileged.release(fork_id)
            raise exception.CaptureFailed(f"The fork cannot be recorded: {error}") from error
        self._used[fork_id] = time.monotonic()
        LOG.info(
            "Forked: image %s, the guest was stopped for %.1f ms",
            fork_id,
            fork.pause * 1e3,
            instance=instance,
        )
        return fork

    @contextlib.contextmanager
    def _told(
        self,
        instance: objects.Instance,
        domain: etree._Element,
        fork_id: str,
        params: dict[str, str],
    ) -> Iterator[agents.Quiesced]:
        """The guest knows that it is forked meanwhile, and afterwards what came of it."""
        quiesced = self.agents.quiesce(
            instance.uuid,
            is_open=agent_port.is_open(domain),
            fork=fork_id,
            params=marks.for_hooks(params),
            interfaces=description.interfaces(instance.get_network_info()),
            seconds=CONF.snowflock.quiesce_timeout,
        )
        for problem in quiesced.problems:
            LOG.warning("Fork %s: %s", fork_id, problem, instance=instance)
        error: str | None = "The fork failed"
        try:
            yield quiesced
            error = None
        finally:
            if quiesced.agent:
                self.agents.forked(instance.uuid, fork_id, marks.for_hooks(params), error)

    def _running_domain(self, instance: objects.Instance) -> etree._Element:
        """
        :raises CannotFork: there is none, or none that can be forked on this host
        """
        reason = why_unforkable()
        if reason is not None:
            raise exception.CannotFork(reason)
        try:
            return etree.fromstring(self._guests.get_guest(instance).get_xml_desc())
        except nova_exception.InstanceNotFound as error:
            raise exception.CannotFork("it does not run") from error

    @messaging.expected_exceptions(exception.ForkNotFound)
    def confirm(self, context: nova_context.RequestContext, fork_id: str) -> None:
        """Keep an image: the servers of its clones are there."""
        with self._lock:
            fork = self._records.get(fork_id)
            fork.confirmed = True
            self._records.put(fork)
        if fork.clones:
            self._expect_clones(fork_id)

    @messaging.expected_exceptions(exception.ForkNotFound)
    def extend(self, context: nova_context.RequestContext, fork_id: str, count: int) -> rpc.Record:
        """Give out IDs for more clones."""
        self._ensure_served(self._records.get(fork_id))
        with self._lock:
            fork = self._records.get(fork_id)
            first = fork.clones + 1
            fork.clones += count
            self._records.put(fork)
        self._expect_clones(fork_id)
        return {**self._describe(fork), "first": first}

    @messaging.expected_exceptions(exception.ForkNotFound)
    def show(self, context: nova_context.RequestContext, fork_id: str) -> rpc.Record:
        """One fork."""
        return self._describe(self._records.get(fork_id))

    @messaging.expected_exceptions(exception.ForkNotFound, exception.ForkInUse)
    def release(self, context: nova_context.RequestContext, fork_id: str, force: bool) -> None:
        """Remove an image."""
        fork = self._records.get(fork_id)
        if not force:
            record = self._describe(fork)
            if record["users"] or record["state"] == "unknown":
                raise exception.ForkInUse(
                    f"Clones on {record['users'] or 'some'} hosts may still fetch from the image "
                    f"of fork {fork_id}"
                )
            if any(map(_depends, _clones_of(fork_id))):
                raise exception.ForkInUse(f"Clones still need the image of fork {fork_id}")
        self._remove(fork)

    def population(
        self, context: nova_context.RequestContext, fork_id: str
    ) -> dict[str, Any] | None:
        """What this host has of an image that is held elsewhere."""
        memtap = privileged.status(fork_id)["memtap"]
        if memtap is None:
            return None
        shown = ("state", "population", "faults", "bytes_multicast", "bytes_unicast")
        return {**memtap["pages"], **{name: memtap[name] for name in shown}}

    @messaging.expected_exceptions(exception.ForkNotFound)
    def descriptor(self, context: nova_context.RequestContext, fork_id: str) -> dict[str, Any]:
        """What another host needs to start clones."""
        fork = self._records.get(fork_id)
        self._ensure_served(fork)
        self._expect_clones(fork_id)
        return {
            "descriptor": base64.b64encode(fork.descriptor).decode(),
            "key": base64.b64encode(fork.key).decode(),
            "agent": fork.agent,
        }

    def tell(
        self,
        context: nova_context.RequestContext,
        fork_id: str,
        clone_id: int,
        offset: int | None,
        data: str | None,
        status: int | None,
    ) -> bool:
        """Take what a clone's guest has to say to its parent's."""
        return self._calls.told(fork_id, clone_id, offset, data, status)

    def _describe(self, fork: records.Fork) -> rpc.Record:
        users = 0
        try:
            server = privileged.status(fork.id)["server"]
        except exception.ControlError as error:
            # It may wait for pages itself, of the image that its parent is a clone of.
            state, reason = "unknown", str(error)
        else:
            active = server is not None and server["state"] == "serving"
            state = "active" if active else "lost"
            reason = server["reason"] if server else "its memory server has ended"
            users = len(server["memtaps"]) if server else 0
        return {
            **fork.public(),
            "host": self._host,
            "trait": rpc.trait(CONF.snowflock.hypervisor),
            "state": state,
            "reason": reason,
            "users": users,
        }

    def _ensure_served(self, fork: records.Fork) -> None:
        """
        :raises ForkNotFound: it cannot be served any more
        """
        try:
            # It may take long, and is no matter of other images.
            utils.synchronized(f"snowflock-{fork.id}")(privileged.resume_serving)(
                fork.descriptor, fork.key
            )
        except exception.ControlError as error:
            raise exception.ForkNotFound(f"The image of fork {fork.id} is lost: {error}") from error

    def _expect_clones(self, fork_id: str) -> None:
        self._used[fork_id] = time.monotonic() + _BUILDING

    def _remove(self, fork: records.Fork) -> None:
        privileged.release(fork.id)
        # As long as there is a record, a sweep does what this does not come to.
        _note(fork.parent, f"{rpc.FORK_PREFIX}{fork.id}", None)
        with self._lock:
            self._records.remove(fork.id)
        self._used.pop(fork.id, None)
        # Takes as long as what the parent has written since takes to copy.
        threading.Thread(target=_collapse, args=(fork, self._host), daemon=True).start()

    # For the driver

    @contextlib.contextmanager
    def busy(self, image: str) -> Iterator[None]:
        """What this host has of an image is not in vain, whatever it looks like."""
        with self._lock:
            self._busy[image] = self._busy.get(image, 0) + 1
        try:
            yield
        finally:
            with self._lock:
                self._busy[image] -= 1
                if not self._busy[image]:
                    del self._busy[image]

    def forget(self, server: str) -> None:
        """Forget what programs in a server that is gone were granted."""
        self._calls.forget(server)

    def leave(self, image: str, gone: str) -> None:
        """Remove what this host has of an image for its clones, if that was the last of them.

        :param gone: the UUID of a clone that does not count any more
        """
        needed = self._needed(gone)
        with self._lock:
            if image not in self._busy and image not in needed:
                privileged.leave(image)

    def _needed(self, gone: str | None = None) -> set[str]:
        """Images that servers of this host would miss, even if they do not run just now."""
        return {
            instance.system_metadata[rpc.FORK]
            for instance in self._servers()
            if rpc.FORK in instance.system_metadata
            and instance.uuid != gone
            and _misses_image(instance)
        }

    def _servers(self) -> objects.InstanceList:
        """The servers of this host."""
        return objects.InstanceList.get_by_host(
            nova_context.get_admin_context(), self._host, ["system_metadata"]
        )

    # For agents

    def _go_online(self, server: str, itself: protocol.Message) -> bool:
        """Let a clone that has its own addresses onto its networks."""
        known = _guests_server(server)
        if known.system_metadata.get(rpc.IDENTITY) != identity.AGENT:
            return False
        if itself.get("fork") != known.system_metadata[rpc.FORK]:
            return False  # it has not noticed yet that it is a clone
        if not (itself.get("reseeded") is True or CONF.snowflock.allow_unseeded):
            reason = "its agent could not make new random numbers"
        elif itself.get("configured") is not True:
            reason = "its agent could not give them their own MACs"
        else:
            privileged.connect_interfaces(server)
            return True
        LOG.error("Its network interfaces get no link: %s", reason, instance=known)
        return False

    def _stop(self, server: str) -> None:
        """Have a guest that has nothing to do any more take no processor from others."""
        with contextlib.suppress(libvirt.libvirtError, nova_exception.InstanceNotFound):
            self._guests.get_guest(_guests_server(server)).pause()

    def recover(self) -> None:
        """Put right what an earlier life of this service has left half done."""
        for fork in self._records:
            with _tried_again(f"The fork image {fork.id}"):
                if fork.confirmed:
                    self._serve_again(fork)
                    self._used[fork.id] = time.monotonic()
                else:
                    LOG.info("Fork %s of %s was not finished", fork.id, fork.parent)
                    self._remove(fork)
        self._sweep_images()
        self._end_forking()

    def start_sweeping(self) -> None:
        """Look after the images and disks from time to time, from now on."""
        # Each in its own time: merging layers may take long.
        for name, work in (("images", self.sweep), ("disks", self._settle_disks)):
            threading.Thread(
                target=_repeat, args=(name, work), name=f"snowflock-{name}", daemon=True
            ).start()

    def sweep(self) -> None:
        """Release images that nobody needs any more, and remove what belongs to no image."""
        with _tried_again("What guests have stopped"):
            privileged.end_stopped()
        for fork in self._records:
            with _tried_again(f"The fork image {fork.id}"):
                self._look_after(fork)
        self._sweep_images()
        self._sweep_networks()
        self._end_forking()

    def _sweep_networks(self) -> None:
        """Remove networks of families that have no image and no clones any more."""
        for fork_id in self._networks:
            with _tried_again(f"The network of the fork {fork_id}"):
                # A capture is recorded before it ends to be busy, so in this order.
                if fork_id in self._busy or fork_id in self._records or _clones_of(fork_id):
                    continue
                client = neutron.get_client(nova_context.get_admin_context(), admin=True)
                if family_network.remove(client, json.loads(self._networks.read(fork_id))):
                    self._networks.remove(fork_id)
                    LOG.info("Removed the network of the fork %s", fork_id)

    def _look_after(self, fork: records.Fork) -> None:
        now = time.monotonic()
        server = privileged.status(fork.id)["server"]
        unused = now - self._used.setdefault(fork.id, now)
        if server is None or server["state"] == "lost":
            self._serve_again(fork)
        if not fork.confirmed:
            if unused > _UNCONFIRMED:
                LOG.info("Fork %s of %s: no servers were made for it", fork.id, fork.parent)
                self._remove(fork)
            return
        if unused <= 0:
            return  # it was just captured, or clones are on their way
        clones = _clones_of(fork.id)
        if (server is not None and server["memtaps"]) or any(map(_depends, clones)):
            self._used[fork.id] = now
        elif not clones and _find_server(fork.parent) is None:
            LOG.info("Fork %s: its parent and its clones are gone, so nobody can use it", fork.id)
            self._remove(fork)
        elif fork.keep is not None and unused > fork.keep:
            LOG.info("Fork %s: no clone has needed it for %d s", fork.id, fork.keep)
            self._remove(fork)

    def _serve_again(self, fork: records.Fork) -> None:
        try:
            self._ensure_served(fork)
        except exception.ForkNotFound as error:
            LOG.warning("A fork of %s: %s", fork.parent, error)

    def _sweep_images(self) -> None:
        """Remove what is here of images that are neither held here nor needed by a server."""
        needed = self._needed()
        for image in privileged.images():
            with _tried_again(f"The fork image {image}"), self._lock:
                # A capture is recorded before it ends to be busy, so in this order.
                if image in self._busy or image in needed:
                    continue
                is_held = image in self._records
                if is_held and not privileged.status(image)["memtap"]:
                    continue
                privileged.leave(image)
                if is_held:
                    continue
                # What is presented still is read through by the fork of a clone that is gone.
                if not privileged.status(image)["memtap"] and not privileged.clones(image):
                    privileged.release(image)
                    LOG.info("Removed what was left of the fork image %s", image)

    def _end_forking(self) -> None:
        """Let servers be used again whose capture was cut short, or could not say that it ended."""
        for instance in self._servers():
            if instance.task_state == FORKING:
                utils.synchronized(instance.uuid)(_end_forking)(instance)

    def _settle_disks(self) -> None:
        """Have disks depend on no more than they must: clones' that are all here, and parents' of
        which a merge was cut short."""
        parents = {fork.parent for fork in self._records}
        for instance in self._servers():
            if instance.task_state or instance.vm_state not in _MERGED_STATES:
                continue
            with _tried_again(f"The server {instance.uuid}"):
                _settle(instance, is_parent=instance.uuid in parents)


def _repeat(name: str, work: Callable[[], None]) -> None:
    while True:
        time.sleep(CONF.snowflock.sweep_interval)
        with _tried_again(f"What there is of {name}"):
            work()


def _settle(instance: objects.Instance, *, is_parent: bool) -> None:
    directory = libvirt_utils.get_instance_path(instance)
    # A merge may have been all but finished.
    disk_info.settle(directory)
    image = instance.system_metadata.get(rpc.FORK)
    if image is not None and rpc.LOCAL not in instance.system_metadata:
        memtap = privileged.status(image)["memtap"]
        detached = memtap is not None and memtap["state"] == "detached"
        if detached and _merge(instance, privileged.localize):
            _note(instance.uuid, rpc.LOCAL, "true")
            LOG.info("The disks are on this host now", instance=instance)
    if not is_parent and disk_info.has_layers(directory):
        _merge(instance, privileged.collapse)


@contextlib.contextmanager
def _tried_again(what: str) -> Iterator[None]:
    """Have one image or server that makes trouble be no trouble for others: the next sweep tries
    again."""
    try:
        yield
    except exception.SnowFlockError as error:
        LOG.warning("%s is looked at again in the next sweep: %s", what, error)
    except Exception:
        LOG.exception("%s is looked at again in the next sweep", what)


@contextlib.contextmanager
def _task_state(instance: objects.Instance) -> Iterator[None]:
    """Keep other operations off the server meanwhile.

    :raises CannotFork: one is under way
    """
    instance.task_state = FORKING
    try:
        instance.save(expected_vm_state=[vm_states.ACTIVE], expected_task_state=[None])
    except nova_exception.InstanceNotFound as error:
        raise exception.CannotFork("it has been deleted") from error
    except (
        nova_exception.UnexpectedTaskStateError,
        nova_exception.UnexpectedVMStateError,
    ) as error:
        raise exception.CannotFork("something else is being done with it") from error
    try:
        yield
    finally:
        try:
            _end_forking(instance)
        except messaging.MessagingException:
            LOG.exception("It stays in %s until the next sweep", FORKING, instance=instance)


def _end_forking(instance: objects.Instance) -> None:
    instance.task_state = None
    # It is deleted, or about to be; or the state has ended already.
    ended = (nova_exception.InstanceNotFound, nova_exception.UnexpectedTaskStateError)
    with contextlib.suppress(*ended):
        instance.save(expected_task_state=[FORKING])


def why_unforkable() -> str | None:
    """Why this host's servers have no disks that can be forked, or None."""
    kind = CONF.libvirt.images_type
    if kind in _IMAGES_TYPES:
        return None
    return (
        f"its host keeps disks as {kind} ([libvirt]images_type): create it on one that keeps them "
        "as qcow2 or raw files"
    )


def _forked_disks(instance: objects.Instance, domain: etree._Element) -> list[str]:
    """Paths of the disks that clones will have layers of their own of.

    :raises CannotFork: Nova would not find its way with those
    """
    directory = libvirt_utils.get_instance_path(instance)
    disks = [disk_info.disk_of(path) for path in disk_info.own_disks(domain, directory)]
    if os.path.join(directory, disk_info.CONFIG_DRIVE) in disks:
        raise exception.CannotFork(
            "its config drive is a disk that it can write to, of which a clone would have its "
            "parent's: fork a server with a config drive in the format iso9660, or with none"
        )
    return disks


def shared_images(instance: objects.Instance) -> list[str]:
    """Paths that Nova's image cache has the server's image at, on every host."""
    image = instance.system_metadata.get("image_base_image_ref") or instance.image_ref
    if not image:
        return []
    return [os.path.join(disk_info.image_cache(), imagecache.get_cache_fname(image))]


def _captured(instance: objects.Instance, fork_id: str, key: bytes) -> dict[str, Any]:
    try:
        captured = privileged.capture(instance.uuid, fork_id, key, shared_images(instance))
    except OSError as error:
        # The process that did it has ended: another one lets the guest run again.
        privileged.release(fork_id)
        raise exception.CaptureFailed("the privileged process of its host has ended") from error
    return dict(captured)


def _guests_server(uuid: str) -> objects.Instance:
    """A server whose guest's agent has something to say."""
    context = nova_context.get_admin_context()
    return objects.Instance.get_by_uuid(
        context, uuid, ["flavor", "info_cache", "metadata", "system_metadata"]
    )


def _describe(server: str) -> dict[str, Any]:
    instance = _guests_server(server)
    return description.you(instance, instance.get_network_info())


def _find_server(uuid: str) -> objects.Instance | None:
    context = nova_context.get_admin_context()
    try:
        return objects.Instance.get_by_uuid(context, uuid, ["system_metadata"])
    except nova_exception.InstanceNotFound:
        return None


def _clones_of(fork_id: str) -> objects.InstanceList:
    """The servers that are clones of a fork, on whatever host."""
    return objects.InstanceList.get_by_filters(
        nova_context.get_admin_context(),
        {"deleted": False, "system_metadata": {rpc.FORK: fork_id}},
        expected_attrs=["system_metadata"],
    )


def _depends(clone: objects.Instance) -> bool:
    """Whether a clone was started and needs its image, even if its host does not ask for it now."""
    return bool(clone.host and clone.launched_at and _misses_image(clone))


def _misses_image(clone: objects.Instance) -> bool:
    """Whether a clone could not be started again without its image."""
    is_local = rpc.LOCAL in clone.system_metadata
    return not is_local or clone.vm_state == vm_states.SUSPENDED


def _note(server: str, key: str, value: str | None) -> None:
    """Have an entry in a server's system metadata, or with None no longer, if there is a server."""
    with _NOTING, contextlib.suppress(nova_exception.InstanceNotFound):
        instance = _find_server(server)
        if instance is None or instance.system_metadata.get(key) == value:
            return
        if value is None:
            del instance.system_metadata[key]
        else:
            instance.system_metadata[key] = value
        instance.save()


def _collapse(fork: records.Fork, host: str) -> None:
    parent = _find_server(fork.parent)
    if parent is None or parent.host != host or parent.vm_state not in _MERGED_STATES:
        return  # if it is still there, the sweep will find the layers
    try:
        _merge(parent, privileged.collapse)
    except exception.SnowFlockError:
        LOG.exception(
            "The disks keep their layers until the next sweep that can merge them", instance=parent
        )


def _merge(instance: objects.Instance, function: Callable[[str, bool], bool]) -> bool:
    """Merge layers of a server's disks: of a stopped one, with QEMU's lock on the files, so it must
    not be started meanwhile; of a running one, as long as it may take. Not at all if it has been
    started or stopped since the server was looked up."""
    running = instance.vm_state == vm_states.ACTIVE

    def merge() -> bool:
        try:
            return function(instance.uuid, running)
        finally:
            disk_info.settle(libvirt_utils.get_instance_path(instance))

    if running:
        return merge()
    return bool(utils.synchronized(instance.uuid)(merge)())
