# SPDX-License-Identifier: Apache-2.0
"""Nova's API, as the host asks it: over HTTP, without Keystone."""

from collections.abc import Iterator
import http.server
import json
import pathlib
import threading
from typing import Any

from oslo_config import cfg
import pytest

from nova_snowflock import exception
from nova_snowflock.virt.agents import cloud as agents_cloud

SERVER = "11111111-1111-4111-8111-111111111111"
FORK = "ffffffff-0000-4000-8000-000000000001"


class Api(http.server.ThreadingHTTPServer):
    """Says what it is told to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str, Any]] = []
        self.status = 200
        self.body = b""


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Api

    def _answer(self) -> None:
        size = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(size)) if size else None
        self.server.asked.append((self.command, self.path, body))
        if self.server.status == 0:
            return  # it hangs up
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    do_GET = do_POST = do_DELETE = _answer

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def api() -> Iterator[Api]:
    with Api() as api:
        thread = threading.Thread(target=api.serve_forever, args=[0.01])
        thread.start()
        yield api
        api.shutdown()
        thread.join()


def configured(directory: pathlib.Path, text: str) -> cfg.ConfigOpts:
    conf = cfg.ConfigOpts()
    file = directory / "nova.conf"
    file.write_text(f"[{agents_cloud.GROUP}]\n{text}")
    conf([], default_config_files=[str(file)])
    agents_cloud.register_opts(conf)  # as late as the service does
    return conf


@pytest.fixture
def cloud(api: Api, tmp_path: pathlib.Path) -> agents_cloud.Cloud:
    url = f"http://127.0.0.1:{api.server_port}/v2.1"
    conf = configured(tmp_path, f"auth_type = none\nendpoint_override = {url}\n")
    return agents_cloud.Cloud(conf)


def test_configured(cloud: agents_cloud.Cloud, tmp_path: pathlib.Path) -> None:
    assert cloud.is_configured
    assert not agents_cloud.Cloud(configured(tmp_path, "")).is_configured


def test_configuration_is_read_again(tmp_path: pathlib.Path) -> None:
    """As on SIGHUP; also if it has no credentials."""
    conf = configured(tmp_path, "")
    assert conf.reload_config_files()
    conf.mutate_config_files()


def test_sample_has_credentials() -> None:
    [(group, options)] = agents_cloud.list_opts()
    assert group == agents_cloud.GROUP
    assert {"auth_type", "auth-url", "username", "timeout"} <= {option.name for option in options}


def test_timeout_is_long_enough_for_networks(tmp_path: pathlib.Path) -> None:
    conf = configured(tmp_path, "")
    assert conf[agents_cloud.GROUP].timeout == 600
    assert conf[agents_cloud.GROUP].service_type == "compute"


def test_fork(cloud: agents_cloud.Cloud, api: Api) -> None:
    api.status, api.body = 202, json.dumps({"fork": {"id": FORK, "clones": []}}).encode()
    assert cloud.fork(SERVER, count=2, params={"a": "b"}) == {"id": FORK, "clones": []}
    assert api.asked == [
        (
            "POST",
            f"/v2.1/servers/{SERVER}/action",
            {"fork": {"count": 2, "params": {"a": "b"}}},
        )
    ]


def test_find(cloud: agents_cloud.Cloud, api: Api) -> None:
    forks = [{"id": SERVER}, {"id": FORK, "clones": [1]}]
    api.body = json.dumps({"forks": forks}).encode()
    assert cloud.find(SERVER, FORK) == forks[1]
    assert api.asked == [("GET", f"/v2.1/servers/{SERVER}/forks", None)]
    api.body = b'{"forks": []}'
    with pytest.raises(agents_cloud.Refusal, match=FORK) as caught:
        cloud.find(SERVER, FORK)
    assert caught.value.status == 404


def test_what_has_no_answer(cloud: agents_cloud.Cloud, api: Api) -> None:
    api.status = 204
    cloud.delete_server(SERVER)
    cloud.release(SERVER, FORK)
    cloud.delete(SERVER, FORK)
    assert api.asked == [
        ("DELETE", f"/v2.1/servers/{SERVER}", None),
        ("POST", f"/v2.1/servers/{SERVER}/forks/{FORK}/action", {"release": {}}),
        ("DELETE", f"/v2.1/servers/{SERVER}/forks/{FORK}", None),
    ]


def test_gone_already(cloud: agents_cloud.Cloud, api: Api) -> None:
    api.status, api.body = 404, b'{"itemNotFound": {"message": "gone", "code": 404}}'
    cloud.delete_server(SERVER)
    cloud.release(SERVER, FORK)
    cloud.delete(SERVER, FORK)
    with pytest.raises(agents_cloud.Refusal, match="gone"):
        cloud.fork(SERVER)
    with pytest.raises(agents_cloud.Refusal, match="gone"):
        cloud.find(SERVER, FORK)


def test_limits(cloud: agents_cloud.Cloud, api: Api) -> None:
    api.body = b'{"limits": {"rate": [], "absolute": {"maxTotalCores": -1}}}'
    assert cloud.limits("demo") == {"maxTotalCores": -1}
    assert api.asked == [("GET", "/v2.1/limits?tenant_id=demo", None)]


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (403, b'{"forbidden": {"message": "Quota exceeded", "code": 403}}', "Quota exceeded"),
        (409, b'{"conflictingRequest": {"message": "it is locked"}}', "it is locked"),
        (400, b"[]", "answered 400"),
        (400, b'{"a": 1, "b": 2}', "answered 400"),
        (400, b'{"a": {}}', "answered 400"),
        (400, b'{"a": "text"}', "answered 400"),
        (400, b"null", "answered 400"),
    ],
)
def test_refusal(
    cloud: agents_cloud.Cloud, api: Api, status: int, body: bytes, message: str
) -> None:
    api.status, api.body = status, body
    with pytest.raises(agents_cloud.Refusal, match=message) as caught:
        cloud.delete_server(SERVER)
    assert caught.value.status == status


@pytest.mark.parametrize(("status", "body"), [(500, b""), (502, b"<html>"), (503, b"{}")])
def test_answer_that_says_nothing_of_what_was_done(
    cloud: agents_cloud.Cloud, api: Api, status: int, body: bytes
) -> None:
    api.status, api.body = status, body
    with pytest.raises(exception.HostUnavailable, match=f"answered {status}"):
        cloud.delete_server(SERVER)


def test_no_answer(cloud: agents_cloud.Cloud, api: Api) -> None:
    api.status = 0
    with pytest.raises(exception.HostUnavailable, match="does not answer"):
        cloud.fork(SERVER, count=1)
    # What cannot be asked twice, is asked once.
    assert len(api.asked) == 1
    api.status, api.body = 200, b'{"forks": [{"id": "x"}]}'
    assert cloud.find(SERVER, "x") == {"id": "x"}


def test_nobody_there(cloud: agents_cloud.Cloud, api: Api) -> None:
    api.server_close()
    with pytest.raises(exception.HostUnavailable):
        cloud.limits("demo")


def test_configuration_that_lacks_something(tmp_path: pathlib.Path) -> None:
    cloud = agents_cloud.Cloud(configured(tmp_path, "auth_type = password\n"))
    with pytest.raises(exception.HostUnavailable):
        cloud.limits("demo")
