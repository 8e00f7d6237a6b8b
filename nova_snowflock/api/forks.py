# SPDX-License-Identifier: Apache-2.0
"""The HTTP side: the ``fork`` action of servers and the resource ``/servers/{id}/forks``."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
from typing import Any

from nova import exception as nova_exception
from nova import objects
from nova.api import validation
from nova.api.openstack import common
from nova.api.openstack import wsgi
from nova.api.openstack.compute import servers
from oslo_db import exception as db_exception
from oslo_log import log as logging
from webob import exc

from nova_snowflock import exception
from nova_snowflock.api import forking
from nova_snowflock.api import policies
from nova_snowflock.api import schemas
from nova_snowflock.api import views

LOG = logging.getLogger(__name__)

_CONFLICTS = (
    nova_exception.InstanceExists,
    nova_exception.InstanceNotReady,
    nova_exception.NetworkAmbiguous,
    nova_exception.NoUniqueMatch,
    nova_exception.PortInUse,
)


@validation.validated
class ForkController(wsgi.Controller):
    """Adds an action to Nova's servers."""

    def __init__(self, service: forking.Forking) -> None:
        super().__init__()
        self._service = service

    @wsgi.response(202)
    @wsgi.expected_errors((400, 403, 404, 409, 503))
    @wsgi.action("fork")
    @validation.schema(schemas.create)
    @validation.response_body_schema(schemas.create_response)
    def _fork(self, req: wsgi.Request, id: str, body: dict[str, Any]) -> dict[str, Any]:
        """Fork a server, or make more clones from one of its forks."""
        context = req.environ["nova.context"]
        # To JSON schema, 2.0 is an integer.
        options = {key: _whole(value) for key, value in body["fork"].items()}
        server = _server(self._service, context, id, policies.CREATE)
        problem = forking.invalid(options)
        if problem is not None:
            raise exc.HTTPBadRequest(explanation=problem)
        with _faults(id):
            return views.created(*self._service.create(context, server, options))


@validation.validated
class ForksController(wsgi.Controller):
    """The forks of a server."""

    def __init__(self, service: forking.Forking) -> None:
        super().__init__()
        self._service = service

    @wsgi.expected_errors((400, 404))
    @validation.query_schema(schemas.query)
    @validation.response_body_schema(schemas.index_response)
    def index(self, req: wsgi.Request, id: str) -> dict[str, Any]:
        """List the forks of a server, or the fork it is a clone of."""
        context = req.environ["nova.context"]
        server = _server(self._service, context, id, policies.INDEX)
        return views.listed(self._service.index(context, server))

    @wsgi.expected_errors((400, 404, 503))
    @validation.query_schema(schemas.query)
    @validation.response_body_schema(schemas.show_response)
    def show(self, req: wsgi.Request, id: str, fork_id: str) -> dict[str, Any]:
        """Show a fork, its image and its clones."""
        context = req.environ["nova.context"]
        server = _server(self._service, context, id, policies.SHOW)
        with _faults(id):
            report = self._service.show(context, server, fork_id)
        hosts = context.can(policies.SHOW_HOST, _target(server), fatal=False)
        return views.shown(report, hosts=bool(hosts))

    @wsgi.response(204)
    @wsgi.expected_errors((404, 409, 503))
    @validation.response_body_schema(schemas.no_response)
    def delete(self, req: wsgi.Request, id: str, fork_id: str) -> None:
        """Delete the clones of a fork and release its image."""
        context = req.environ["nova.context"]
        server = _server(self._service, context, id, policies.DELETE)
        with _faults(id):
            self._service.delete(context, server, fork_id)

    @wsgi.response(204)
    @wsgi.expected_errors((400, 404, 409, 503))
    @wsgi.action("release")
    @validation.schema(schemas.release)
    @validation.response_body_schema(schemas.no_response)
    def _release(self, req: wsgi.Request, id: str, fork_id: str, body: dict[str, Any]) -> None:
        """Release the image of a fork."""
        context = req.environ["nova.context"]
        server = _server(self._service, context, id, policies.RELEASE)
        force = (body["release"] or {}).get("force", False)
        with _faults(id):
            self._service.release(context, server, fork_id, force=force)


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) else value


def _target(server: objects.Instance) -> dict[str, str]:
    return {"project_id": server.project_id, "user_id": server.user_id}


def _server(
    service: forking.Forking, context: Any, server_id: str, policy: str
) -> objects.Instance:
    server = common.get_instance(
        service.compute_api, context, server_id, expected_attrs=list(forking.ATTRIBUTES)
    )
    context.can(policy, _target(server))
    return server


@contextlib.contextmanager
def _faults(server_id: str) -> Iterator[None]:
    """What goes wrong, as HTTP. What is forbidden, Nova answers itself."""
    try:
        yield
    except exception.ForkNotFound as error:
        raise exc.HTTPNotFound(explanation=f"{error}.") from error
    except nova_exception.InstanceNotFound as error:
        raise exc.HTTPNotFound(explanation=error.format_message()) from error
    except exception.CannotFork as error:
        raise exc.HTTPConflict(
            explanation=f"Server {server_id} cannot be forked: {error}."
        ) from error
    except exception.CaptureFailed as error:
        raise exc.HTTPConflict(
            explanation=f"The fork of server {server_id} failed, and it runs on as before. "
            f"You may try again. The reason: {error}."
        ) from error
    except exception.ForkInUse as error:
        raise exc.HTTPConflict(explanation=f"{error}.") from error
    except exception.ControlError as error:
        LOG.error("A request about server %s: %s", server_id, error)
        raise exc.HTTPConflict(
            explanation="A process of the fork's image does not answer. Try again later, or ask "
            "your administrator."
        ) from error
    except exception.HostUnavailable as error:
        # Users are not told the names of hosts.
        LOG.warning("A request about server %s: %s", server_id, error)
        raise exc.HTTPConflict(
            explanation="The compute host that this needs is down, or it cannot fork servers. "
            "Try again later, or ask your administrator."
        ) from error
    except db_exception.DBConnectionError as error:
        LOG.error("A request about server %s: no connection to the database: %s", server_id, error)
        raise exc.HTTPServiceUnavailable(
            explanation="Nova's database cannot be reached. Try again later."
        ) from error
    except nova_exception.InstanceIsLocked as error:
        raise exc.HTTPConflict(explanation=error.format_message()) from error
    except nova_exception.InstanceInvalidState as error:
        common.raise_http_conflict_for_instance_invalid_state(error, "fork", server_id)
    except nova_exception.OverQuota as error:
        raise exc.HTTPForbidden(explanation=error.format_message()) from error
    except _CONFLICTS as error:
        raise exc.HTTPConflict(explanation=error.format_message()) from error
    except nova_exception.Forbidden:
        raise
    except (
        nova_exception.Invalid,
        nova_exception.NotFound,
        *servers.INVALID_FLAVOR_IMAGE_EXCEPTIONS,
    ) as error:
        raise exc.HTTPBadRequest(explanation=error.format_message()) from error
