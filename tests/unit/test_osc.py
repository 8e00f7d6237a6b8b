# SPDX-License-Identifier: Apache-2.0
"""The commands, with a cloud that answers what a test says."""

import base64
import csv
import io
import json
import pathlib
import types
from typing import Any

from cliff import commandmanager
from openstack import exceptions as sdk_exceptions
from openstack.compute.v2 import _proxy as compute_proxy
from openstack.compute.v2 import server as compute_server
from osc_lib import exceptions
import pytest
import requests

from nova_snowflock.osc import fork
from nova_snowflock.osc import progress

PARENT = "9b1f3c1e-0000-4000-8000-000000000001"
FORK = "9b1f3c1e-0000-4000-8000-000000000002"
CLONES = [
    {"clone_id": n, "server_id": f"9b1f3c1e-0000-4000-8000-00000000001{n}", "name": f"web-{n}"}
    for n in (1, 2)
]
CREATED = {
    "id": FORK,
    "parent_id": PARENT,
    "state": "active",
    "created_at": "2026-11-20T13:00:00+00:00",
    "clones": CLONES,
}
SHOWN = {
    **CREATED,
    "checkpoint": False,
    "keep": None,
    "params": {"job": "7"},
    "size": 2 << 30,
    "pause": 0.006,
    "stages": {"freeze": 0.004},
    "clones": [
        {
            **CLONES[0],
            "status": "ACTIVE",
            "population": "eager",
            "pages": {"resident": 1, "zero": 2, "missing": 3},
            "faults": 4,
            "bytes_multicast": 5,
            "bytes_unicast": 6,
        },
        {
            **CLONES[1],
            "status": "BUILD",
            "population": None,
            "pages": {"resident": None, "zero": None, "missing": None},
            "faults": None,
            "bytes_multicast": None,
            "bytes_unicast": None,
        },
    ],
}


def answer(status: int, body: Any = None) -> requests.Response:
    """What the cloud answers."""
    response = requests.Response()
    response.status_code = status
    response.url = "http://cloud/compute"
    response.request = requests.Request("GET", response.url).prepare()
    response.headers["content-type"] = "application/json"
    response._content = json.dumps(body).encode() if body else b""
    return response


class Cloud:
    """Answers, and remembers what it was asked. Names of servers and networks are looked up."""

    def __init__(self) -> None:
        self.answers: list[requests.Response] = []
        self.requests: list[tuple[str, str, Any]] = []
        self.statuses: dict[str, list[str | None]] = {}

    def get(self, path: str) -> requests.Response:
        return self._answer("GET", path)

    def delete(self, path: str) -> requests.Response:
        return self._answer("DELETE", path)

    def post(self, path: str, json: Any) -> requests.Response:
        return self._answer("POST", path, json)

    def _answer(self, verb: str, path: str, body: Any = None) -> requests.Response:
        self.requests.append((verb, path, body))
        return self.answers.pop(0)

    def find_server(self, name: str, ignore_missing: bool) -> Any:
        assert not ignore_missing
        if name != "web":
            raise sdk_exceptions.NotFoundException(f"No Server found for {name}")
        return types.SimpleNamespace(id=PARENT)

    def get_server(self, server_id: str) -> Any:
        statuses = self.statuses[server_id]
        status = statuses.pop(0) if len(statuses) > 1 else statuses[0]
        if status is None:
            raise sdk_exceptions.NotFoundException("gone")
        fault = {"message": "No valid host was found."} if status == "ERROR" else None
        return types.SimpleNamespace(status=status, fault=fault)

    def find_network(self, name: str, ignore_missing: bool) -> Any:
        return types.SimpleNamespace(id=f"id-of-{name}")

    find_port = find_security_group = find_network


@pytest.fixture
def cloud() -> Cloud:
    return Cloud()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_INTERVAL", 0)


def run(command: type, cloud: Cloud, *arguments: str) -> tuple[int, str]:
    """A command's exit code and what it prints."""
    stdout = io.StringIO()
    app = types.SimpleNamespace(
        client_manager=types.SimpleNamespace(compute=cloud, network=cloud),
        stdout=stdout,
        options=types.SimpleNamespace(),
        LOG=None,
    )
    instance = command(app, None)
    parsed = instance.get_parser("openstack").parse_args(arguments)
    return instance.run(parsed), stdout.getvalue()


