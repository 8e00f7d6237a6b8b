# SPDX-License-Identifier: Apache-2.0
"""The QEMU back end: forks libvirt's guests, without their help.

docs/qemu.rst tells how, and what the files in an image's run directory are.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import datetime
import os
import socket

import libvirt
from lxml import etree
from oslo_config import cfg
from oslo_log import log as logging

from nova_snowflock import descriptor as image_descriptor
from nova_snowflock import exception
from nova_snowflock.memtap import control
from nova_snowflock.memtap import pagemap
from nova_snowflock.memtap import process
from nova_snowflock.memtap import spec as process_spec
from nova_snowflock.virt import back_end
from nova_snowflock.virt import connections
from nova_snowflock.virt import deadline
from nova_snowflock.virt import hypervisor
from nova_snowflock.virt import stages
from nova_snowflock.virt.disks import clone as disk_clone
from nova_snowflock.virt.disks import merge
from nova_snowflock.virt.qemu import channel
from nova_snowflock.virt.qemu import clone
from nova_snowflock.virt.qemu import disks
from nova_snowflock.virt.qemu import domain_xml
from nova_snowflock.virt.qemu import freeze
from nova_snowflock.virt.qemu import frozen as frozen_process
from nova_snowflock.virt.qemu import guest as qemu_guest
from nova_snowflock.virt.qemu import interfaces
from nova_snowflock.virt.qemu import monitor
from nova_snowflock.virt.qemu import nodes
from nova_snowflock.virt.qemu import procfs
from nova_snowflock.virt.qemu import save_image
from nova_snowflock.virt.qemu import stream

LOG = logging.getLogger(__name__)

METHOD = "copy-on-write"
"""How memory is frozen: by a child of QEMU, which shares it."""


@dataclasses.dataclass(frozen=True)
class _Preparation(back_end.Preparation):
    guest: qemu_guest.Guest
    server: control.MemoryServerClient
    freezer: freeze.Freezer
    device_state: monitor.DeviceState
    disks: disks.DiskFork


class QemuHypervisor(back_end.BackEnd[_Preparation]):
    """Forks guests of libvirt's (``qemu:///system``), on this host."""

    def __init__(self, to_libvirt: connections.Connections, conf: cfg.ConfigOpts) -> None:
        super().__init__(to_libvirt, conf)
        # libvirt finds out about QEMU when it is first asked (0.4 s). No clone shall wait for that.
        to_libvirt.get().getVersion()

    def probe(self, domain: libvirt.virDomain) -> str | None:
        try:
            with stages.raised_as(exception.CannotFork):
                qemu_guest.examine(domain)
        except exception.CannotFork as refusal:
            return str(refusal)
        return None

    def prepare(
        self,
        domain: libvirt.virDomain,
        image: str,
        key: bytes,
        *,
        shared: Callable[[str], bool] = lambda _: False,
    ) -> hypervisor.Preparation:
        if os.path.exists(self._images.directory(image)):
            raise exception.CannotFork(f"the image {image} exists already on this host")
        spec = self._images.server_spec(image, key)
        with (
            self._removed_on_failure(image),
            stages.raised_as(exception.CannotFork),
            contextlib.ExitStack() as resources,
        ):
            guest = qemu_guest.examine(domain)
            if guest.disks:
                blocks = self._blocks(domain)
                lock = resources.enter_context(
                    self._locked(domain.UUIDString(), lambda: merge.interrupt(blocks))
                )
                merge.recover(blocks, lock)
                guest = qemu_guest.examine(domain)
            ranges = [(address, size) for _, address, size in guest.writable]
            fork = disks.DiskFork(guest, image, shared, self._images.run_path)
            server = process.start_memory_server(spec)
            freezer = resources.enter_context(freeze.Freezer(guest.pid, ranges))
            state = resources.enter_context(monitor.DeviceState(guest.qemu))
            fork.prepare(self._images.store_path)
            preparation = _Preparation(
                image, resources.pop_all(), guest, server, freezer, state, fork
            )
        self._preparations[image] = preparation
        return preparation

    def capture(self, preparation: hypervisor.Preparation) -> hypervisor.Capture:
        preparation = self._preparations.pop(preparation.image)
        with (
            self._collapsed_on_failure(preparation.guest.domain, preparation.disks),
            self._removed_on_failure(preparation.image),
            preparation.resources,
        ):
            with stages.raised_as(exception.CannotFork):
                preparation.guest.check_unchanged()
            with stages.raised_as(exception.CaptureFailed):
                return self._capture(preparation)

    def _capture(self, preparation: _Preparation) -> hypervisor.Capture:
        guest, image = preparation.guest, preparation.image
        if guest.disks:
            # What it writes between this and its stop is copied while it is stopped.
            preparation.disks.switch()
        stop = stages.Stopwatch()
        with self._images.stopping(image, guest.domain.UUIDString()):
            frozen = frozen_process.Frozen(_stop(preparation, stop), guest.file)

        after = stages.Stopwatch()
        frozen.record(self._images.directory(image))
        if guest.disks:
            preparation.disks.record(self._images.store_path)
            merge.define_without_layers(guest.domain)
        preparation.freezer.settle()
        after.lap("settle")
        # Whoever releases the image meanwhile does not know of it yet.
        with contextlib.ExitStack() as undo:
            undo.callback(frozen.process.kill)
            descriptor = self._publish(preparation, frozen, after)
            undo.pop_all()
        pause = sum(stop.laps.values())
        LOG.info(
            "Image %s captured: the guest %s was stopped for %.1f ms, in which %d KiB that it had "
            "just written to disks were copied",
            image,
            guest.domain.name(),
            pause * 1e3,
            preparation.disks.copied >> 10,
        )
        return hypervisor.Capture(descriptor, METHOD, pause, stop.laps, after.laps)

    def _publish(
        self,
        preparation: _Preparation,
        frozen: frozen_process.Frozen,
        after: stages.Stopwatch,
    ) -> image_descriptor.Descriptor:
        """Have the memory server serve the image; its descriptor."""
        guest, server = preparation.guest, preparation.server
        layers = preparation.disks.layers
        with frozen.opened() as (memory, pages), layers.opened() as (files, fds):
            published = server.publish([frozen.file, *files], (memory, pages, *fds))
            after.lap("publish")
            state = stream.compose(
                guest.machine_type,
                guest.clone_blocks,
                guest.small_pages(memory),
                preparation.device_state.read(),
            )
        descriptor = image_descriptor.Descriptor(
            image=preparation.image,
            hypervisor=clone.HYPERVISOR,
            hypervisor_version=guest.version,
            machine_type=guest.machine_type,
            cpu=guest.cpu,
            vcpus=guest.vcpus,
            ram_blocks=guest.clone_blocks,
            files=tuple(image_descriptor.File(*file) for file in published.files),
            servers=published.servers,
            group=published.group,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            domain=guest.xml,
            device_state=state,
            disks=layers.described(),
        )
        after.lap("compose")
        server.serve(descriptor.encode())
        after.lap("serve")
        return descriptor

    def resume_serving(self, descriptor: image_descriptor.Descriptor, key: bytes) -> None:
        image = descriptor.image
        frozen = frozen_process.Frozen.find(self._images.directory(image))
        if frozen is None or not frozen.process.alive():
            raise exception.ControlError(
                f"The frozen memory of image {image} is not on this host any more"
            )
        with self._images.serving_again(descriptor, key) as server:
            if server is None:
                return
            with (
                stages.raised_as(exception.ControlError),
                frozen.opened() as (memory, pages),
                self._opened_layers(descriptor) as (files, fds),
            ):
                published = server.publish([frozen.file, *files], (memory, pages, *fds))
            _check_covered(descriptor, published.files[0].page_map)
            server.serve(descriptor.encode())

    def spawn(
        self,
        descriptor: image_descriptor.Descriptor,
        key: bytes,
        identity: hypervisor.Identity,
        *,
        paused: bool = False,
        population: str | None = None,
        group: int | None = None,
    ) -> libvirt.virDomain:
        image = descriptor.image
        memory = clone.check_descriptor(descriptor)
        mount = process_spec.mount_path(self._images.directory(image))
        xml = domain_xml.clone(
            descriptor.domain,
            identity.name,
            identity.uuid,
            os.path.join(mount, memory.name),
            memory.size,
            own_domain=identity.domain,
            disks=identity.disks,
            replaced=identity.interfaces == hypervisor.Interfaces.REPLACE,
        )
        clone.check_host(self._connections.get(), descriptor)
        disk_clone.check_disks(descriptor, identity.bases)
        with (
            self._presented(descriptor, key, population, group),
            deadline.bounded(
                self._conf.spawn_timeout, identity.name, lambda: self._give_up(image, identity.uuid)
            ),
            disk_clone.own_layers(descriptor, identity, mount, self._owner()),
        ):
            try:
                self._restore(image, xml, descriptor.device_state)
                domain = self._connections.get().lookupByUUIDString(identity.uuid)
                with stages.ended_on_failure(domain):
                    clone.use_small_pages(domain, mount)
                    if identity.interfaces == hypervisor.Interfaces.REPLACE:
                        interfaces.replace(domain, identity.domain)
                    elif identity.interfaces == hypervisor.Interfaces.HOLD:
                        interfaces.hold(domain)
                    if not paused:
                        domain.resume()
                return domain
            except libvirt.libvirtError as error:
                raise exception.SpawnFailed(
                    f"The clone {identity.name} of image {image} could not be started: {error}"
                ) from error

    def _restore(self, image: str, xml: str, incoming: bytes) -> None:
        header = save_image.header(xml, running=False)
        with self._images.save_file(image, header, incoming) as path:
            self._connections.get().restoreFlags(path, None, libvirt.VIR_DOMAIN_SAVE_PAUSED)

    def _resume_stopped(self, image: str) -> None:
        stopped = self._images.stopped(image)
        domain = None if stopped is None else self._find_domain(stopped)
        if domain is not None and domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
            LOG.warning("The guest %s was left stopped by a fork and runs again", domain.name())
            domain.resume()

    def end_stopped(self) -> None:
        pass  # libvirt notices

    def connect_interfaces(self, domain: libvirt.virDomain) -> None:
        interfaces.connect(domain)

    def guests_with_agents(self) -> list[str]:
        return channel.opened(self._connections.get())

    def channel(self, domain: libvirt.virDomain) -> socket.socket:
        return channel.connect(domain)

    def _blocks(self, domain: libvirt.virDomain) -> nodes.Blocks:
        return nodes.Blocks(domain)

    def _has_memory(self, directory: str) -> bool:
        return frozen_process.Frozen.find(directory) is not None

    def _forget_memory(self, directory: str) -> None:
        frozen = frozen_process.Frozen.find(directory)
        if frozen is not None:
            frozen.process.kill()
            frozen.forget(directory)

    def _uses_memory(self, domain: libvirt.virDomain, directory: str) -> bool:
        return f"{process_spec.mount_path(directory)}/" in domain.XMLDesc()

    def _mapped(self, directory: str) -> Iterator[str]:
        frozen = frozen_process.Frozen.find(directory)
        if frozen is not None:
            yield frozen.file.get("mapped", "")

    def _owner(self) -> tuple[int, int]:
        # That libvirt runs guests as (secmodel dac).
        root = etree.fromstring(self._connections.get().getCapabilities().encode())
        label = root.findtext("host/secmodel[model='dac']/baselabel", default="+0:+0")
        user, _, group = label.partition(":")
        return int(user), int(group)


