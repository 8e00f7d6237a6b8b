# SPDX-License-Identifier: Apache-2.0
"""What compute hosts do for a fork when they are asked: the client side, and the names of it all.

The other side is :mod:`nova_snowflock.virt.manager`, an endpoint of nova-compute's own RPC server.
"""

from collections.abc import Mapping
from typing import Any

from nova import conf as nova_conf
from nova import context as nova_context
from nova import objects
from nova import rpc
from nova.objects import base as objects_base
import oslo_messaging as messaging

from nova_snowflock import exception
from nova_snowflock import family_network

CONF = nova_conf.CONF

NAMESPACE = "snowflock"
VERSION = "1.0"
_TOPIC = "compute"

# In a clone's system_metadata, from the moment it is created.
FORK = "snowflock_fork"
"""The fork's UUID."""
HOST = "snowflock_host"
"""The host that holds its image."""
PARENT = "snowflock_parent"
"""The parent's UUID."""
CLONE_ID = "snowflock_clone_id"
"""1..n, unique in the fork."""
POPULATION = "snowflock_population"
"""How its host gets what no clone has touched; absent if that is as configured there."""
TIMES = "snowflock_times"
"""When it got how far, as JSON: seconds since the epoch by ``spawn`` (its host has begun),
``disks`` (Nova has made what they are based on), ``guest`` (its network is plugged, its domain
defined), ``restored`` (its machine is there, stopped) and ``running`` (its network is up)."""
IDENTITY = "snowflock_identity"
"""How it becomes itself: one of :mod:`nova_snowflock.virt.identity`'s ways."""
LOCAL = "snowflock_local"
"""Present once its disks depend on no image any more."""

# In a parent's system_metadata, for each of its forks.
FORK_PREFIX = "snowflock_fork_"
"""With a fork's UUID, the name of the host that holds its image."""


def trait(hypervisor: str) -> str:
    """What the resource providers of hosts have in placement that take clones of its guests.

    :param hypervisor: a back end's name
    """
    return f"CUSTOM_SNOWFLOCK_{hypervisor.upper()}"


def why_disks_bound(system_metadata: Mapping[str, str]) -> str | None:
    """Why a server's disks cannot leave its host, or None."""
    if any(key.startswith(FORK_PREFIX) for key in system_metadata):
        return "it has fork images on its host; release them first"
    if FORK in system_metadata and LOCAL not in system_metadata:
        return (
            "its disks depend on its fork's image until they have been fetched; "
            "fork with the population 'eager' or 'background' and wait"
        )
    return None


Record = dict[str, Any]
"""A fork as its host knows it: ``id``, ``parent``, ``project_id``, ``host``, ``trait`` (of hosts
that take its clones), ``state`` ("active", "lost", or "unknown" if its memory server does not
answer) and its ``reason``, ``created`` (ISO 8601), ``network`` (the family's own, or None),
``checkpoint``, ``keep`` (seconds or None), ``params``, ``clones`` (how many clone IDs were given
out), ``method`` (how memory was frozen), ``pause``, ``stages`` and ``after`` (seconds), ``size``
(bytes of memory), ``vcpus`` and ``image_ref`` of the parent then, ``agent`` (whether its guest has
one), ``problems`` (sentences: what went wrong in its guest) and ``users`` (hosts that still fetch
from it)."""

_ERRORS = {
    error.__name__: error
    for error in (
        exception.CannotFork,
        exception.CaptureFailed,
        exception.ControlError,
        exception.ForkInUse,
        exception.ForkNotFound,
        exception.InvalidDescriptor,
        exception.SpawnFailed,
    )
}


