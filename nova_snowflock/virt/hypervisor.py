# SPDX-License-Identifier: Apache-2.0
"""What a hypervisor back end must do, and how one is loaded.

A back end is a stevedore driver in the namespace :data:`NAMESPACE`, a subclass of
:class:`Hypervisor` that is called with ``(connection, conf)``.
"""

import abc
from collections import abc as collections_abc
import dataclasses
from typing import Any, cast

from oslo_config import cfg
from stevedore import driver

from nova_snowflock import descriptor

NAMESPACE = "nova_snowflock.hypervisor"


@dataclasses.dataclass(frozen=True)
class Identity:
    """How a clone differs from its parent.

    ``clone_id`` is 1..n, unique within one fork (0 is the parent).
    """

    name: str
    uuid: str
    clone_id: int


@dataclasses.dataclass(frozen=True)
class Preparation:
    """What :meth:`Hypervisor.prepare` found and started; opaque to everyone but its back end."""

    image: str


@dataclasses.dataclass(frozen=True)
class Capture:
    """A finished capture.

    ``pause`` is how long the guest was stopped, ``stages`` where that time went (in order, they
    add up to ``pause``) and ``after`` what was done after it ran again. All in seconds.
    """

    descriptor: descriptor.Descriptor
    pause: float
    stages: collections_abc.Mapping[str, float]
    after: collections_abc.Mapping[str, float]


class Hypervisor(abc.ABC):
    """One hypervisor on one host. ``domain`` is the back end's own handle of a guest."""

    @abc.abstractmethod
    def probe(self, domain: Any) -> str | None:
        """Return why the guest cannot be forked now, or None. Never disturbs it."""

    @abc.abstractmethod
    def prepare(self, domain: Any, image: str, key: bytes) -> Preparation:
        """Do whatever a fork can have done while the guest still runs.

        Starts the memory server of ``image`` (a UUID) with ``key`` (32 bytes, made for this image
        only). Raises CannotFork with the reason :meth:`probe` gives; after any failure nothing of
        the image is left.
        """

    @abc.abstractmethod
    def capture(self, preparation: Preparation) -> Capture:
        """Stop the guest, freeze its state, let it run again, then publish the image.

        On any failure the guest runs again first, then everything of the image is removed and the
        cause is raised: FreezeFailed, MonitorError and the like, as they came, or CaptureFailed.
        """

    @abc.abstractmethod
    def spawn(
        self,
        descriptor: descriptor.Descriptor,
        key: bytes,
        identity: Identity,
        *,
        paused: bool = False,
        population: str | None = None,
    ) -> Any:
        """Start a clone on this host and return its domain, running unless ``paused``.

        ``population`` is 'lazy', 'background' or 'eager' (None: as configured) and counts for the
        first clone of the image on this host. May be called by several threads and processes at
        once. Raises SpawnFailed, InvalidDescriptor or ControlError, and undoes what it did.
        """

    @abc.abstractmethod
    def release(self, image: str) -> None:
        """Remove everything of the image on this host: frozen memory, processes, mount, files.

        Clones that run on it here lose their memory; the caller destroys them first. Idempotent.
        """


def load(name: str, connection: Any, conf: cfg.ConfigOpts) -> Hypervisor:
    """Return the back end called ``name``, e.g. 'qemu', for ``connection``."""
    manager: driver.DriverManager[Any] = driver.DriverManager(
        NAMESPACE, name, invoke_on_load=True, invoke_args=(connection, conf)
    )
    return cast(Hypervisor, manager.driver)
