# SPDX-License-Identifier: Apache-2.0
"""nova-snowflock on an emulated host, as a compute service on it would use it.

Everything goes through the product's own interface, in the process that is the host's agent. Guests
are named by their domains' names.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import functools
import pathlib
import re
import secrets
from typing import Any, TypeAlias
import uuid

import libvirt
from oslo_config import cfg

from nova_snowflock import conf as snowflock_conf
from nova_snowflock import descriptor
from nova_snowflock.memtap import process
from nova_snowflock.virt import connections
from nova_snowflock.virt import hypervisor
from tests import emulation

# Options of the group [snowflock], in a form that can be a key.
Options: TypeAlias = tuple[tuple[str, object], ...]

RUN_PATH = "/run/nova-snowflock"
STORE_PATH = "/var/lib/nova-snowflock"


@dataclasses.dataclass(frozen=True)
class Image:
    """A fork image: what its parent's host gives to the hosts of the clones.

    `pause`, `stages` and `after` are those of :class:`hypervisor.Capture`, in seconds.
    """

    uuid: str
    key: bytes = dataclasses.field(repr=False)
    descriptor: bytes = dataclasses.field(repr=False)
    pause: float
    stages: Mapping[str, float]
    after: Mapping[str, float]


class Engine:
    """The engine on one host; `options` are those of the group ``[snowflock]``."""

    def __init__(self, host: emulation.Host, **options: object) -> None:
        self.host = host
        self.options = tuple(sorted({"address": host.address, **options}.items()))
        host.run(_start, self.options)

    def probe(self, name: str) -> str | None:
        """Why the guest cannot be forked, or None."""
        return self.host.run(_probe, self.options, name)

    def fork(self, name: str, image: str | None = None, shared: str = "/nowhere/") -> Image:
        """Freeze the guest as an image that this host serves from now on.

        Every host has the files below the directory `shared`.
        """
        key = secrets.token_bytes(32)
        return self.host.run(_fork, self.options, name, image or str(uuid.uuid4()), key, shared)

    def spawn(
        self,
        image: Image,
        name: str,
        clone_id: int = 1,
        disks: Mapping[str, str] | None = None,
        domain: str | None = None,
        bases: Sequence[str] = (),
        interfaces: hypervisor.Interfaces = hypervisor.Interfaces.KEEP,
        **options: Any,
    ) -> None:
        """Start a clone on this host; returns when libvirt says that it runs (or is paused)."""
        identity = hypervisor.Identity(
            name, str(uuid.uuid4()), clone_id, domain, disks or {}, tuple(bases), interfaces
        )
        self.host.run(_spawn, self.options, image.descriptor, image.key, identity, options)

    def release(self, image: str) -> None:
        """Remove what this host has of the image."""
        self.host.run(_release, self.options, image)

    def collapse(self, name: str) -> bool:
        """Merge the layers of the guest's disks."""
        return self.host.run(_collapse, self.options, name)

    def localize(self, name: str) -> bool:
        """Copy what the clone's disks need of its image."""
        return self.host.run(_localize, self.options, name)

    def end_stopped(self) -> None:
        """End guests that have stopped by themselves."""
        self.host.run(_end_stopped, self.options)

    def connect(self, name: str) -> None:
        """Have the clone's network interfaces have a link."""
        self.host.run(_connect, self.options, name)

    def resume_serving(self, image: Image) -> None:
        """Serve the image again, from the frozen process that this host still has."""
        self.host.run(_resume_serving, self.options, image.descriptor, image.key)

    def memtap(self, image: str) -> dict[str, Any]:
        """The status of the image's memtap on this host."""
        return self.host.run(_memtap_status, image)

    def memory_server(self, image: str) -> dict[str, Any]:
        """The status of the image's memory server on this host."""
        return self.host.run(_server_status, image)

    def private_memory(self, name: str) -> tuple[int, int]:
        """What a clone has to itself, in KiB: of the guest's memory, and the rest of its QEMU's."""
        return self.host.run(_private_memory, name)

    def footprint(self) -> set[str]:
        """What there is on the host of any image: processes, mounts, files, sockets."""
        return self.host.run(_footprint)


# What follows runs on the host.


@functools.cache
def back_end(options: Options) -> hypervisor.Hypervisor:
    """The product's back end for this host's libvirt."""
    conf = configuration(options)
    return hypervisor.load(connections.Connections(conf.snowflock.connection_uri), conf)