class ComputeAPI:
    """Asks compute hosts.

    Every method raises :class:`exception.HostUnavailable` if the host gives no answer, or does not
    know what it is asked: it lacks this plugin.
    """

    def __init__(self) -> None:
        target = messaging.Target(topic=_TOPIC, namespace=NAMESPACE, version=VERSION)
        serializer = objects_base.NovaObjectSerializer()
        self._router = rpc.ClientRouter(rpc.get_client(target, serializer=serializer))

    def fork(
        self,
        context: nova_context.RequestContext,
        instance: objects.Instance,
        fork_id: str,
        count: int,
        *,
        keep: int | None,
        params: dict[str, str],
        checkpoint: bool,
        network: family_network.FamilyNetwork | None,
    ) -> Record:
        """Capture a running server, on its host, for ``count`` clones.

        The image goes again unless :meth:`confirm` says soon that somebody needs it.

        :param network: the family's own, which goes when nobody needs it any more

        :returns: the record; ``first`` is the first clone's ID
        :raises CannotFork: the reason; the server is untouched
        :raises CaptureFailed: the server runs on, and nothing is left
        """
        return self._call(
            context,
            instance.host,
            "fork",
            # What is copied before the guest is stopped may be all of its memory.
            patient=True,
            instance=instance,
            fork_id=fork_id,
            count=count,
            keep=keep,
            params=params,
            checkpoint=checkpoint,
            network=network,
        )

    def confirm(self, context: nova_context.RequestContext, host: str, fork_id: str) -> None:
        """Have the host keep an image that was just made: what is to be made of it is there.

        :raises ForkNotFound: it is gone already
        """
        self._call(context, host, "confirm", fork_id=fork_id)

    def extend(
        self, context: nova_context.RequestContext, host: str, fork_id: str, count: int
    ) -> Record:
        """Give out IDs for ``count`` more clones of an existing image.

        :returns: the record; ``first`` is the first new clone's ID
        :raises ForkNotFound: there is no such image on the host
        """
        return self._call(context, host, "extend", fork_id=fork_id, count=count)

    def show(self, context: nova_context.RequestContext, host: str, fork_id: str) -> Record:
        """:raises ForkNotFound: there is no such image on the host"""
        return self._call(context, host, "show", fork_id=fork_id)

    def release(
        self, context: nova_context.RequestContext, host: str, fork_id: str, *, force: bool = False
    ) -> None:
        """Remove an image.

        :param force: also if clones still need it; what they have not fetched is lost to them
        :raises ForkNotFound: there is no such image on the host
        :raises ForkInUse: clones still need it
        """
        self._call(context, host, "release", fork_id=fork_id, force=force)

    def population(
        self, context: nova_context.RequestContext, host: str, fork_id: str
    ) -> dict[str, Any] | None:
        """What a clone's host has of an image: ``state``; ``population``; ``resident``, ``zero``
        and ``missing`` pages; ``faults``, ``bytes_multicast``, ``bytes_unicast``. None if it has
        nothing of it."""
        return self._call(context, host, "population", fork_id=fork_id)

    def descriptor(
        self, context: nova_context.RequestContext, host: str, fork_id: str
    ) -> dict[str, Any]:
        """What a clone host must have: ``descriptor`` and ``key`` (base64); and whether the guest
        has an ``agent``.

        :raises ForkNotFound: there is no such image on the host
        """
        return self._call(context, host, "descriptor", fork_id=fork_id)

    def tell(
        self,
        context: nova_context.RequestContext,
        host: str,
        fork_id: str,
        clone_id: int,
        *,
        offset: int | None,
        data: str | None,
        status: int | None,
    ) -> bool:
        """Pass on what a clone's guest has to say to its parent's.

        :param data: the piece of its result from ``offset`` on, in base64; or None
        :param status: with which it has ended; or None
        :returns: whether a program of its parent waits for that
        """
        return self._call(
            context,
            host,
            "tell",
            fork_id=fork_id,
            clone_id=clone_id,
            offset=offset,
            data=data,
            status=status,
        )

    def _call(
        self,
        context: nova_context.RequestContext,
        host: str,
        method: str,
        *,
        patient: bool = False,
        **arguments: Any,
    ) -> Any:
        """
        :param patient: wait for long_rpc_timeout seconds, if the host is there meanwhile
        """
        options: dict[str, Any] = {}
        if patient:
            options["timeout"] = CONF.long_rpc_timeout
            options["call_monitor_timeout"] = CONF.rpc_response_timeout
        client = self._router.client(context).prepare(server=host, **options)
        try:
            return client.call(context, method, **arguments)
        except messaging.RemoteError as error:
            kind = _ERRORS.get(error.exc_type)
            if kind is not None:
                raise kind(error.value) from error
            if error.exc_type in ("UnsupportedVersion", "NoSuchMethod"):
                raise _incapable(host) from error
            raise
        except (messaging.UnsupportedVersion, messaging.NoSuchMethod) as error:
            # Not all transports wrap them.
            raise _incapable(host) from error
        except (messaging.MessagingTimeout, messaging.MessageDeliveryFailure) as error:
            raise exception.HostUnavailable(f"The host {host} does not answer") from error


def _incapable(host: str) -> exception.HostUnavailable:
    return exception.HostUnavailable(
        f"The host {host} cannot fork servers: it does not run this plugin"
    )
