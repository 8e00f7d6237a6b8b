# SPDX-License-Identifier: Apache-2.0
"""Nova's compute API with forks in it.

In api-paste.ini::

    [app:osapi_compute_app_v21]
    paste.app_factory = nova_snowflock.api.router:APIRouter.factory
"""

from typing import Any

from nova.api.openstack import wsgi
from nova.api.openstack.compute import routes
from nova.api.openstack.compute import servers
from nova.compute import utils as compute_utils
import nova.conf

from nova_snowflock import conf
from nova_snowflock.api import forking
from nova_snowflock.api import forks
from nova_snowflock.api import moving
from nova_snowflock.api import policies
from nova_snowflock.virt import rpc


class APIRouter(routes.APIRouterV21):
    """All of Nova's routes, and ours.

    :raises RuntimeError: this Nova has no place for the action where it is expected
    """

    def __init__(self) -> None:
        conf.register_opts(nova.conf.CONF)
        policies.register()
        _hide_from_snapshots()
        service = forking.Forking()

        def resource() -> wsgi.Resource:
            return wsgi.Resource(forks.ForksController(service))

        super().__init__(
            custom_routes=(
                ("/servers/{id}/forks", {"GET": (resource, "index")}),
                (
                    "/servers/{id}/forks/{fork_id}",
                    {"GET": (resource, "show"), "DELETE": (resource, "delete")},
                ),
                ("/servers/{id}/forks/{fork_id}/action", {"POST": (resource, "action")}),
            )
        )
        controller = forks.ForkController(service)
        for servers_resource in self._resources_of_servers():
            servers_resource.register_subcontroller_actions(controller)
            moving.guard(servers_resource.wsgi_actions, service.compute_api)

    def _resources_of_servers(self) -> set[Any]:
        """Nova's own, each once: it has routes with and without the project."""
        resources: set[Any] = {
            route.defaults["controller"]
            for route in self.map.matchlist
            if route.defaults.get("action") == "action"
            and isinstance(
                getattr(route.defaults.get("controller"), "controller", None),
                servers.ServersController,
            )
        }
        if not resources:
            raise RuntimeError(
                "nova-snowflock finds no route to the actions of servers in this release of Nova, "
                "so it cannot add 'fork' to them. Use a release of Nova that it supports."
            )
        return resources


def _hide_from_snapshots() -> None:
    """Nova would make properties of the image of a server's snapshot of what is in its system
    metadata: names of hosts, for users to read, and one more for each fork, up to a limit."""
    compute_utils.NON_INHERITABLE_IMAGE_NAMESPACES = frozenset(
        {*compute_utils.NON_INHERITABLE_IMAGE_NAMESPACES, rpc.NAMESPACE}
    )
