# SPDX-License-Identifier: Apache-2.0
"""Servers that a fork binds to their host are not moved, and their users are told."""

from typing import Any

from nova_snowflock.virt import rpc
from tests.functional import base


class MovingTest(base.ForkTestCase):
    """Resize and cold migration."""

    def move(self, server_id: str, action: str, *, api: Any = None) -> tuple[int, str]:
        argument = {"flavorRef": self.api.get_flavors()[1]["id"]} if action == "resize" else None
        path = f"/servers/{server_id}/action"
        answer = self.post(path, {action: argument}, api=api or self.admin_api)
        return answer.status_code, answer.text

    def test_parent(self) -> None:
        parent = self.boot()
        self.fork(parent, count=0, checkpoint=True)
        for action in ("resize", "migrate"):
            status, text = self.move(parent["id"], action)
            assert status == 409
            assert parent["id"] in text
            assert "release them first" in text

    def test_clone(self) -> None:
        [clone] = self.clones(self.fork(self.boot()))
        status, text = self.move(clone["id"], "resize")
        assert status == 409
        assert "fetched" in text
        server = self.instance(clone["id"])
        server.system_metadata[rpc.LOCAL] = "true"
        server.save()
        assert self.move(clone["id"], "resize")[0] == 202

    def test_others_are_told_nothing(self) -> None:
        parent = self.boot()
        self.fork(parent, count=0, checkpoint=True)
        for action in ("resize", "migrate"):
            assert self.move(parent["id"], action, api=self.stranger_api)[0] == 404
