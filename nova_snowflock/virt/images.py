# SPDX-License-Identifier: Apache-2.0
"""What a host has of fork images: a run directory each, and what its processes are started with."""

from collections.abc import Callable, Iterator
import contextlib
import fcntl
import os
import tempfile
from typing import Any
import uuid

from nova_snowflock import descriptor as image_descriptor
from nova_snowflock import endpoint
from nova_snowflock import exception
from nova_snowflock.memtap import control
from nova_snowflock.memtap import lockfile
from nova_snowflock.memtap import process
from nova_snowflock.memtap import spec as process_spec
from nova_snowflock.virt import hypervisor

_SPAWNING = "spawning"
_STOPPED = "stopped"


class Images:
    """The images of this host.

    :param conf: the group ``[snowflock]``
    """

    def __init__(self, conf: Any) -> None:
        self._conf = conf
        # As the kernel and QEMU name what is below them.
        self.run_path: str = os.path.realpath(conf.run_path)
        self.store_path: str = os.path.realpath(conf.store_path)
        # oslo.config checks a value when it is read. A bad one shall not wait for the first fork.
        self._groups = conf.multicast_groups

    def directory(self, image: str) -> str:
        """The image's run directory, which need not be there.

        :raises ValueError: the name is no UUID
        """
        if str(uuid.UUID(image)) != image:
            raise ValueError(f"The image {image} is not named by a UUID")
        return os.path.join(self.run_path, image)

    def names(self) -> list[str]:
        """The images that have a directory here."""
        return os.listdir(self.run_path) if os.path.isdir(self.run_path) else []

    def status(self, image: str) -> hypervisor.Status:
        """What the image's processes here say of themselves."""
        directory = self.directory(image)
        server, memtap = process.find_memory_server(directory), process.find_memtap(directory)
        return {
            "server": server.status() if server else None,
            "memtap": memtap.status() if memtap else None,
        }

    def server_spec(
        self, image: str, key: bytes, address: str | None = None, group: str | None = None
    ) -> process_spec.ServerSpec:
        """What its memory server is started with.

        :param address: where it served before, if it did, with its ``group``
        """
        if address is None:
            address = endpoint.format((self._conf.address, 0))
            if self._conf.distribution == "multicast":
                group = self._group(image)
        return process_spec.ServerSpec(
            image=image,
            key=key,
            run_directory=self.directory(image),
            address=address,
            group=group,
            interface=self._conf.interface,
            mtu=self._conf.mtu,
        )

    def _group(self, image: str) -> str:
        # Two images in one group would only hear, and drop, each other's datagrams.
        address = self._groups[uuid.UUID(image).int % self._groups.num_addresses]
        return endpoint.format((str(address), self._conf.multicast_port))

    def memtap_spec(
        self,
        descriptor: image_descriptor.Descriptor,
        key: bytes,
        population: str | None,
        owner: tuple[int, int],
    ) -> process_spec.MemtapSpec:
        """What its memtap is started with.

        :param owner: as of :class:`process_spec.MemtapSpec`
        """
        return process_spec.MemtapSpec(
            image=descriptor.image,
            key=key,
            run_directory=self.directory(descriptor.image),
            store_directory=self.store_path,
            descriptor=descriptor.encode(),
            address=self._conf.address,
            owner=owner,
            interface=self._conf.interface,
            population=population or self._conf.population,
            background_rate=self._conf.background_rate * 1e6,
            read_around=self._conf.read_around << 10,
        )

    @contextlib.contextmanager
    def serving_again(
        self, descriptor: image_descriptor.Descriptor, key: bytes
    ) -> Iterator[control.MemoryServerClient | None]:
        """The memory server of an image whose server has ended, to be told what to serve; None if
        one serves it. It ends if what is inside fails.

        :raises ControlError: it cannot be started
        """
        directory = self.directory(descriptor.image)
        if _is_serving(directory):
            yield None
            return
        process.stop_memory_server(directory)
        server = process.start_memory_server(
            self.server_spec(descriptor.image, key, descriptor.servers[0], descriptor.group)
        )
        try:
            yield server
        except BaseException:
            process.stop_memory_server(directory)
            raise

    @contextlib.contextmanager
    def stopping(self, image: str, guest: str) -> Iterator[None]:
        """Have :meth:`stopped` tell of a guest that is left stopped if what is inside fails.

        :param guest: its UUID
        """
        path = os.path.join(self.directory(image), _STOPPED)
        with open(path, "x", encoding="ascii") as file:
            file.write(guest)
        yield
        os.unlink(path)

    def stopped(self, image: str) -> str | None:
        """The UUID of a guest that may have been left stopped when it was captured."""
        try:
            with open(os.path.join(self.directory(image), _STOPPED), encoding="ascii") as file:
                # It is written before the guest is stopped.
                return file.read() or None
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def save_file(self, image: str, *content: bytes) -> Iterator[str]:
        """The path of a file that libvirt restores a clone from.

        It opens that by its name, so it must have one while it does.
        """
        with tempfile.NamedTemporaryFile(dir=self.directory(image), suffix=".save") as file:
            os.fchmod(file.fileno(), 0o600)
            for part in content:
                file.write(part)
            file.flush()
            yield file.name

    @contextlib.contextmanager
    def spawning(self, image: str, forget: Callable[[str], None]) -> Iterator[None]:
        """Have the image's directory stay meanwhile.

        :param forget: is called if what is inside fails and no other spawn uses the directory or
            is about to use it
        """
        path = os.path.join(self.directory(image), _SPAWNING)
        with lockfile.held(path, fcntl.LOCK_SH) as lock:
            try:
                yield
            except BaseException:
                fcntl.flock(lock, fcntl.LOCK_UN)
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    # Another that failed may have removed it, and a third have made it anew.
                    if lockfile.is_current(lock, path):
                        forget(image)
                raise

    def removing(self, image: str) -> contextlib.AbstractContextManager[int]:
        """Have nothing be spawned from the image meanwhile. Its directory must be there."""
        return lockfile.held(os.path.join(self.directory(image), _SPAWNING), fcntl.LOCK_EX)


def _is_serving(directory: str) -> bool:
    running = process.find_memory_server(directory)
    try:
        return running is not None and running.status()["state"] == "serving"
    except exception.ControlError:  # it may be ending
        return False
