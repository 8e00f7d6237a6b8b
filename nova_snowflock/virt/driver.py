# SPDX-License-Identifier: Apache-2.0
"""The Nova driver: libvirt's, with servers that can be forked and clones that start from a fork.

Everything else is done as Nova does it. A clone is a server like any other from the moment it
runs: what is special about it is where its memory, and the content of its disks, come from.
"""

import base64
from collections.abc import Container, Iterator
import contextlib
import dataclasses
import json
import os
import time
from typing import Any
import uuid

import libvirt
from lxml import etree
from nova import conf as nova_conf
from nova import exception as nova_exception
from nova import objects
from nova.compute import utils as compute_utils
from nova.privsep import path as nova_path
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import imagebackend
from nova.virt.libvirt import utils as libvirt_utils
from nova.virt.libvirt import vif as libvirt_vif
from oslo_log import log as logging

from nova_snowflock import exception
from nova_snowflock.virt import agent_port
from nova_snowflock.virt import disk_info
from nova_snowflock.virt import host
from nova_snowflock.virt import hypervisor
from nova_snowflock.virt import identity
from nova_snowflock.virt import manager
from nova_snowflock.virt import privileged
from nova_snowflock.virt import rpc
from nova_snowflock.virt.agents import description

CONF = nova_conf.CONF
LOG = logging.getLogger(__name__)

_INTERFACES = {
    identity.AGENT: hypervisor.Interfaces.HOLD,
    identity.HOTPLUG: hypervisor.Interfaces.REPLACE,
    identity.NONE: hypervisor.Interfaces.KEEP,
}
_LOOK_AGAIN = 0.5
"""Seconds between looks at a copy of a disk."""


@dataclasses.dataclass(frozen=True)
class _Origin:
    """What a clone starts from.

    :param agent: whether an agent in its guest was there
    :param times: when it got how far, as :data:`rpc.TIMES` says
    """

    descriptor: bytes
    key: bytes = dataclasses.field(repr=False)
    agent: bool
    times: dict[str, float] = dataclasses.field(default_factory=dict)

    def reached(self, stage: str) -> None:
        self.times[stage] = round(time.time(), 3)


class _ImageBackend(imagebackend.Backend):
    """Nova's, but that a clone's disks are qcow2, whatever its host makes others.

    They will be layers on the parent's. Nova notes that when it makes the disks, and goes by it
    from then on.

    :param clones: UUIDs of those that are being built
    """

    def __init__(self, use_cow: bool, clones: Container[str]) -> None:
        super().__init__(use_cow)
        self._clones = clones

    def by_name(
        self,
        instance: objects.Instance,
        name: str,
        image_type: str | None = None,
        disk_info_mapping: dict[str, Any] | None = None,
    ) -> imagebackend.Image:
        if (
            instance.uuid in self._clones
            and name.startswith("disk")
            and name != disk_info.CONFIG_DRIVE
        ):
            image_type = disk_info.QCOW2
        return super().by_name(instance, name, image_type, disk_info_mapping)


