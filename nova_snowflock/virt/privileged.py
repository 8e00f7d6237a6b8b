# SPDX-License-Identifier: Apache-2.0
"""What needs root on a compute host: the hypervisor back end, behind oslo.privsep.

nova-compute is an ordinary user. Everything here takes and returns plain data, and runs in a daemon
that has the capabilities below and connections of its own to the hypervisor. Errors are those of
the back end (:mod:`nova_snowflock.virt.hypervisor`).
"""

import functools
import os
import socket
from typing import Any

import libvirt
from oslo_config import cfg
from oslo_privsep import capabilities
from oslo_privsep import priv_context

from nova_snowflock import conf
from nova_snowflock import descriptor as image_descriptor
from nova_snowflock import exception
from nova_snowflock.virt import connections
from nova_snowflock.virt import hypervisor

conf.register_opts(cfg.CONF)

context = priv_context.PrivContext(
    "nova_snowflock",
    cfg_section="snowflock_privileged",
    pypath=f"{__name__}.context",
    capabilities=[
        capabilities.CAP_CHOWN,
        capabilities.CAP_DAC_OVERRIDE,
        capabilities.CAP_DAC_READ_SEARCH,
        capabilities.CAP_FOWNER,
        capabilities.CAP_KILL,
        capabilities.CAP_NET_ADMIN,  # receive buffers beyond the system's limit
        capabilities.CAP_SETGID,  # processes become nobody
        capabilities.CAP_SETUID,
        capabilities.CAP_SYS_ADMIN,  # mount; ptrace past seccomp
        capabilities.CAP_SYS_PTRACE,
    ],
)
# Some calls only wait, for pages or for a disk; they shall not keep the others waiting.
cfg.CONF.set_default("thread_pool_size", 32, group="snowflock_privileged")


_DISK_MODE = 0o644
"""Of the disks that Nova makes. It reads them, and libvirt gives them to QEMU."""


@functools.cache
def _connections() -> connections.Connections:
    return connections.Connections(cfg.CONF.snowflock.connection_uri)


@functools.cache
def _back_end() -> hypervisor.Hypervisor:
    return hypervisor.load(_connections(), cfg.CONF)


@context.entrypoint
def capture(domain: str, image: str, key: bytes, shared: list[str]) -> dict[str, Any]:
    """Fork a guest.

    :param domain: its UUID
    :param shared: paths of base images of its disks that every host has
    :returns: ``descriptor`` (encoded), ``size`` (bytes of memory), ``created``, ``method``;
        ``pause``, ``stages`` and ``after`` (seconds)
    """
    try:
        back_end = _back_end()
        found = _connections().get().lookupByUUIDString(domain)
        size = found.maxMemory() << 10
    except libvirt.libvirtError as error:
        raise exception.CannotFork(f"libvirt does not find it: {error}") from error
    preparation = back_end.prepare(found, image, key, shared=frozenset(shared).__contains__)
    captured = back_end.capture(preparation)
    return {
        "descriptor": captured.descriptor.encode(),
        "size": size,
        "created": captured.descriptor.created,
        "method": captured.method,
        "pause": captured.pause,
        "stages": dict(captured.stages),
        "after": dict(captured.after),
    }


@context.entrypoint
def spawn(
    descriptor: bytes,
    key: bytes,
    identity: dict[str, Any],
    paused: bool,
    population: str | None,
    group: int,
) -> None:
    """Start a clone.

    :param identity: the fields of :class:`hypervisor.Identity`
    :param group: ID of Nova's, which reads the disks of servers
    """
    _back_end().spawn(
        image_descriptor.Descriptor.decode(descriptor),
        key,
        hypervisor.Identity(**identity),
        paused=paused,
        population=population,
        group=group,
    )
    for path in identity["disks"].values():
        os.chmod(path, _DISK_MODE)


@context.entrypoint
def present(descriptor: bytes, key: bytes, population: str | None, group: int) -> None:
    """Have an image's files on this host, for clones that were started from it before."""
    _back_end().present(
        image_descriptor.Descriptor.decode(descriptor), key, population=population, group=group
    )


@context.entrypoint
def connect_interfaces(domain: str) -> None:
    """Have the network interfaces of a clone, by its UUID, have a link."""
    _back_end().connect_interfaces(_connections().get().lookupByUUIDString(domain))


@context.entrypoint
def guests_with_agents() -> list[str]:
    """UUIDs of the domains here whose guest has the port of its agent open."""
    return _back_end().guests_with_agents()


@context.entrypoint
def send_channel(domain: str, address: str) -> None:
    """Give who listens at a UNIX datagram socket a connection to the port of a guest's agent.

    :param domain: its UUID
    :raises OSError: it has no such port, or has ended
    """
    try:
        found = _connections().get().lookupByUUIDString(domain)
        connection = _back_end().channel(found)
    except libvirt.libvirtError as error:
        raise FileNotFoundError(f"libvirt does not find it: {error}") from error
    with connection, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as courier:
        courier.connect(address)
        socket.send_fds(courier, [domain.encode()], [connection.fileno()])


@context.entrypoint
def end_stopped() -> None:
    """End guests that have stopped by themselves, or start them anew, if nobody has noticed."""
    _back_end().end_stopped()


@context.entrypoint
def status(image: str) -> hypervisor.Status:
    """What this host has of an image."""
    return _back_end().status(image)


@context.entrypoint
def clones(image: str) -> list[str]:
    """UUIDs of the domains here whose memory or disks depend on an image."""
    return _back_end().clones(image)


@context.entrypoint
def images() -> list[str]:
    """Images of which this host has anything."""
    return _back_end().images()


@context.entrypoint
def resume_serving(descriptor: bytes, key: bytes) -> None:
    """Serve an image again whose memory server has ended."""
    _back_end().resume_serving(image_descriptor.Descriptor.decode(descriptor), key)


@context.entrypoint
def release(image: str) -> None:
    """Remove everything of an image on this host."""
    _back_end().release(image)


@context.entrypoint
def leave(image: str) -> bool:
    """Remove what this host has of an image for its clones, if none of them runs on it any more.

    :returns: whether nothing of the image is left here
    """
    return _back_end().leave(image)


@context.entrypoint
def collapse(domain: str, running: bool) -> bool:
    """Have a parent's disks be as short a chain of layers as the images left allow.

    :param running: what the caller takes it for
    :returns: whether they are; if not, a fork came first, or it was started or stopped
    """
    try:
        found = _connections().get().lookupByUUIDString(domain)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return True
        raise
    return _back_end().collapse(found, running=running)


@context.entrypoint
def localize(domain: str, running: bool) -> bool:
    """Have a clone's disks depend on no image any more.

    :param running: what the caller takes it for
    :returns: whether they do not; if they do, a fork came first, or it was started or stopped
    """
    return _back_end().localize(_connections().get().lookupByUUIDString(domain), running=running)
