# SPDX-License-Identifier: Apache-2.0
"""What a hypervisor back end must do, and how one is loaded.

A back end is a stevedore driver in the namespace :data:`NAMESPACE`, a subclass of
:class:`Hypervisor` that is called with ``(connections, conf)``.
"""

import abc
from collections.abc import Callable, Collection, Mapping
import dataclasses
import enum
import socket
from typing import Any, TypedDict, cast

from oslo_config import cfg
from stevedore import driver

from nova_snowflock import descriptor as image_descriptor
from nova_snowflock.virt import connections

NAMESPACE = "nova_snowflock.hypervisor"


class Interfaces(enum.StrEnum):
    """What becomes of the network interfaces that a clone's guest has of its parent."""

    KEEP = "keep"
    """They lead where those of the clone's own domain do."""
    HOLD = "hold"
    """Likewise, but without a link until :meth:`Hypervisor.connect_interfaces`."""
    REPLACE = "replace"
    """They are plugged out, and those of the clone's own domain in."""


@dataclasses.dataclass(frozen=True)
class Identity:
    """How a clone differs from its parent.

    :param name: its domain's
    :param uuid: its domain's
    :param clone_id: 1..n, unique within one fork; 0 is the parent
    :param domain: the clone's own domain as its cloud describes it. What belongs to the clone and
        its host, not to the machine that its guest believes in, is taken from it
    :param disks: where the clone's own part of each of the image's disks shall be, by target device
    :param bases: files of this host that the image's disks may be based on: those that every host
        has. The descriptor's word is not enough for what a clone may read
    :param interfaces: what becomes of its network interfaces
    """

    name: str
    uuid: str
    clone_id: int
    domain: str | None = None
    disks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    bases: Collection[str] = ()
    interfaces: Interfaces = Interfaces.KEEP


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What :meth:`Hypervisor.prepare` found and started; opaque to everyone but its back end.

    :param image: UUID of the image to be
    """

    image: str


@dataclasses.dataclass(frozen=True)
class Capture:
    """A finished capture.

    :param method: how the memory was frozen; a back end's docs say which it has
    :param pause: seconds that the guest was stopped
    :param stages: where that time went, in order; they add up to ``pause``
    :param after: seconds of what was done after it ran again
    """

    descriptor: image_descriptor.Descriptor
    method: str
    pause: float
    stages: Mapping[str, float]
    after: Mapping[str, float]


class Status(TypedDict):
    """What a host has of an image.

    :param server: what the image's memory server says of itself (docs/control.rst), if it runs here
    :param memtap: what its memtap says, if one runs here
    """

    server: dict[str, Any] | None
    memtap: dict[str, Any] | None


class Hypervisor(abc.ABC):
    """One hypervisor on one host.

    ``domain`` is the back end's own handle of a guest, ``image`` the UUID of a fork image and
    ``key`` 32 bytes, made for this image only.
    """

    @abc.abstractmethod
    def probe(self, domain: Any) -> str | None:
        """Why the guest cannot be forked now, or None. Never disturbs it."""

    @abc.abstractmethod
    def prepare(
        self,
        domain: Any,
        image: str,
        key: bytes,
        *,
        shared: Callable[[str], bool] = lambda _: False,
    ) -> Preparation:
        """Do whatever a fork can have done while the guest still runs.

        Starts the image's memory server. What it takes is given back by :meth:`capture`, or by
        :meth:`release` if there is none. Until then nothing else may change the guest's disks:
        a :meth:`collapse` under way is given up, and a new one waits.

        :param shared: whether every host has the file that is under this absolute path here, which
            a disk is based on; such a file is not part of the image
        :raises CannotFork: the reason, as from :meth:`probe`; nothing of the image is left
        """

    @abc.abstractmethod
    def capture(self, preparation: Preparation) -> Capture:
        """Stop the guest, freeze its state, let it run again, then publish the image. Once.

        After any failure the guest runs and nothing of the image is left.

        :raises CannotFork: the guest has changed since it was prepared, and was not stopped
        :raises CaptureFailed: something failed later; ``__cause__`` is that
        """

    @abc.abstractmethod
    def resume_serving(self, descriptor: image_descriptor.Descriptor, key: bytes) -> None:
        """Serve an image again whose memory server has ended, from the frozen memory.

        Clones that wait for its pages go on. Does nothing if it is being served.

        :param descriptor: from the image's :class:`Capture`, on this host
        :raises ControlError: the frozen memory is gone, too, and the image with it, or the server
            cannot be started
        """

    @abc.abstractmethod
    def spawn(
        self,
        descriptor: image_descriptor.Descriptor,
        key: bytes,
        identity: Identity,
        *,
        paused: bool = False,
        population: str | None = None,
        group: int | None = None,
    ) -> Any:
        """Start a clone on this host. After any failure, what that did is undone.

        May be called by several threads and processes at once.

        :param paused: leave it to the caller to have it run
        :param population: 'lazy', 'background' or 'eager', for the first clone of the image on this
            host; None is as configured
        :param group: ID of the group that may read what the disks are based on; None is QEMU's
        :returns: the clone's domain
        :raises InvalidDescriptor: the descriptor is not one of this hypervisor's
        :raises SpawnFailed: this host cannot run the clone, or libvirt could not start it
        :raises ControlError: the image cannot be presented on this host
        """

    @abc.abstractmethod
    def present(
        self,
        descriptor: image_descriptor.Descriptor,
        key: bytes,
        *,
        population: str | None = None,
        group: int | None = None,
    ) -> None:
        """Have the image's files on this host, for clones that were started from it before.

        Does nothing if they are there. Arguments are as of :meth:`spawn`.

        :raises ControlError: the image cannot be presented on this host
        """

    @abc.abstractmethod
    def release(self, image: str) -> None:
        """Remove everything of the image on this host: frozen memory, processes, mount, files.

        What clones here have of it stays, as on other hosts, for :meth:`leave` to remove; they
        wait for ever for what they have not got. Idempotent, and also to be called for images of
        which a reboot of the host has left only files.
        """

    @abc.abstractmethod
    def collapse(self, domain: Any, *, running: bool | None = None) -> bool:
        """Merge the layers of the guest's disks that no image on this host serves any more.

        To be called after :meth:`release`, and once for each guest when the agent starts. The guest
        may run or be shut off; it must not be started meanwhile. May take long; idempotent, also
        after it was killed.

        :param running: whether the caller has made sure that the guest is not started meanwhile
            (False) or has not (True); None if it does not matter
        :returns: whether nothing is left to do; False if a fork came in between, or the guest does
            not run, or does, unlike the caller thinks
        :raises DiskError: something failed; the guest and its data are as before
        """

    @abc.abstractmethod
    def localize(self, domain: Any, *, running: bool | None = None) -> bool:
        """Copy what the disks of a clone need of its image into its own files.

        From then on they depend on nothing but files that every host has. May take long; the guest
        may run or be shut off; it must not be started meanwhile. Its image must be present.

        :param running: as of :meth:`collapse`
        :returns: whether all of it is done; False as of :meth:`collapse`
        :raises DiskError: something failed; the guest and its data are as before
        """

    @abc.abstractmethod
    def connect_interfaces(self, domain: Any) -> None:
        """Have all network interfaces of a clone have a link. Idempotent."""

    @abc.abstractmethod
    def guests_with_agents(self) -> list[str]:
        """UUIDs of the domains here whose guest has the port of its agent open."""

    @abc.abstractmethod
    def channel(self, domain: Any) -> socket.socket:
        """A connection to the port of the agent in a guest.

        :raises OSError: it has no such port, or does not run
        """

    @abc.abstractmethod
    def leave(self, image: str) -> bool:
        """Remove what this host has of the image for its clones, if none of them runs here.

        :returns: whether nothing of the image is left here
        """

    @abc.abstractmethod
    def end_stopped(self) -> None:
        """End guests that have stopped by themselves, or start them anew, as their domains say,
        where nobody else notices it; and end clones that cannot go on. To be called from time to
        time.
        """

    @abc.abstractmethod
    def status(self, image: str) -> Status:
        """What this host has of the image."""

    @abc.abstractmethod
    def clones(self, image: str) -> list[str]:
        """UUIDs of the domains here whose memory or disks depend on it; looks at all there are."""

    @abc.abstractmethod
    def images(self) -> list[str]:
        """The images of which this host has anything, in whatever state."""


def load(to_libvirt: connections.Connections, conf: cfg.ConfigOpts) -> Hypervisor:
    """The back end that the configuration names."""
    manager: driver.DriverManager[Any] = driver.DriverManager(
        NAMESPACE,
        conf.snowflock.hypervisor,
        invoke_on_load=True,
        invoke_args=(to_libvirt, conf),
    )
    return cast(Hypervisor, manager.driver)
