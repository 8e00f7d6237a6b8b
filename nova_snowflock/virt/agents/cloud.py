# SPDX-License-Identifier: Apache-2.0
"""Nova's API, which this host asks for what programs in its guests want, for their owners.

As a user of its own: group ``[snowflock_nova]`` has the usual options of a service's credentials.
What that user may do with servers of others is the cloud's policy; the quota is the owner's.
"""

from typing import Any

from keystoneauth1 import exceptions as keystone_exceptions
from keystoneauth1 import loading
from oslo_config import cfg

from nova_snowflock import exception

GROUP = "snowflock_nova"
_TIMEOUT = 600
"""Seconds that a fork may take: clones' networks are made before the answer."""


class Refusal(exception.SnowFlockError):
    """The API refused. The message is its reason, made for users."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def options() -> list[cfg.Opt]:
    """What the group has, whatever the kind of its credentials."""
    adapter = loading.get_adapter_conf_options(include_deprecated=False)
    cfg.set_defaults(adapter, service_type="compute", valid_interfaces=["internal", "public"])
    session = loading.get_session_conf_options()
    cfg.set_defaults(session, timeout=_TIMEOUT)
    return [*adapter, *session, *loading.get_auth_common_conf_options()]


def list_opts() -> list[tuple[str, list[cfg.Opt]]]:
    """The group and its options, for the sample generator (entry point oslo.config.opts)."""
    return [(GROUP, [*options(), *loading.get_auth_plugin_conf_options("password")])]


def register_opts(conf: cfg.ConfigOpts) -> None:
    """Have the group.

    Not what a kind of credentials requires: it is no error to have none.
    """
    conf.register_opts(options(), group=GROUP)


class Cloud:
    """The API as one who may use it for others.

    Every method raises :class:`Refusal`, or :class:`exception.HostUnavailable` if there is no
    answer.
    """

    def __init__(self, conf: cfg.ConfigOpts) -> None:
        self._conf = conf
        self._adapter: Any = None

    @property
    def is_configured(self) -> bool:
        return self._conf[GROUP].auth_type is not None

    def fork(self, server: str, **options: Any) -> dict[str, Any]:
        """Fork a server; the fork, as the API shows it."""
        answer = self._request("POST", f"/servers/{server}/action", {"fork": options})
        return dict(answer["fork"])

    def find(self, server: str, fork: str) -> dict[str, Any]:
        """One of a server's forks, as the API lists it."""
        for found in self._request("GET", f"/servers/{server}/forks")["forks"]:
            if found["id"] == fork:
                return dict(found)
        raise Refusal(404, f"There is no fork {fork}")

    def delete(self, server: str, fork: str) -> None:
        """Delete the clones of a fork, and its image."""
        self._request("DELETE", f"/servers/{server}/forks/{fork}", gone=True)

    def release(self, server: str, fork: str) -> None:
        """Release the image of a fork."""
        body: dict[str, Any] = {"release": {}}
        self._request("POST", f"/servers/{server}/forks/{fork}/action", body, gone=True)

    def delete_server(self, server: str) -> None:
        """Delete a server."""
        self._request("DELETE", f"/servers/{server}", gone=True)

    def limits(self, project: str) -> dict[str, int]:
        """What a project may have, and has: ``maxTotalInstances``, ``totalInstancesUsed``, ..."""
        answer = self._request("GET", f"/limits?tenant_id={project}")
        return dict(answer["limits"]["absolute"])

    def _request(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, gone: bool = False
    ) -> Any:
        """
        :param gone: whether it is no refusal that there is nothing
        """
        try:
            if self._adapter is None:
                auth = loading.load_auth_from_conf_options(self._conf, GROUP)
                session = loading.load_session_from_conf_options(self._conf, GROUP, auth=auth)
                self._adapter = loading.load_adapter_from_conf_options(
                    self._conf, GROUP, session=session, auth=auth
                )
            answer = self._adapter.request(path, method, json=body, raise_exc=False)
        except keystone_exceptions.ClientException as error:
            raise exception.HostUnavailable(f"Nova's API does not answer: {error}") from error
        if answer.status_code == 404 and gone:
            return None
        if answer.status_code >= 500:
            raise exception.HostUnavailable(f"Nova's API answered {answer.status_code}")
        if answer.status_code >= 400:
            raise Refusal(answer.status_code, _reason(answer))
        return answer.json() if answer.content else None


def _reason(answer: Any) -> str:
    try:
        [fault] = answer.json().values()
        return str(fault["message"])
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"Nova's API answered {answer.status_code}"