class SnowFlockDriver(libvirt_driver.LibvirtDriver):
    """Nova's libvirt driver with VM fork."""

    _host_class = host.Host

    def __init__(self, virtapi: Any, read_only: bool = False) -> None:
        super().__init__(virtapi, read_only)
        self._host = self._host_class(
            self._uri(),
            read_only,
            lifecycle_event_handler=self.emit_event,
            conn_event_handler=self._handle_conn_event,
        )
        self.vif_driver = libvirt_vif.LibvirtGenericVIFDriver(self._host)
        # Of clones that are just being built, by their UUIDs.
        self._origins: dict[str, _Origin] = {}
        self.image_backend = _ImageBackend(CONF.use_cow_images, self._origins)

    def init_host(self, host: str) -> None:
        """Serve forks, and take up what an earlier life of this service has left."""
        super().init_host(host)
        self._host_name = host
        self._compute_api = rpc.ComputeAPI()
        self._forks = manager.ForkManager(host, self._host)
        self._forks.recover()
        self.virtapi._compute.additional_endpoints.append(self._forks)
        self._forks.start_sweeping()
        self._forks.agents.start()

    def update_provider_tree(
        self, provider_tree: Any, nodename: str, allocations: Any = None
    ) -> None:
        """Also says whether the host takes clones."""
        super().update_provider_tree(provider_tree, nodename, allocations)
        trait = rpc.trait(CONF.snowflock.hypervisor)
        if manager.why_unforkable() is None:
            provider_tree.add_traits(nodename, trait)
        else:
            provider_tree.remove_traits(nodename, trait)

    # Starting servers

    def _get_guest_xml(self, *args: Any, **kwargs: Any) -> str:
        return _forkable(super()._get_guest_xml(*args, **kwargs))

    def spawn(self, context: Any, instance: objects.Instance, *args: Any, **kwargs: Any) -> None:
        """Build a server; a clone, when it is built first, from its fork's image."""
        image = instance.system_metadata.get(rpc.FORK)
        if image is None:
            super().spawn(context, instance, *args, **kwargs)
            return
        if instance.launched_at is not None:
            # A rebuilt, unshelved or evacuated clone is an ordinary server.
            super().spawn(context, instance, *args, **kwargs)
            instance.system_metadata[rpc.LOCAL] = "true"
            return
        try:
            with self._forks.busy(image):
                started = time.time()
                origin = self._find_origin(context, instance, image)
                origin.times["spawn"] = round(started, 3)
                self._origins[instance.uuid] = origin
                # Its agent may ask before Nova writes down how it was built.
                instance.system_metadata[rpc.IDENTITY] = identity.way(instance, origin.agent)
                instance.save()
                with compute_utils.EventReporter(
                    context, "compute_fork", self._host_name, instance.uuid, graceful_exit=True
                ):
                    super().spawn(context, instance, *args, **kwargs)
        except (exception.ForkNotFound, exception.HostUnavailable) as error:
            LOG.error("The clone cannot be started: %s", error, instance=instance)
            # No other host could do better. Users are not told the names of hosts.
            raise nova_exception.BuildAbortException(
                instance_uuid=instance.uuid, reason=_why_no_image(error, image)
            ) from error
        except Exception:
            self._forks.leave(image, instance.uuid)
            raise
        finally:
            self._origins.pop(instance.uuid, None)

    def _find_origin(self, context: Any, instance: objects.Instance, image: str) -> _Origin:
        found = self._compute_api.descriptor(context, instance.system_metadata[rpc.HOST], image)
        return _Origin(
            base64.b64decode(found["descriptor"]), base64.b64decode(found["key"]), found["agent"]
        )

    def plug_vifs(self, instance: objects.Instance, network_info: Any) -> None:
        """Nova's; for a clone, also the end of making its disks."""
        origin = self._origins.get(instance.uuid)
        if origin is not None:
            origin.reached("disks")
        super().plug_vifs(instance, network_info)

    def _create_guest_with_network(
        self,
        context: Any,
        xml: str,
        instance: objects.Instance,
        network_info: Any,
        *args: Any,
        **kwargs: Any,
    ) -> libvirt_guest.Guest:
        guest = super()._create_guest_with_network(
            context, xml, instance, network_info, *args, **kwargs
        )
        origin = self._origins.get(instance.uuid)
        if origin is not None:
            # Not before: Nova keeps it stopped until its network is there.
            origin.reached("running")
            if origin.agent:
                self._forks.agents.watch(instance.uuid, description.you(instance, network_info))
            instance.system_metadata[rpc.TIMES] = json.dumps(origin.times)
        return guest

    def _create_guest(
        self,
        context: Any,
        xml: str,
        instance: objects.Instance,
        power_on: bool = True,
        pause: bool = False,
        post_xml_callback: Any = None,
    ) -> libvirt_guest.Guest:
        xml = self._with_disks_as_they_are(xml, instance)
        origin = self._origins.get(instance.uuid)
        if origin is None:
            return super()._create_guest(context, xml, instance, power_on, pause, post_xml_callback)
        # Persistent as Nova has it: it is this that runs after a hard reboot.
        guest = libvirt_guest.Guest.create(xml, self._host)
        if post_xml_callback is not None:
            post_xml_callback()
        self.cpu_api.power_up_for_instance(instance)
        origin.reached("guest")
        directory = libvirt_utils.get_instance_path(instance)
        disks = {}
        for path, disk in disk_info.own_disks(etree.fromstring(xml.encode()), directory).items():
            target = disk.find("target")
            assert target is not None
            disks[str(target.get("dev"))] = path
            os.unlink(path)  # Nova's, of the image; the clone's are layers on its parent's
        own = {
            "name": guest.name,
            "uuid": instance.uuid,
            "clone_id": int(instance.system_metadata[rpc.CLONE_ID]),
            "domain": xml,
            "disks": disks,
            "bases": manager.shared_images(instance),
            "interfaces": _INTERFACES[instance.system_metadata[rpc.IDENTITY]].value,
        }
        privileged.spawn(
            origin.descriptor,
            origin.key,
            own,
            pause,
            instance.system_metadata.get(rpc.POPULATION),
            os.getgid(),
        )
        origin.reached("restored")
        return self._host.get_guest(instance)

    def _with_disks_as_they_are(self, xml: str, instance: objects.Instance) -> str:
        """A domain's XML with its disks in the formats that they have now, and without layers.

        Until the domain before it was gone, layers may have been merged: since Nova wrote the XML,
        or took it from a domain that ran.
        """
        directory = libvirt_utils.get_instance_path(instance)
        disk_info.settle(directory)
        root = etree.fromstring(xml.encode())
        for known_as, disk in disk_info.own_disks(root, directory).items():
            source, driver = disk.find("source"), disk.find("driver")
            assert source is not None
            assert driver is not None
            _remove_layers(disk)
            path = disk_info.disk_of(known_as)
            source.set("file", path)
            if not os.path.basename(path).startswith(disk_info.CONFIG_DRIVE):
                image = self.image_backend.by_libvirt_path(instance, path)
                driver.set("type", image.driver_format)
        return _text(root)

    def _hard_reboot(
        self, context: Any, instance: objects.Instance, *args: Any, **kwargs: Any
    ) -> None:
        self._ensure_presented(context, instance)
        super()._hard_reboot(context, instance, *args, **kwargs)

    def resume(self, context: Any, instance: objects.Instance, *args: Any, **kwargs: Any) -> None:
        """Resume a suspended server; a clone's memory must be there for it."""
        domain = self._host.get_connection().lookupByUUIDString(instance.uuid)
        self._ensure_presented(context, instance, _saved(domain))
        _forget_layers(domain)
        super().resume(context, instance, *args, **kwargs)

    def rescue(self, context: Any, instance: objects.Instance, *args: Any, **kwargs: Any) -> None:
        """Boot a server from another image; a clone's own disk must be there for it, too."""
        self._ensure_presented(context, instance)
        super().rescue(context, instance, *args, **kwargs)

    def snapshot(
        self, context: Any, instance: objects.Instance, image_id: str, update_task_state: Any
    ) -> None:
        """Make an image of a server's disk; a clone's must be there for it."""
        self._ensure_presented(context, instance)
        super().snapshot(context, instance, image_id, update_task_state)

    def _live_snapshot(
        self,
        context: Any,
        instance: objects.Instance,
        guest: libvirt_guest.Guest,
        disk_path: str,
        out_path: str,
        source_format: str,
        image_format: str,
        image_meta: objects.ImageMeta,
    ) -> None:
        # Nova puts its snapshot above what a disk is based on, and for its safety takes nothing
        # that has a base of its own. Where there are layers, QEMU copies what the guest sees.
        if not _has_layers(disk_path, source_format):
            super()._live_snapshot(
                context,
                instance,
                guest,
                disk_path,
                out_path,
                source_format,
                image_format,
                image_meta,
            )
            return
        if self._requires_quiesce(image_meta):
            self._can_quiesce(instance, image_meta)
        copy = f"{out_path}.copy"
        size = libvirt_utils.get_disk_size(disk_path, format=source_format)
        libvirt_utils.create_image(copy, disk_info.QCOW2, size)
        with _mirrored(guest.get_block_device(disk_path), copy):
            quiesced = self._quiesce_if_possible(context, instance, image_meta)
        if quiesced:
            self.unquiesce(context, instance, image_meta)
        nova_path.chown(copy, uid=os.getuid())
        libvirt_utils.extract_snapshot(copy, disk_info.QCOW2, out_path, image_format)
        os.unlink(copy)

    def _quiesce_if_possible(
        self, context: Any, instance: objects.Instance, image_meta: objects.ImageMeta
    ) -> bool:
        try:
            self.quiesce(context, instance, image_meta)
        except nova_exception.NovaException as error:
            LOG.info("The snapshot is as after a loss of power: %s", error, instance=instance)
            return False
        return True

    def _ensure_presented(
        self, context: Any, instance: objects.Instance, saved: str | None = None
    ) -> None:
        """Have what a clone's disks are based on, also after this host was rebooted.

        :param saved: XML of what it is resumed from; its memory is presented, too, if that maps it
        """
        metadata = instance.system_metadata
        image = metadata.get(rpc.FORK)
        if image is None:
            return
        is_mapped = saved is not None and f"/{image}/" in saved
        if (rpc.LOCAL in metadata and not is_mapped) or privileged.status(image)["memtap"]:
            return
        with self._forks.busy(image):
            origin = self._find_origin(context, instance, image)
            privileged.present(
                origin.descriptor, origin.key, metadata.get(rpc.POPULATION), os.getgid()
            )

    def _create_images_and_backing(
        self,
        context: Any,
        instance: objects.Instance,
        instance_dir: str,
        disk_info: list[dict[str, Any]] | None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        # For a reboot, Nova makes sure that what disks are based on is in its image cache. Layers
        # of forks are not from there.
        cached = [
            info
            for info in disk_info or ()
            if not (os.path.exists(info["path"]) and _has_layers(info["path"], info["type"]))
        ]
        super()._create_images_and_backing(context, instance, instance_dir, cached, *args, **kwargs)

    # Ending and moving servers

    def cleanup(
        self,
        context: Any,
        instance: objects.Instance,
        network_info: Any,
        block_device_info: Any = None,
        destroy_disks: bool = True,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Also lets go of a clone's image, when its disks go."""
        super().cleanup(
            context, instance, network_info, block_device_info, destroy_disks, *args, **kwargs
        )
        image = instance.system_metadata.get(rpc.FORK)
        if image is not None and destroy_disks:
            self._forks.leave(image, instance.uuid)
        if destroy_disks:
            self._forks.forget(instance.uuid)

    def check_can_live_migrate_source(
        self, context: Any, instance: objects.Instance, *args: Any, **kwargs: Any
    ) -> Any:
        """Refused for servers whose memory or disks are not their own yet."""
        reason = self._why_bound(instance)
        if reason is not None:
            raise nova_exception.MigrationPreCheckError(reason=reason)
        return super().check_can_live_migrate_source(context, instance, *args, **kwargs)

    def migrate_disk_and_power_off(
        self, context: Any, instance: objects.Instance, *args: Any, **kwargs: Any
    ) -> Any:
        """Refused for servers whose disks are not their own yet."""
        reason = _why_disks_bound(instance)
        if reason is not None:
            raise nova_exception.InstanceFaultRollback(nova_exception.ResizeError(reason=reason))
        return super().migrate_disk_and_power_off(context, instance, *args, **kwargs)

    def _why_bound(self, instance: objects.Instance) -> str | None:
        image = instance.system_metadata.get(rpc.FORK)
        if image is not None and instance.uuid in privileged.clones(image):
            return (
                "its memory is mapped from its fork's image on this host until it is rebooted hard"
            )
        return _why_disks_bound(instance)


def _has_layers(path: str, disk_format: str) -> bool:
    """Whether a disk is based on something that is not of Nova's image cache."""
    base = libvirt_utils.get_disk_backing_file(path, basename=False, format=disk_format)
    return base is not None and os.path.dirname(base) != disk_info.image_cache()


@contextlib.contextmanager
def _mirrored(device: libvirt_guest.BlockDevice, path: str) -> Iterator[None]:
    """A qcow2 file has all that a guest's disk has, until the context ends.

    :raises InternalError: it could not be copied
    """
    destination = etree.Element("disk", type="file")
    etree.SubElement(destination, "driver", type=disk_info.QCOW2)
    etree.SubElement(destination, "source", file=path)
    # A merge of layers can wait. It may just have ended.
    with contextlib.suppress(libvirt.libvirtError):
        device.abort_job()
    device.copy(_text(destination), reuse_ext=True, transient=True)
    try:
        while not device.is_job_complete():
            time.sleep(_LOOK_AGAIN)
        if device.get_job_info() is None:
            raise nova_exception.InternalError("Copying the disk failed; libvirt's log says why")
        yield
    finally:
        if device.get_job_info() is not None:
            device.abort_job()


def _why_no_image(error: exception.SnowFlockError, image: str) -> str:
    if isinstance(error, exception.ForkNotFound):
        return f"fork {image} has no image any more"
    return f"the compute host that holds the image of fork {image} does not answer"


def _why_disks_bound(instance: objects.Instance) -> str | None:
    """Why the server's disks cannot leave this host, or None."""
    reason = rpc.why_disks_bound(instance.system_metadata)
    if reason is not None:
        return reason
    if disk_info.has_layers(libvirt_utils.get_instance_path(instance)):
        return "the layers of its disks are still being merged; try again in a minute"
    return None


def _forkable(xml: str) -> str:
    """What the servers of this driver have beyond Nova's own.

    A generation ID tells the kernel of a clone to reseed its random number generator. Pages that a
    guest reports as free need not be fetched by its clones. An agent in it talks through a port.
    """
    root = etree.fromstring(xml.encode())
    if root.get("type") in ("qemu", "kvm"):
        if root.find("genid") is None:
            genid = etree.Element("genid")
            genid.text = str(uuid.uuid4())
            place = root.find("uuid")
            assert place is not None
            place.addnext(genid)
        for balloon in root.iterfind("devices/memballoon[@model='virtio']"):
            balloon.set("freePageReporting", "on")
        agent_port.ensure(root)
    return _text(root)


def _text(root: etree._Element) -> str:
    return str(etree.tostring(root, encoding="unicode", pretty_print=True))


def _saved(domain: libvirt.virDomain) -> str | None:
    """The XML of what a suspended server is resumed from, if there is that, and it can be known."""
    if not domain.hasManagedSaveImage():
        return None
    try:
        return str(domain.managedSaveGetXMLDesc(libvirt.VIR_DOMAIN_SAVE_IMAGE_XML_SECURE))
    except libvirt.libvirtError as error:
        if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
            raise
        return None  # libxl's driver does not tell


def _forget_layers(domain: libvirt.virDomain) -> None:
    """Have a suspended server's disks be opened as their files say.

    libvirt has saved what it knows of their layers, and there those of forks have all one name.
    """
    saved = _saved(domain)
    if saved is None:
        return
    root = etree.fromstring(saved.encode())
    for disk in root.iterfind("devices/disk"):
        _remove_layers(disk)
    domain.managedSaveDefineXML(_text(root))


def _remove_layers(disk: etree._Element) -> None:
    for layers in disk.findall("backingStore"):
        disk.remove(layers)
