# SPDX-License-Identifier: Apache-2.0
"""Compute hosts, in whichever cell they are."""

from collections.abc import Iterator
import contextlib

from nova import context as nova_context
from nova import exception as nova_exception
from nova import objects
from nova import servicegroup

from nova_snowflock import exception


class HostGone(exception.HostUnavailable):
    """There is no such compute host any more."""


class Hosts:
    """Tells which hosts may be asked, so that no request waits for one that is down."""

    def __init__(self) -> None:
        self._services = servicegroup.API()

    @contextlib.contextmanager
    def reach(
        self, context: nova_context.RequestContext, host: str
    ) -> Iterator[nova_context.RequestContext]:
        """A context in which the RPC client reaches a host.

        :raises HostGone: the cloud no longer has that host
        :raises exception.HostUnavailable: it is down
        """
        admin = context.elevated()
        try:
            cell = objects.HostMapping.get_by_host(admin, host).cell_mapping
            with nova_context.target_cell(admin, cell) as targeted:
                service = objects.Service.get_by_compute_host(targeted, host)
        except (
            nova_exception.HostMappingNotFound,
            nova_exception.ComputeHostNotFound,
        ) as error:
            raise HostGone(f"There is no compute host {host}") from error
        if not self._services.service_is_up(service):
            raise exception.HostUnavailable(f"The compute host {host} is down")
        with nova_context.target_cell(context, cell) as targeted:
            yield targeted