def configuration(options: Options) -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    conf([], default_config_files=[], default_config_dirs=[])
    snowflock_conf.register_opts(conf)
    for name, value in options:
        conf.set_override(name, value, "snowflock")
    return conf


def _start(options: Options) -> None:
    """What a compute service does once: the back end asks libvirt about this host's QEMU."""
    back_end(options)


def find_domain(name: str, options: Options = ()) -> libvirt.virDomain:
    return libvirt.open(configuration(options).snowflock.connection_uri).lookupByName(name)


def _probe(options: Options, name: str) -> str | None:
    return back_end(options).probe(find_domain(name, options))


def _fork(options: Options, name: str, image: str, key: bytes, shared: str) -> Image:
    engine = back_end(options)
    preparation = engine.prepare(
        find_domain(name, options), image, key, shared=lambda path: path.startswith(shared)
    )
    capture = engine.capture(preparation)
    return Image(
        image, key, capture.descriptor.encode(), capture.pause, capture.stages, capture.after
    )


def _spawn(
    options: Options,
    encoded: bytes,
    key: bytes,
    identity: hypervisor.Identity,
    keywords: dict[str, Any],
) -> None:
    back_end(options).spawn(descriptor.Descriptor.decode(encoded), key, identity, **keywords)


def _release(options: Options, image: str) -> None:
    back_end(options).release(image)


def _collapse(options: Options, name: str) -> bool:
    return back_end(options).collapse(find_domain(name, options))


def _localize(options: Options, name: str) -> bool:
    return back_end(options).localize(find_domain(name, options))


def _end_stopped(options: Options) -> None:
    back_end(options).end_stopped()


def _connect(options: Options, name: str) -> None:
    back_end(options).connect_interfaces(find_domain(name, options))


def _resume_serving(options: Options, encoded: bytes, key: bytes) -> None:
    back_end(options).resume_serving(descriptor.Descriptor.decode(encoded), key)


def _memtap_status(image: str) -> dict[str, Any]:
    client = process.find_memtap(f"{RUN_PATH}/{image}")
    if client is None:
        raise LookupError(f"no memtap of image {image} runs here")
    return client.status()


def _server_status(image: str) -> dict[str, Any]:
    client = process.find_memory_server(f"{RUN_PATH}/{image}")
    if client is None:
        raise LookupError(f"no memory server of image {image} runs here")
    return client.status()


def qemu_pid(name: str) -> int:
    with open(f"/run/libvirt/qemu/{name}.pid", encoding="ascii") as file:
        return int(file.read())


def _private_memory(name: str) -> tuple[int, int]:
    guest = rest = 0
    path = ""
    with open(f"/proc/{qemu_pid(name)}/smaps", encoding="utf-8", errors="replace") as file:
        for line in file:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                path = line.split(maxsplit=5)[-1].strip()
            elif line.startswith("Anonymous:"):
                kib = int(line.split()[1])
                if path.startswith(RUN_PATH):
                    guest += kib
                else:
                    rest += kib
    return guest, rest


def _footprint() -> set[str]:
    return {*_processes(), *_mounts(), *_files(), *_sockets()}


def _processes() -> Iterator[str]:
    guests = {path.read_text().strip() for path in pathlib.Path("/run/libvirt/qemu").glob("*.pid")}
    for directory in pathlib.Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if "nova_snowflock.memtap" in command:
                yield f"process {directory.name} {command}"
            elif command.startswith("/usr/bin/qemu-system") and directory.name not in guests:
                yield f"frozen process {directory.name}"


def _mounts() -> Iterator[str]:
    for line in pathlib.Path("/proc/self/mounts").read_text().splitlines():
        if RUN_PATH in line:
            yield f"mount {line}"


def _files() -> Iterator[str]:
    for directory in (RUN_PATH, STORE_PATH):
        for path in pathlib.Path(directory).rglob("*"):
            yield f"file {path}"


def _sockets() -> Iterator[str]:
    for line in pathlib.Path("/proc/net/unix").read_text().splitlines():
        if RUN_PATH in line:
            yield f"socket {line.split()[-1]}"
    for line in pathlib.Path("/proc/net/udp").read_text().splitlines()[1:]:
        yield f"UDP socket {line.split()[1]}"
