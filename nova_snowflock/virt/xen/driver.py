# SPDX-License-Identifier: Apache-2.0
"""The Xen back end: forks guests of libvirt's libxl driver, with the help of their own kernels.

docs/xen.rst tells how, and what the files in an image's run directory are.
"""

from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import datetime
import os
import socket
from typing import Any

import libvirt
from lxml import etree
from oslo_config import cfg
from oslo_log import log as logging

from nova_snowflock import descriptor as image_descriptor
from nova_snowflock import exception
from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import control
from nova_snowflock.memtap import process
from nova_snowflock.memtap import spec as process_spec
from nova_snowflock.virt import back_end
from nova_snowflock.virt import connections
from nova_snowflock.virt import deadline
from nova_snowflock.virt import hypervisor
from nova_snowflock.virt import stages
from nova_snowflock.virt.disks import clone as disk_clone
from nova_snowflock.virt.disks import disk_xml
from nova_snowflock.virt.disks import files
from nova_snowflock.virt.disks import merge
from nova_snowflock.virt.xen import device_model
from nova_snowflock.virt.xen import disks
from nova_snowflock.virt.xen import domain_xml
from nova_snowflock.virt.xen import ends
from nova_snowflock.virt.xen import helper
from nova_snowflock.virt.xen import interfaces
from nova_snowflock.virt.xen import nodes
from nova_snowflock.virt.xen import qmp
from nova_snowflock.virt.xen import state as xen_state
from nova_snowflock.virt.xen import stream

LOG = logging.getLogger(__name__)

HYPERVISOR = "xen"
"""The back end's name in descriptors."""
METHOD = "log-dirty"
"""How memory is frozen: copied while the guest runs, and what it has written since in the stop."""

_CPU = "<cpu/>"
"""What a clone's processors are is in its state: the CPUID and MSR policies."""
_MEMORY = "memory"
_DEVICES = "devices"
_PAGER = "pager-"


@dataclasses.dataclass(frozen=True)
class _Preparation(back_end.Preparation):
    domain: libvirt.virDomain
    root: etree._Element
    server: control.MemoryServerClient
    freezer: helper.Freezer
    disks: disks.DiskFork
    device_model: device_model.DeviceModel | None


