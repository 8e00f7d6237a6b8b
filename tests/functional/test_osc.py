# SPDX-License-Identifier: Apache-2.0
"""The commands, by the SDK, against the API."""

import io
import json
import types
from typing import Any

from keystoneauth1 import noauth
from keystoneauth1 import session
from openstack import connection
from openstack import exceptions
import pytest

from nova_snowflock.osc import fork
from tests.functional import base


class CommandTest(base.ForkTestCase):
    """A user at a shell."""

    def setUp(self) -> None:
        super().setUp()
        url = self.api_fixture.base_url
        user = session.Session(auth=noauth.NoAuth(endpoint=url))
        user.additional_headers = {
            "X-Auth-User": "fake",
            "X-Auth-Project-Id": self.api.project_id,
            "X-Roles": "reader,member",
        }
        cloud = connection.Connection(session=user, compute_endpoint_override=url)
        self.compute = cloud.compute
        self.parent = self.boot(name="web")

    def test_life_of_a_fork(self) -> None:
        made = self._run(fork.CreateFork, "--count", "2", "--wait", "--property", "a=1", "web")
        assert [clone["name"] for clone in made["clones"]] == ["web-clone-1", "web-clone-2"]
        more = self._run(fork.CreateFork, "--fork", made["id"], "--wait", "web-clone-2")
        assert [clone["clone_id"] for clone in more["clones"]] == [3]
        (listed,) = self._run(fork.ListForks, "web")
        assert listed["ID"] == made["id"]
        assert {clone["status"] for clone in listed["Clones"]} == {"ACTIVE"}
        shown = self._run(fork.ShowFork, self.parent["id"], made["id"])
        assert shown["state"] == "active"
        assert "host" not in shown
        self.images[made["id"]]["users"] = 1
        with pytest.raises(exceptions.ConflictException, match="still fetch"):
            self._run(fork.ReleaseFork, "web", made["id"])
        self._run(fork.ReleaseFork, "--force", "web", made["id"])
        assert self._run(fork.ShowFork, "web", made["id"])["state"] == "released"
        self._run(fork.DeleteFork, "web", made["id"])
        assert self._run(fork.ListForks, "web") == []
        with pytest.raises(exceptions.NotFoundException, match="has no fork"):
            self._run(fork.ShowFork, "web", made["id"])

    def _run(self, command: type, *arguments: str) -> Any:
        stdout = io.StringIO()
        app = types.SimpleNamespace(
            client_manager=types.SimpleNamespace(compute=self.compute, network=None),
            stdout=stdout,
            options=None,
            LOG=None,
        )
        instance = command(app, None)
        parser = instance.get_parser("openstack")
        shows = command in (fork.CreateFork, fork.ListForks, fork.ShowFork)
        status = instance.run(parser.parse_args([*(["-f", "json"] if shows else []), *arguments]))
        assert status == 0
        return json.loads(stdout.getvalue()) if shows else None
