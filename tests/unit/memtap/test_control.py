# SPDX-License-Identifier: Apache-2.0
"""The control socket, its client, and the loop that runs its commands."""

from collections.abc import Iterator
import json
import os
import pathlib
import socket
import threading
import time
from typing import Any

import pytest

from nova_snowflock import exception
from nova_snowflock.memtap import control
from nova_snowflock.memtap import loop as event_loop
from nova_snowflock.memtap.client import histogram


class Process:
    """A process's part of the control socket, in a thread."""

    def __init__(self, path: pathlib.Path) -> None:
        self.loop = event_loop.Loop()
        self.threads: set[threading.Thread] = set()
        self.kept: list[int] = []
        commands = {
            "echo": self.echo,
            "status": self.echo,
            "keep": self.keep,
            "refuse": self.refuse,
            "fail": self.fail,
            "stop": self.stop,
        }
        self.server = control.ControlServer(str(path), commands, self.loop)
        self.server.start()
        self.thread = threading.Thread(target=self.loop.run, args=[lambda: None])
        self.thread.start()

    def echo(self, arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self.threads.add(threading.current_thread())
        return {"arguments": arguments, "inodes": [os.fstat(fd).st_ino for fd in fds]}

    def keep(self, arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self.kept.append(fds.pop(0))
        return {}

    def refuse(self, arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        raise exception.ControlError("not today")

    def fail(self, arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        return {"nothing": arguments["missing"]}

    def stop(self, arguments: dict[str, Any], fds: list[int]) -> dict[str, Any]:
        self.loop.stop()
        return {}

    def end(self) -> None:
        self.loop.stop()
        self.thread.join()


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "control.sock"


@pytest.fixture
def process(path: pathlib.Path) -> Iterator[Process]:
    process = Process(path)
    yield process
    process.end()


@pytest.fixture
def client(process: Process, path: pathlib.Path) -> control.ControlClient:
    return control.ControlClient(str(path))


pytestmark = pytest.mark.skipif(os.getuid() != 0, reason="control sockets are for root")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_command(client: control.ControlClient, process: Process) -> None:
    answer = client.call("echo", text="\N{SNOWFLAKE}", number=1)
    assert answer["arguments"] == {"text": "\N{SNOWFLAKE}", "number": 1}
    assert client.status() == {"arguments": {}, "inodes": []}
    assert process.threads == {process.thread}


def test_large_messages(client: control.ControlClient) -> None:
    data = "x" * (5 << 20)
    assert client.call("echo", data=data)["arguments"]["data"] == data


def test_descriptors_are_handed_over_and_closed(
    client: control.ControlClient, tmp_path: pathlib.Path
) -> None:
    files = [(tmp_path / name).open("w") for name in "abc"]
    inodes = [os.fstat(file.fileno()).st_ino for file in files]
    before = descriptors()
    for command, arguments in (("echo", {}), ("echo", {"data": "x" * (1 << 20)})):
        answer = client.call(command, fds=[file.fileno() for file in files], **arguments)
        assert answer["inodes"] == inodes
    for command in ("refuse", "fail", "no such command"):
        with pytest.raises(exception.ControlError):
            client.call(command, fds=[file.fileno() for file in files])
    deadline = time.monotonic() + 10
    while descriptors() != before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert descriptors() == before
    for file in files:
        file.close()


def test_a_command_may_keep_a_descriptor(client: control.ControlClient, process: Process) -> None:
    read, write = os.pipe()
    client.call("keep", fds=[write])
    client.call("echo")
    os.write(process.kept[0], b"kept")
    assert os.read(read, 10) == b"kept"
    for fd in (read, write, *process.kept):
        os.close(fd)


def test_errors_are_told(client: control.ControlClient) -> None:
    with pytest.raises(exception.ControlError, match="not today"):
        client.call("refuse")
    with pytest.raises(exception.ControlError, match="missing"):
        client.call("fail")
    with pytest.raises(exception.ControlError, match="not a command"):
        client.call("no such command")
    assert client.status()


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"not json\n",
        b"\xff\n",
        b"[]\n",
        b'"status"\n',
        b"{}\n",
        b'{"command": []}\n',
        b'{"command": {}}\n',
        b'{"command": null}\n',
        b'{"command": "__init__"}\n',
        b"[" * 100000 + b"\n",
        b"1e999999\n",
    ],
)
def test_what_is_no_command(client: control.ControlClient, path: pathlib.Path, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.connect(str(path))
        connection.sendall(line)
        answer = json.loads(connection.makefile().readline())
    assert list(answer) == ["error"]
    assert client.status()


def test_connections_that_break_off(client: control.ControlClient, path: pathlib.Path) -> None:
    for data in (b"", b'{"command"', b'{"command": "status"}\n'):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.connect(str(path))
            connection.sendall(data)
    assert client.status()


def test_many_at_once(client: control.ControlClient) -> None:
    answers: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(client.call("echo", number=n)))
        for n in range(50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer["arguments"]["number"] for answer in answers) == list(range(50))


def test_only_root_may_open_it(process: Process, path: pathlib.Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


def test_others_are_refused(client: control.ControlClient, path: pathlib.Path) -> None:
    """Even where the file's permissions would let them in."""
    path.chmod(0o666)
    for directory in path.parents:
        if directory.name.startswith("pytest"):
            directory.chmod(0o755)
    path.parent.chmod(0o755)
    child = os.fork()
    if not child:
        code = 1
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            client.call("status")
        except exception.ControlError as error:
            code = 0 if "Permission denied" not in str(error) else 2
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert client.status()


def test_peer(client: control.ControlClient) -> None:
    assert client.peer() == os.getpid()


def test_nobody_listens(path: pathlib.Path) -> None:
    client = control.MemtapClient(str(path))
    for call in (client.status, client.stop, client.peer):
        with pytest.raises(exception.ControlError, match="does not answer"):
            call()


def test_stop(client: control.ControlClient, process: Process) -> None:
    client.stop()
    process.thread.join()


def test_command_line(
    client: control.ControlClient,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", ["snowflock-control", client.path, "status"])
    assert control.main() == 0
    assert json.loads(capsys.readouterr().out) == {"arguments": {}, "inodes": []}
    monkeypatch.setattr("sys.argv", ["snowflock-control", client.path + "x", "status"])
    assert control.main() == 1
    assert "does not answer" in capsys.readouterr().err


def test_loop_calls_back_until_removed() -> None:
    loop = event_loop.Loop()
    read, write = os.pipe()
    seen: list[bytes] = []

    def receive() -> None:
        seen.append(os.read(read, 1))
        if seen[-1] == b"c":
            loop.remove(read)
            loop.stop()

    loop.add(read, receive)
    os.write(write, b"abcd")
    loop.run(lambda: None)
    assert seen == [b"a", b"b", b"c"]
    os.close(read)
    os.close(write)


def test_loop_works_in_between() -> None:
    loop = event_loop.Loop()
    calls = iter([0, 0.001, 0])

    def work() -> float | None:
        delay = next(calls, None)
        if delay is None:
            loop.stop()
        return delay

    loop.run(work)
    assert next(calls, None) is None


def test_loop_hands_errors_over() -> None:
    loop = event_loop.Loop()
    thread = threading.Thread(target=loop.run, args=[lambda: None])
    thread.start()
    assert loop.call(threading.current_thread) is thread
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda: 1 // 0)
    loop.stop()
    thread.join()
    with pytest.raises(TimeoutError):
        loop.call(lambda: None, timeout=0.01)


def test_histogram() -> None:
    latency = histogram.Histogram()
    for microseconds in (0.5, 1, 3, 100, 1e12):
        latency.add(microseconds / 1e6)
    shown = latency.as_dict()
    counts: Any = shown["counts"]
    assert sum(counts) == 5
    below: Any = shown["below_us"]
    assert len(below) == len(counts)
    assert below == sorted(below)
    for microseconds in (0.5, 1, 3, 100):
        assert counts[next(n for n, bound in enumerate(below) if microseconds < bound)]
    assert counts[-1] == 1
    assert json.dumps(shown)