class XenHypervisor(back_end.BackEnd[_Preparation]):
    """Forks guests of libvirt's (``xen:///system``), on this host."""

    def __init__(self, to_libvirt: connections.Connections, conf: cfg.ConfigOpts) -> None:
        super().__init__(to_libvirt, conf)
        number = to_libvirt.get().getVersion()
        self._version = number // 1000000, number // 1000 % 1000
        # Until it has refused.
        self._pages = True
        self._stopped: dict[int, str] = {}

    def probe(self, domain: libvirt.virDomain) -> str | None:
        try:
            with stages.raised_as(exception.CannotFork):
                self._examine(domain)
        except exception.CannotFork as refusal:
            return str(refusal)
        return None

    def _examine(self, domain: libvirt.virDomain) -> etree._Element:
        """The XML of a guest that can be forked.

        :raises CannotFork: it cannot be
        """
        state, _ = domain.state()
        # libxl's driver takes a guest that waits for something for one that is blocked.
        if state not in (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED):
            raise exception.CannotFork("it does not run")
        root = domain_xml.parse(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE))
        reason = domain_xml.refusal(root)
        if reason is not None:
            raise exception.CannotFork(reason)
        for disk in files.writable(root):
            disk.chain()
        if domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE:
            raise exception.CannotFork("libvirt saves or migrates it")
        model = _device_model(domain)
        if model is not None:
            model.examine()
        return root

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
            root = self._examine(domain)
            blocks = self._blocks(domain)
            # Nothing else has Xen log what the guest writes, or suspends it, either.
            lock = resources.enter_context(
                self._locked(domain.UUIDString(), lambda: merge.interrupt(blocks))
            )
            if files.writable(root):
                merge.recover(blocks, lock)
                root = self._examine(domain)
            fork = disks.DiskFork(
                blocks, files.writable(root), image, shared, self._images.run_path
            )
            model = _device_model(domain)
            if model is not None:
                resources.enter_context(model.logged())
            server = process.start_memory_server(spec)
            memory = self._memory_file(image, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            resources.callback(os.close, memory)
            if model is not None:
                # QEMU would make it for others to read.
                os.close(self._open(image, _DEVICES, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
            freezer = helper.Freezer(
                self._conf.xen_helper, domain.ID(), memory, self._conf.xen_stop_pages
            )
            resources.callback(freezer.close)
            fork.prepare(self._images.store_path)
            preparation = _Preparation(
                image, resources.pop_all(), domain, root, server, freezer, fork, model
            )
        self._preparations[image] = preparation
        return preparation

    def _memory_file(self, image: str, flags: int) -> int:
        return self._open(image, _MEMORY, flags)

    def _open(self, image: str, name: str, flags: int) -> int:
        path = os.path.join(self._images.directory(image), name)
        return os.open(path, flags | os.O_CLOEXEC, 0o600)

    def capture(self, preparation: hypervisor.Preparation) -> hypervisor.Capture:
        preparation = self._preparations.pop(preparation.image)
        with (
            self._collapsed_on_failure(preparation.domain, preparation.disks),
            self._removed_on_failure(preparation.image),
            preparation.resources,
            stages.raised_as(exception.CaptureFailed),
        ):
            return self._capture(preparation)

    def _capture(self, preparation: _Preparation) -> hypervisor.Capture:
        domain, image, fork = preparation.domain, preparation.image, preparation.disks
        fork.flush()
        with self._images.stopping(image, domain.UUIDString()):
            frozen = self._freeze(preparation)
        after = stages.Stopwatch()
        if fork.layers.disks:
            fork.record(self._images.store_path)
        devices = self._take_devices(preparation)
        found = stream.read_helper(frozen.state)
        memory = self._memory_file(image, os.O_RDONLY)
        try:
            pages = {**found.state.pages, **_special(found, memory)}
            state = dataclasses.replace(found.state, pages=pages, emulator=devices)
            with fork.layers.opened() as (layers, fds):
                published = preparation.server.publish([_file(), *layers], (memory, *fds))
        finally:
            os.close(memory)
        after.lap("publish")
        descriptor = image_descriptor.Descriptor(
            image=image,
            hypervisor=HYPERVISOR,
            hypervisor_version=".".join(map(str, state.xen_version)),
            machine_type=domain_xml.machine(preparation.root),
            cpu=_CPU,
            vcpus=domain_xml.vcpus(preparation.root),
            ram_blocks=_ram_blocks(found.present),
            files=tuple(image_descriptor.File(*file) for file in published.files),
            servers=published.servers,
            group=published.group,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            domain=domain_xml.for_clones(preparation.root),
            device_state=stream.compose(state),
            disks=fork.layers.described(),
        )
        after.lap("compose")
        preparation.server.serve(descriptor.encode())
        after.lap("serve")
        pause = sum(frozen.stages.values())
        LOG.info(
            "Image %s captured: the guest %s was stopped for %.1f ms, in which %d pages that it "
            "had just written were copied",
            image,
            domain.name(),
            pause * 1e3,
            frozen.dirty,
        )
        return hypervisor.Capture(descriptor, METHOD, pause, frozen.stages, after.laps)

    def _freeze(self, preparation: _Preparation) -> helper.Frozen:
        model, switch = preparation.device_model, preparation.disks.switch
        if model is None:
            return preparation.freezer.freeze(switch)

        def meanwhile() -> None:
            model.save(self._devices_path(preparation.image))
            switch()

        return preparation.freezer.freeze(meanwhile, model.stopped())

    def _devices_path(self, image: str) -> str:
        return os.path.join(self._images.directory(image), _DEVICES)

    def _take_devices(self, preparation: _Preparation) -> bytes | None:
        """The state that the device model saved, if there is one."""
        if preparation.device_model is None:
            return None
        path = self._devices_path(preparation.image)
        with open(path, "rb") as file:
            state = file.read()
        os.unlink(path)
        return state

    def _resume_stopped(self, image: str) -> None:
        stopped = self._images.stopped(image)
        domain = None if stopped is None else self._find_domain(stopped)
        if domain is not None and domain.isActive():
            model = _device_model(domain)
            try:
                if model is not None:
                    model.resume()
            finally:
                helper.resume(self._conf.xen_helper, domain.ID())

    def resume_serving(self, descriptor: image_descriptor.Descriptor, key: bytes) -> None:
        image = descriptor.image
        try:
            memory = self._memory_file(image, os.O_RDONLY)
        except FileNotFoundError as error:
            raise exception.ControlError(
                f"The frozen memory of image {image} is not on this host any more"
            ) from error
        try:
            with self._images.serving_again(descriptor, key) as server:
                if server is None:
                    return
                with (
                    stages.raised_as(exception.ControlError),
                    self._opened_layers(descriptor) as (layers, fds),
                ):
                    server.publish([_file(), *layers], (memory, *fds))
                server.serve(descriptor.encode())
        finally:
            os.close(memory)

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
        state = self._check_descriptor(descriptor)
        try:
            xml = domain_xml.clone(
                descriptor.domain, identity.name, identity.uuid, identity.domain, identity.disks
            )
        except exception.InvalidDomain as error:
            raise exception.InvalidDescriptor(f"The descriptor is invalid: {error}") from error
        if population is None and not self._pages:
            population = "eager"  # nothing can run before all is here
        disk_clone.check_disks(descriptor, identity.bases)
        mount = process_spec.mount_path(self._images.directory(image))
        with (
            self._presented(descriptor, key, population, group),
            stages.raised_as(exception.SpawnFailed),
            contextlib.ExitStack() as undo,
        ):
            connection = self._connections.get()
            with deadline.bounded(
                self._conf.spawn_timeout, identity.name, lambda: self._give_up(image, identity.uuid)
            ):
                layers = disk_clone.own_layers(descriptor, identity, mount, self._owner())
                undo.enter_context(layers)
                if state.emulator is not None:
                    state = self._with_devices_pages(descriptor, state)
                with self._images.save_file(image, stream.save_file(state, xml)) as path:
                    connection.restoreFlags(path, None, libvirt.VIR_DOMAIN_SAVE_PAUSED)
                domain = connection.lookupByUUIDString(identity.uuid)
                undo.enter_context(stages.ended_on_failure(domain))
            if identity.interfaces == hypervisor.Interfaces.HOLD:
                interfaces.hold(domain)
            self._populate(descriptor, domain)
            if not paused:
                domain.resume()
                if identity.interfaces == hypervisor.Interfaces.REPLACE:
                    interfaces.replace(domain)
            return domain

    def _check_descriptor(self, descriptor: image_descriptor.Descriptor) -> xen_state.State:
        """The state in a descriptor that is Xen's, of this host's version, and consistent.

        :raises InvalidDescriptor: it is not
        """
        if descriptor.hypervisor != HYPERVISOR:
            raise exception.InvalidDescriptor(
                f"The image is of the hypervisor {descriptor.hypervisor}"
            )
        try:
            state = stream.parse(descriptor.device_state, self._version)
            root = domain_xml.parse(descriptor.domain)
            reason = domain_xml.refusal(root)
        except (exception.InvalidStream, exception.InvalidDomain) as error:
            raise exception.InvalidDescriptor(f"The descriptor is invalid: {error}") from error
        if reason is not None:
            raise exception.InvalidDescriptor(f"The descriptor's guest cannot be a clone: {reason}")
        if (state.emulator is not None) != (domain_xml.machine(root) == domain_xml.HVM):
            raise exception.InvalidDescriptor(
                "The descriptor's guest has a device model's state, or none, unlike its domain"
            )
        forked = filter(disk_xml.is_forked, root.iterfind("devices/disk"))
        targets = sorted(disk_xml.target(disk) for disk in forked)
        if targets != sorted(disk.target for disk in descriptor.disks):
            raise exception.InvalidDescriptor("The descriptor's disks are not those of its domain")
        memory = descriptor.file(image_descriptor.MEMORY_FILE)
        frames = memory.size // PAGE_SIZE
        end = 0
        for present in _frames(descriptor):
            if present.start < end or present.stop > frames:
                raise exception.InvalidDescriptor("The descriptor's RAM blocks make no sense")
            end = present.stop
        if (
            state.emulator is not None
            and sum(map(len, _devices_frames(descriptor))) > xen_state.MAX_PAGES // 2
        ):
            raise exception.InvalidDescriptor("The descriptor's guest has too much video memory")
        return state

    def _with_devices_pages(
        self, descriptor: image_descriptor.Descriptor, state: xen_state.State
    ) -> xen_state.State:
        """With the video memory, which the device model has mapped from when it starts."""
        pages: dict[int, bytes] = {}
        with open(self._memory_path(descriptor), "rb") as memory:
            for frames in _devices_frames(descriptor):
                memory.seek(frames.start * PAGE_SIZE)
                content = memory.read(len(frames) * PAGE_SIZE)
                for number, frame in enumerate(frames):
                    pages[frame] = content[number * PAGE_SIZE : (number + 1) * PAGE_SIZE]
        return dataclasses.replace(state, pages={**pages, **state.pages})

    def _memory_path(self, descriptor: image_descriptor.Descriptor) -> str:
        """Where memtap presents an image's memory."""
        mount = process_spec.mount_path(self._images.directory(descriptor.image))
        return os.path.join(mount, descriptor.file(image_descriptor.MEMORY_FILE).name)

    def _populate(self, descriptor: image_descriptor.Descriptor, domain: libvirt.virDomain) -> None:
        """Have the clone's memory come when it is touched, or be there before it runs."""
        directory = self._images.directory(descriptor.image)
        pages = b"".join(
            present.start.to_bytes(8, "little") + len(present).to_bytes(8, "little")
            for present in _frames(descriptor)
        )
        memory = os.open(self._memory_path(descriptor), os.O_RDONLY | os.O_CLOEXEC)
        try:
            log = _pager_log(directory, domain.UUIDString())
            try:
                helper.page(self._conf.xen_helper, domain.ID(), memory, pages, log)
            except helper.CannotPage as error:
                self._pages = False
                LOG.info("The clone %s gets all its memory first: %s", domain.name(), error)
                # One that is gone is noticed by who reads the file.
                if memtap := process.find_memtap(directory):
                    memtap.detach("eager")
                helper.populate(self._conf.xen_helper, domain.ID(), memory, pages)
        finally:
            os.close(memory)

    def _blocks(self, domain: libvirt.virDomain) -> nodes.Blocks:
        return nodes.Blocks(domain)

    def _owner(self) -> tuple[int, int]:
        # libxl has QEMU be root.
        return os.getuid(), os.getgid()

    def _has_memory(self, directory: str) -> bool:
        return os.path.exists(os.path.join(directory, _MEMORY))

    def _forget_memory(self, directory: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, _MEMORY))

    def _uses_memory(self, domain: libvirt.virDomain, directory: str) -> bool:
        return not helper.has_paged(_pager_log(directory, domain.UUIDString()))

    def end_stopped(self) -> None:
        # libxl tells libvirt of a domain's first stop (tools/libs/light/libxl_domain.c,
        # shutdown_reported), which a fork is. Of others libvirt has heard since the last call.
        stopped = helper.stopped(self._conf.xen_helper)
        for number, reason in stopped.items() & self._stopped.items():
            ends.end(self._connections.get(), number, reason)
        self._stopped = stopped
        for image in self._images.names():
            directory = self._images.directory(image)
            for identity in _paged_clones(directory):
                if helper.has_died(_pager_log(directory, identity)):
                    self._end_clone(identity)

    def _end_clone(self, identity: str) -> None:
        domain = self._find_domain(identity)
        if domain is not None and domain.isActive():
            LOG.error(
                "The process that brings the clone %s its memory has died, so it is ended: "
                "start it anew, or make another one of its fork",
                domain.name(),
            )
            domain.destroy()

    def connect_interfaces(self, domain: libvirt.virDomain) -> None:
        interfaces.connect(domain)

    def guests_with_agents(self) -> list[str]:
        return []

    def channel(self, domain: libvirt.virDomain) -> socket.socket:
        raise FileNotFoundError("Guests of Xen have no port for an agent")


def _pager_log(directory: str, identity: str) -> str:
    """What the process says that brings a clone its memory."""
    return os.path.join(directory, f"{_PAGER}{identity}")


def _paged_clones(directory: str) -> Iterator[str]:
    """UUIDs of the clones that such a process was started for, of an image."""
    with contextlib.suppress(FileNotFoundError):  # it was just removed
        for name in os.listdir(directory):
            if name.startswith(_PAGER):
                yield name.removeprefix(_PAGER)


def _file() -> dict[str, Any]:
    return {"number": image_descriptor.MEMORY_FILE, "name": _MEMORY, "kind": "file"}


def _ram_blocks(present: tuple[range, ...]) -> tuple[image_descriptor.RamBlock, ...]:
    """The frames that a guest has, as RAM blocks: each is named by its first frame."""
    if len(present) > image_descriptor.MAX_RAM_BLOCKS:
        raise exception.CaptureFailed(
            f"Its balloon has left its memory in {len(present)} pieces, more than "
            f"{image_descriptor.MAX_RAM_BLOCKS}"
        )
    return tuple(
        image_descriptor.RamBlock(f"{frames.start:x}", len(frames) * PAGE_SIZE)
        for frames in present
    )


def _frames(descriptor: image_descriptor.Descriptor) -> Iterator[range]:
    """The inverse of :func:`_ram_blocks`.

    :raises InvalidDescriptor: a block has another name
    """
    for block in descriptor.ram_blocks:
        try:
            first = int(block.name, 16)
        except ValueError as error:
            raise exception.InvalidDescriptor(
                f"The RAM block {block.name} is named by no frame"
            ) from error
        yield range(first, first + block.size // PAGE_SIZE)


def _devices_frames(descriptor: image_descriptor.Descriptor) -> Iterator[range]:
    """Those of the guest's frames that are where devices have their memory."""
    where = xen_state.DEVICE_FRAMES
    for present in _frames(descriptor):
        frames = range(max(present.start, where.start), min(present.stop, where.stop))
        if frames:
            yield frames


def _device_model(domain: libvirt.virDomain) -> device_model.DeviceModel | None:
    """What emulates a guest's devices, if it has such."""
    if domain.OSType() != domain_xml.HVM_TYPE:
        return None
    return device_model.DeviceModel(qmp.Monitor(domain.ID()))


def _special(found: stream.Frozen, memory: int) -> dict[int, bytes]:
    """The pages that Xen and its tools need when a clone's state is restored."""
    return {
        frame: os.pread(memory, PAGE_SIZE, frame * PAGE_SIZE)
        for frame in xen_state.special_pfns(found.state.hvm_params)
        if any(frame in frames for frames in found.present)
    }