def _stop(preparation: _Preparation, stop: stages.Stopwatch) -> procfs.Process:
    """Stop the guest, save and freeze it, and let it run again, whatever happens."""
    domain = preparation.guest.domain
    try:
        domain.suspend()
        stop.lap("suspend")
        preparation.device_state.save()
        stop.lap("device_state")
        if preparation.guest.disks:
            preparation.disks.copy_tips()
            stop.lap("disks")
        frozen = preparation.freezer.freeze(stop.lap)
    finally:
        _resume(domain)
    stop.lap("resume")
    return frozen


def _resume(domain: libvirt.virDomain) -> None:
    try:
        domain.resume()
    except libvirt.libvirtError as error:
        if not domain.isActive():
            LOG.error("The guest %s ended while it was being forked", domain.name())
        elif domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
            raise exception.CaptureFailed(
                f"The guest {domain.name()} is stopped and libvirt does not resume it: {error}"
            ) from error


def _check_covered(descriptor: image_descriptor.Descriptor, page_map: bytes) -> None:
    """:raises ControlError: a page that has content by the descriptor has none any more

    Pages may have come up since: the kernel makes huge pages of memory that is only partly there.
    """
    memory = descriptor.file(image_descriptor.MEMORY_FILE)
    before = pagemap.PageMap.decode(memory.page_map, memory.pages)
    if not pagemap.PageMap.decode(page_map, memory.pages).covers(before):
        raise exception.ControlError(
            f"The frozen memory of image {descriptor.image} is not what its descriptor says"
        )