def test_fork(cloud: Cloud) -> None:
    cloud.answers = [answer(202, {"fork": CREATED})]
    status, output = run(fork.CreateFork, cloud, "web")
    assert status == 0
    assert cloud.requests == [("POST", f"/servers/{PARENT}/action", {"fork": {}})]
    for word in (FORK, PARENT, "web-1", "web-2"):
        assert word in output


def test_fork_with_everything(cloud: Cloud, tmp_path: pathlib.Path) -> None:
    user_data = tmp_path / "user-data"
    user_data.write_bytes(b"#!/bin/sh")
    cloud.answers = [answer(202, {"fork": CREATED})]
    run(
        fork.CreateFork,
        cloud,
        *("--count", "2", "--name", "w{n}", "--checkpoint", "--keep", "60"),
        *("--network", "a", "--port", "b", "--security-group", "s", "--availability-zone", "z"),
        *("--hint", "group=g", "--hint", "same_host=x", "--hint", "same_host=y"),
        *("--key-name", "k", "--user-data", str(user_data), "--property", "p=1"),
        *("--param", "job=7", "--population", "lazy", "--isolation", "none", "web"),
    )
    ((_verb, _path, body),) = cloud.requests
    assert body["fork"] == {
        "count": 2,
        "name": "w{n}",
        "checkpoint": True,
        "keep": 60,
        "networks": [{"uuid": "id-of-a"}, {"port": "id-of-b"}],
        "security_groups": [{"name": "id-of-s"}],
        "availability_zone": "z",
        "hints": {"group": "g", "same_host": ["x", "y"]},
        "key_name": "k",
        "user_data": base64.b64encode(b"#!/bin/sh").decode(),
        "metadata": {"p": "1"},
        "params": {"job": "7"},
        "isolation": "none",
        "population": "lazy",
    }


