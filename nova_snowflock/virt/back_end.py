# SPDX-License-Identifier: Apache-2.0
"""What all back ends do alike that fork guests of libvirt's whose disks QEMU serves.

Theirs is the guest's state, its memory, and what becomes of its interfaces.
"""

import abc
from collections.abc import Callable, Iterator
import contextlib
import dataclasses
import os
import shutil
from typing import Any, Generic, TypeVar

import libvirt
from oslo_config import cfg
from oslo_log import log as logging

from nova_snowflock import descriptor as image_descriptor
from nova_snowflock import exception
from nova_snowflock.memtap import process
from nova_snowflock.memtap import spec as process_spec
from nova_snowflock.virt import connections
from nova_snowflock.virt import domain_lock
from nova_snowflock.virt import hypervisor
from nova_snowflock.virt import images
from nova_snowflock.virt import stages
from nova_snowflock.virt.disks import blocks
from nova_snowflock.virt.disks import fork as disk_fork
from nova_snowflock.virt.disks import layers as disk_layers
from nova_snowflock.virt.disks import merge

LOG = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Preparation(hypervisor.Preparation):
    """:param resources: gives back what only a capture needs"""

    resources: contextlib.ExitStack


_Prepared = TypeVar("_Prepared", bound=Preparation)


class BackEnd(hypervisor.Hypervisor, Generic[_Prepared]):
    """The engine on this host."""

    def __init__(self, to_libvirt: connections.Connections, conf: cfg.ConfigOpts) -> None:
        self._connections = to_libvirt
        self._conf = conf.snowflock
        self._images = images.Images(self._conf)
        self._preparations: dict[str, _Prepared] = {}

    # What a back end has of its own.

    @abc.abstractmethod
    def _blocks(self, domain: libvirt.virDomain) -> blocks.Blocks:
        """What has the guest's disks open."""

    @abc.abstractmethod
    def _owner(self) -> tuple[int, int]:
        """User and group of what opens a clone's files."""

    @abc.abstractmethod
    def _resume_stopped(self, image: str) -> None:
        """Let the guest run that was stopped by someone who was killed before it could."""

    @abc.abstractmethod
    def _has_memory(self, directory: str) -> bool:
        """Whether the memory of an image that was captured here is in its directory."""

    @abc.abstractmethod
    def _forget_memory(self, directory: str) -> None:
        """Give it back."""

    @abc.abstractmethod
    def _uses_memory(self, domain: libvirt.virDomain, directory: str) -> bool:
        """Whether the domain needs the memory of the image that memtap presents there."""

    def _mapped(self, directory: str) -> Iterator[str]:
        """Files of other images that the memory captured there is based on."""
        yield from ()

    # Captures

    @contextlib.contextmanager
    def _removed_on_failure(self, image: str) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._remove(image)
            raise

    @contextlib.contextmanager
    def _collapsed_on_failure(
        self, domain: libvirt.virDomain, fork: disk_fork.Fork[Any]
    ) -> Iterator[None]:
        """What is inside removes the image."""
        try:
            yield
        except BaseException:
            if fork.switched:
                try:
                    self.collapse(domain)
                except exception.DiskError as error:
                    LOG.warning("The guest %s keeps a layer too many: %s", domain.name(), error)
            raise

    @contextlib.contextmanager
    def _opened_layers(
        self, descriptor: image_descriptor.Descriptor
    ) -> Iterator[tuple[list[dict[str, Any]], list[int]]]:
        """The disks of an image that was captured here, as :meth:`layers.Layers.opened`."""
        layers = disk_layers.find(self._images.store_path, descriptor.image)
        if layers is None:
            if descriptor.disks:
                raise exception.DiskError(
                    f"The disks of image {descriptor.image} are not on this host any more"
                )
            yield [], []
            return
        with layers.opened() as opened:
            yield opened

    def release(self, image: str) -> None:
        preparation = self._preparations.pop(image, None)
        if preparation is not None:
            preparation.resources.close()
        self._remove(image)

    def _remove(self, image: str) -> None:
        directory = self._images.directory(image)
        if os.path.isdir(directory):
            with self._images.removing(image):
                self._resume_stopped(image)
                process.stop_memory_server(directory)
                self._forget_memory(directory)
                self._forget_unused(image)
        self._remove_layers(image)

    def _remove_layers(self, image: str) -> None:
        layers = disk_layers.find(self._images.store_path, image)
        if layers is None:
            return
        if not layers.captured:
            with self._locked(layers.domain):
                domain = self._find_domain(layers.domain)
                disk_fork.undo(layers, None if domain is None else self._blocks(domain))
        layers.remove(self._images.store_path)

    def _find_domain(self, identity: str) -> libvirt.virDomain | None:
        try:
            return self._connections.get().lookupByUUIDString(identity)
        except libvirt.libvirtError as error:
            if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
                return None
            raise

    # Spawns

    def present(
        self,
        descriptor: image_descriptor.Descriptor,
        key: bytes,
        *,
        population: str | None = None,
        group: int | None = None,
    ) -> None:
        with self._presented(descriptor, key, population, group):
            pass

    @contextlib.contextmanager
    def _presented(
        self,
        descriptor: image_descriptor.Descriptor,
        key: bytes,
        population: str | None,
        group: int | None,
    ) -> Iterator[None]:
        """Have memtap present the image. If what is inside fails, what nobody uses is removed."""
        user, own_group = self._owner()
        owner = (user, own_group if group is None else group)
        spec = self._images.memtap_spec(descriptor, key, population, owner)
        with (
            self._images.spawning(descriptor.image, self._forget_unused),
            process.memtap_starting(spec),
        ):
            yield

    def _give_up(self, image: str, domain: str) -> bool:
        """Have a clone fail that waits for pages: by its end or, if it is not there yet, by that of
        memtap, unless other clones may get their pages of it.

        :returns: whether anything was ended
        """
        started = self._find_domain(domain)
        if started is not None and started.isActive():
            started.destroy()
            return True
        if self._has_running_clones(image):
            return False
        # Not by stop_memtap(): who waits may hold its lock.
        memtap = process.find_memtap(self._images.directory(image))
        if memtap is None:
            return False
        memtap.stop()
        return True

    def _has_running_clones(self, image: str) -> bool:
        # Whoever looked into the image's files might wait, too: this only looks at their names.
        directory = self._images.directory(image)
        running = self._connections.get().listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
        return any(self._depends(domain, directory) for domain in running)

    def leave(self, image: str) -> bool:
        directory = self._images.directory(image)
        if os.path.isdir(directory):
            with self._images.removing(image):
                # What it says is not to go with the directory.
                self._resume_stopped(image)
                self._forget_unused(image)
        return not os.path.isdir(directory)

    def _forget_unused(self, image: str) -> None:
        """Remove what spawns made of an image unless it is used; what captures made stays."""
        directory = self._images.directory(image)
        if self.clones(image) or self._served_from(directory):
            return
        process.stop_memtap(directory)
        if not process.find_memory_server(directory) and not self._has_memory(directory):
            shutil.rmtree(directory)

    def _served_from(self, directory: str) -> bool:
        """Whether an image of a clone reads files of the image in ``directory``."""
        mount = process_spec.mount_path(directory)
        paths = [file.path for file in disk_layers.all_files(self._images.store_path)]
        for image in self.images():
            paths.extend(self._mapped(self._images.directory(image)))
        return any(path.startswith(f"{mount}/") for path in paths)

    def clones(self, image: str) -> list[str]:
        directory = self._images.directory(image)
        clones = []
        for domain in self._connections.get().listAllDomains():
            try:
                if self._depends(domain, directory):
                    clones.append(domain.UUIDString())
            except libvirt.libvirtError as error:
                if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # it has ended since
                    raise
        return clones

    def _depends(self, domain: libvirt.virDomain, directory: str) -> bool:
        """Whether a domain's memory or disks are in the image that memtap presents there."""
        mount = process_spec.mount_path(directory)
        return self._uses_memory(domain, directory) or merge.depends(domain, mount)

    # Layers

    def collapse(self, domain: libvirt.virDomain, *, running: bool | None = None) -> bool:
        with stages.raised_as(exception.DiskError), self._locked(domain.UUIDString()) as lock:
            return merge.collapse(self._blocks(domain), lock, self._is_served, running)

    def localize(self, domain: libvirt.virDomain, *, running: bool | None = None) -> bool:
        run_path = self._images.run_path
        with stages.raised_as(exception.DiskError), self._locked(domain.UUIDString()) as lock:
            return merge.localize(self._blocks(domain), lock, run_path, running)

    def _locked(
        self, domain: str, interrupt: Callable[[], None] | None = None
    ) -> contextlib.AbstractContextManager[domain_lock.DomainLock]:
        return domain_lock.held(self._images.store_path, domain, interrupt)

    def _is_served(self, path: str) -> bool:
        """Whether an image on this host needs the file to stay as it is."""
        return any(
            file.own and os.path.exists(file.path) and os.path.samefile(file.path, path)
            for file in disk_layers.all_files(self._images.store_path)
        )

    def status(self, image: str) -> hypervisor.Status:
        return self._images.status(image)

    def images(self) -> list[str]:
        layered = disk_layers.images(self._images.store_path)
        return sorted({*layered, *self._images.names()})
