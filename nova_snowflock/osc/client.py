# SPDX-License-Identifier: Apache-2.0
"""The API of forks, by the SDK's compute client."""

from typing import Any

from openstack import exceptions

Fork = dict[str, Any]


class Forks:
    """The forks of a server.

    Every method raises an error of :mod:`openstack.exceptions` that tells what the cloud told.

    :param compute: the SDK's compute client
    :param server_id: the parent's or a clone's
    """

    def __init__(self, compute: Any, server_id: str) -> None:
        self._compute = compute
        self._server = f"/servers/{server_id}"
        self._forks = f"{self._server}/forks"

    def create(self, options: dict[str, Any]) -> Fork:
        """Fork the server, or make more clones with ``fork_id``."""
        fork: Fork = self._post(f"{self._server}/action", {"fork": options}).json()["fork"]
        return fork

    def list(self) -> list[Fork]:
        """All that there are."""
        forks: list[Fork] = self._get(self._forks)["forks"]
        return forks

    def get(self, fork_id: str) -> Fork:
        """One, in detail."""
        fork: Fork = self._get(f"{self._forks}/{fork_id}")["fork"]
        return fork

    def delete(self, fork_id: str) -> None:
        """Delete its clones, and release its image."""
        response = self._compute.delete(f"{self._forks}/{fork_id}")
        exceptions.raise_from_response(response)

    def release(self, fork_id: str, *, force: bool) -> None:
        """Release its image only."""
        self._post(f"{self._forks}/{fork_id}/action", {"release": {"force": force}})

    def _get(self, path: str) -> Any:
        response = self._compute.get(path)
        exceptions.raise_from_response(response)
        return response.json()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        response = self._compute.post(path, json=body)
        exceptions.raise_from_response(response)
        return response