def test_more_clones(cloud: Cloud) -> None:
    cloud.answers = [answer(202, {"fork": CREATED})]
    run(fork.CreateFork, cloud, "--fork", FORK, "--count", "2", "web")
    assert cloud.requests[0][2] == {"fork": {"fork_id": FORK, "count": 2}}


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--count", "-1", "web"],
        ["--count", "many", "web"],
        ["--count", "0", "web"],
        ["--count", "2", "--name", "same", "web"],
        ["--fork", FORK, "--checkpoint", "web"],
        ["--fork", FORK, "--param", "a=b", "web"],
        ["--fork", FORK, "--keep", "1", "web"],
        ["--fork", FORK, "--isolation", "family", "web"],
        ["--population", "fast", "web"],
        ["--keep", "-1", "web"],
    ],
)
def test_usage(cloud: Cloud, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run(fork.CreateFork, cloud, *arguments)
    assert caught.value.code == 2
    assert not cloud.requests


def test_what_the_cloud_says(cloud: Cloud) -> None:
    fault = {"conflictingRequest": {"code": 409, "message": "It has a TPM."}}
    cloud.answers = [answer(409, fault)]
    with pytest.raises(sdk_exceptions.ConflictException, match="It has a TPM"):
        run(fork.CreateFork, cloud, "web")
    with pytest.raises(sdk_exceptions.NotFoundException):
        run(fork.CreateFork, cloud, "unknown")


def test_unreadable_user_data(cloud: Cloud, tmp_path: pathlib.Path) -> None:
    with pytest.raises(exceptions.CommandError, match="cannot be read"):
        run(fork.CreateFork, cloud, "--user-data", str(tmp_path / "none"), "web")
    assert not cloud.requests


def test_wait(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    cloud.answers = [answer(202, {"fork": CREATED})]
    cloud.statuses = {
        str(CLONES[0]["server_id"]): ["BUILD", "BUILD", "ACTIVE"],
        str(CLONES[1]["server_id"]): ["ACTIVE"],
    }
    status, output = run(fork.CreateFork, cloud, "--wait", "-f", "json", "web")
    assert status == 0
    assert json.loads(output)["clones"] == CLONES
    assert capsys.readouterr().err == "web-2: ACTIVE (1/2)\nweb-1: ACTIVE (2/2)\n"


def test_wait_for_what_fails(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    cloud.answers = [answer(202, {"fork": CREATED})]
    cloud.statuses = {
        str(CLONES[0]["server_id"]): ["BUILD", "ERROR"],
        str(CLONES[1]["server_id"]): ["BUILD", None],
    }
    status, output = run(fork.CreateFork, cloud, "--wait", "web")
    assert status == 1
    assert FORK in output
    errors = capsys.readouterr().err
    assert "web-1 failed: No valid host was found.\n" in errors
    assert "web-2 failed: it is DELETED\n" in errors


def test_nothing_to_wait_for(cloud: Cloud) -> None:
    cloud.answers = [answer(202, {"fork": {**CREATED, "clones": []}})]
    status, _ = run(fork.CreateFork, cloud, "--wait", "--checkpoint", "--count", "0", "web")
    assert status == 0


def test_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    bar = progress.Progress(terminal, 2)
    bar.add("a", "ACTIVE")
    bar.add("b", "ACTIVE")
    bar.end()
    drawn = terminal.getvalue().split("\r")
    assert drawn[1:] == [
        f"[{'.' * 30}] 0/2 clones",
        f"[{'#' * 15}{'.' * 15}] 1/2 clones",
        f"[{'#' * 30}] 2/2 clones\n",
    ]


def test_list(cloud: Cloud) -> None:
    cloud.answers = [answer(200, {"forks": [SHOWN]})] * 2
    _, output = run(fork.ListForks, cloud, "web", "-f", "json")
    assert cloud.requests == [("GET", f"/servers/{PARENT}/forks", None)]
    (listed,) = json.loads(output)
    assert listed["ID"] == FORK
    assert listed["Clones"] == SHOWN["clones"]
    _, output = run(fork.ListForks, cloud, "web", "-f", "csv")
    header, row = csv.reader(output.splitlines()[:1]), output
    assert next(header)[:2] == ["ID", "Parent"]
    assert FORK in row


def test_show(cloud: Cloud) -> None:
    cloud.answers = [answer(200, {"fork": SHOWN})]
    _, output = run(fork.ShowFork, cloud, "web", FORK)
    assert cloud.requests == [("GET", f"/servers/{PARENT}/forks/{FORK}", None)]
    for text in (
        "ACTIVE 1 resident, 2 zero, 3 missing pages 4 faults eager",
        "freeze=0.004",
        "job=7",
    ):
        assert text in output
    assert "None resident" not in output


@pytest.mark.parametrize("formatter", ["json", "shell", "table", "value", "yaml"])
def test_formatters(cloud: Cloud, formatter: str) -> None:
    cloud.answers = [answer(200, {"fork": SHOWN})]
    _, output = run(fork.ShowFork, cloud, "web", FORK, "-f", formatter)
    assert FORK in output


def test_delete(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    cloud.answers = [answer(204)]
    run(fork.DeleteFork, cloud, "web", FORK)
    assert cloud.requests == [("DELETE", f"/servers/{PARENT}/forks/{FORK}", None)]
    cloud.answers = [answer(404, {"itemNotFound": {"message": "No fork x."}}), answer(204)]
    with pytest.raises(exceptions.CommandError, match="1 of 2 forks"):
        run(fork.DeleteFork, cloud, "web", "x", FORK)
    assert "No fork x." in capsys.readouterr().err


@pytest.mark.parametrize("force", [False, True])
def test_release(cloud: Cloud, force: bool) -> None:
    cloud.answers = [answer(204)]
    run(fork.ReleaseFork, cloud, *(["--force"] if force else []), "web", FORK)
    path = f"/servers/{PARENT}/forks/{FORK}/action"
    assert cloud.requests == [("POST", path, {"release": {"force": force}})]


def test_names_of_commands() -> None:
    """The longest name wins: a server may not be called as one of the commands, alone."""
    manager = commandmanager.CommandManager("nova_snowflock.none")
    for name, command in (
        ("server fork", fork.CreateFork),
        ("server fork list", fork.ListForks),
    ):
        manager.add_command(name, command)
    for words, command, rest in (
        ("server fork web", fork.CreateFork, ["web"]),
        ("server fork --count 2 web", fork.CreateFork, ["--count", "2", "web"]),
        ("server fork list web", fork.ListForks, ["web"]),
        ("server fork --count 1 list", fork.CreateFork, ["--count", "1", "list"]),
    ):
        found, _name, remaining = manager.find_command(words.split())
        assert found is command
        assert remaining == rest


def test_the_sdk_has_what_is_used() -> None:
    for method in ("get", "post", "delete", "find_server", "get_server"):
        assert hasattr(compute_proxy.Proxy, method)
    for field in ("status", "fault"):
        assert hasattr(compute_server.Server, field)
