# SPDX-License-Identifier: Apache-2.0
"""The agent, between a host that comes and goes and a guest that is only noted."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
import json
import os
import select
import signal
import stat
import subprocess
import sys
import threading
from typing import Any

import pytest

from nova_snowflock.guest import agent as guest_agent
from nova_snowflock.guest import pending
from nova_snowflock.guest import port
from nova_snowflock.guest import protocol
from tests.unit.guest import host as hosts

Answers = Callable[[pending.Request], dict[str, Any]]


@pytest.fixture
def host() -> Iterator[hosts.Host]:
    host = hosts.Host()
    yield host
    host.close()


@pytest.fixture
def steps(host: hosts.Host) -> hosts.Steps:
    return host.steps


def answer(request: pending.Request) -> dict[str, Any]:
    poll = select.poll()
    poll.register(request, select.POLLIN)
    assert poll.poll(hosts.TIMEOUT * 1000), "it was not answered"
    return request.wait()


def is_answered(request: pending.Request) -> bool:
    return bool(select.select([request], [], [], 0)[0])


def prefork(fork: str = hosts.FORK, **more: Any) -> protocol.Message:
    return {"type": "prefork", "fork": fork, "params": {"p": "q"}, "seconds": 100, **more}


def parent(fork: str = hosts.FORK, **more: Any) -> protocol.Message:
    return {"type": "parent", "fork": fork, "params": {"p": "q"}, "error": None, **more}


def test_hello(host: hosts.Host) -> None:
    host.connect()
    assert host.raw().startswith(b'\n{"type":"hello","version":1,"agent":"')


def test_hello_on_every_connection(host: hosts.Host) -> None:
    for _ in range(3):
        host.meet()
        host.silent()
        host.disconnect()
    assert host.opened == 1


def test_half_a_line_is_forgotten(host: hosts.Host, steps: hosts.Steps) -> None:
    host.meet()
    host.write(protocol.encode(prefork())[:-10])
    host.silent()
    host.disconnect()
    host.connect()
    host.hear("hello")
    host.say(hosts.you())
    host.silent()
    host.say(prefork())
    host.hear("ready")
    assert steps.events() == ["prefork"]


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xfe\n",
        b"{}\n",
        b'{"type":"you"}\n',
        b'{"type":"you","server":5}\n',
        b'{"type":"prefork"}\n',
        b'{"type":"parent","fork":null}\n',
        b'{"type":"answer"}\n{"type":"answer","id":[]}\n{"type":"part","id":"x"}\n',
        b'{"type":"unheard of"}\n',
        b'{"type":"you","server":"x","interfaces":7}\n',
        b"x" * 200000 + b"\n",
    ],
)
def test_nonsense_is_passed_over(host: hosts.Host, data: bytes) -> None:
    host.meet()
    host.silent()
    host.write(data)
    host.say(prefork())
    assert host.hear("ready")["fork"] == hosts.FORK


def test_prefork_and_parent(host: hosts.Host, steps: hosts.Steps) -> None:
    host.meet()
    host.say(prefork(unknown=1))
    assert host.hear("ready") == {"type": "ready", "fork": hosts.FORK, "problems": []}
    host.say(parent(error="it did not work"))
    assert host.hear("done") == {"type": "done", "fork": hosts.FORK, "problems": []}
    (_, before, seconds), (_, after, seconds_after) = steps.calls
    assert before["event"] == "prefork"
    assert before["server"] == before["parent"] == hosts.PARENT
    assert before["params"] == {"p": "q"}
    assert 80 < seconds < 100
    assert after["event"] == "parent"
    assert after["error"] == "it did not work"
    assert seconds_after == steps.hook_seconds


def test_problems_are_told(host: hosts.Host, steps: hosts.Steps) -> None:
    steps.failing["hooks"] = "x" * 1000
    host.meet()
    host.say(prefork())
    (problem,) = host.hear("ready")["problems"]
    assert problem.startswith("The hooks were not run: xxx")


def test_many_problems_fit(
    host: hosts.Host, steps: hosts.Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "hooks", lambda *_: ["\N{SNOWFLAKE}" * 500] * 100)
    host.meet()
    host.say(prefork())
    problems = host.hear("ready")["problems"]
    assert len(problems) > 10
    assert problems[-1] == f"And {100 - len(problems) + 1} more."


def test_asked_again(host: hosts.Host, steps: hosts.Steps) -> None:
    """Hosts that come back ask again, and hooks are run once."""
    steps.hooks_may_end.clear()
    host.meet()
    host.say(prefork())
    hosts.until(lambda: steps.events() == ["prefork"])
    host.disconnect()
    host.meet()
    host.say(prefork())
    host.silent()
    steps.hooks_may_end.set()
    host.hear("ready")
    host.disconnect()
    host.meet()
    host.hear("ready")
    host.say(prefork())
    host.hear("ready")
    host.say(parent())
    host.hear("done")
    host.say(parent())
    host.hear("done")
    host.disconnect()
    host.meet()
    host.hear("done")
    assert steps.events() == ["prefork", "parent"]
    host.say(prefork(hosts.FORK_2))
    host.hear("ready")
    assert steps.events() == ["prefork", "parent", "prefork"]


def test_ready_while_the_host_is_away(host: hosts.Host, steps: hosts.Steps) -> None:
    steps.hooks_may_end.clear()
    host.meet()
    host.say(prefork())
    hosts.until(lambda: steps.events() == ["prefork"])
    host.disconnect()
    steps.hooks_may_end.set()
    hosts.until(lambda: "ready" in host.agent._said)
    host.meet()
    assert host.hear("ready")["fork"] == hosts.FORK


def test_the_reader_does_not_wait_for_hooks(host: hosts.Host, steps: hosts.Steps) -> None:
    steps.hooks_may_end.clear()
    host.meet()
    host.say(prefork())
    hosts.until(lambda: steps.events() == ["prefork"])
    request = host.agent.begin("info", {})
    assert host.hear("request")["id"] == request.id
    host.say({"type": "answer", "id": request.id, "result": {"limit": 1}})
    assert answer(request) == {"result": {"limit": 1}}


def become(host: hosts.Host, **more: Any) -> protocol.Message:
    """Fork the guest: its agent finds itself at another host, and is told so."""
    host.replace()
    host.say(hosts.you_are_a_clone(**more))
    host.hear("hello")
    return host.hear("self")


def test_becoming_a_clone(host: hosts.Host, steps: hosts.Steps) -> None:
    host.meet()
    host.say(prefork(interfaces=[{"mac": "as of the fork"}]))
    host.hear("ready")
    steps.calls.clear()
    said = become(host, network="agent")
    assert said == {
        **{"type": "self", "fork": hosts.FORK, "problems": []},
        **{"reseeded": True, "configured": True},
    }
    assert steps.names()[:5] == ["clock", "reseed", "configure", "hostname", "machine_id"]
    host.silent()
    assert "announce" not in steps.names()
    host.say({"type": "online"})
    assert host.hear("done") == {"type": "done", "fork": hosts.FORK, "problems": []}
    interfaces = hosts.you_are_a_clone()["interfaces"]
    told = {
        "event": "clone",
        "fork": hosts.FORK,
        "clone_id": 3,
        "parent": hosts.PARENT,
        "server": hosts.CLONE,
        "error": None,
        "params": {"n": "1"},
    }
    assert steps.calls == [
        ("clock", 1.8e9),
        ("reseed", hosts.ENTROPY),
        ("configure", [{"mac": "as of the fork"}], interfaces),
        ("hostname", "a-name"),
        ("machine_id", hosts.CLONE),
        ("announce", interfaces),
        ("hooks", told, steps.hook_seconds),
        ("ssh_host_keys",),
    ]


def test_a_clone_that_has_its_parents_macs_still(host: hosts.Host, steps: hosts.Steps) -> None:
    """Or whose agent was started anew when it had only begun."""
    steps.failing["missing"] = ""
    host.meet()
    said = become(host, network="agent")
    assert said["configured"] is False
    assert said["problems"] == ["it is missing"]


def test_agent_that_knows_of_nothing_but_the_fork(host: hosts.Host, steps: hosts.Steps) -> None:
    """It was started just before, and its host took it for the one that it had heard."""
    host.connect()
    host.hear("hello")
    host.say(prefork(interfaces=[{"mac": "as of the fork"}]))
    host.hear("ready")
    said = become(host, network="agent")
    assert said["configured"] is True
    assert "configure" in steps.names()


def test_a_clone_whose_network_is_not_the_agents(host: hosts.Host, steps: hosts.Steps) -> None:
    host.meet()
    become(host)
    host.hear("done")
    assert steps.names() == [
        "clock",
        "reseed",
        "hostname",
        "machine_id",
        "hooks",
        "ssh_host_keys",
    ]


def which(problem: str) -> str:
    """The step that failed, of a sentence about it."""
    return problem.rpartition("<")[2].partition(">")[0]


def test_every_step_fails(host: hosts.Host, steps: hosts.Steps) -> None:
    names = ("clock", "reseed", "configure", "hostname", "machine_id", "hooks", "ssh_host_keys")
    steps.failing = {name: f"<{name}>" for name in names}
    host.meet()
    request = host.agent.begin("clone", {"ticket": "t"})
    host.hear("request")
    said = become(host, network="agent", request=request.id)
    assert said["reseeded"] is False
    assert [which(problem) for problem in said["problems"]] == list(names[:5])
    done = host.hear("done")
    assert [which(problem) for problem in done["problems"]] == list(names)
    assert all(problem.endswith(".") for problem in done["problems"])
    assert answer(request) == {"result": {"clone_id": 3}}


@pytest.mark.parametrize("entropy", [None, "", 5, "!"])
def test_no_entropy(host: hosts.Host, steps: hosts.Steps, entropy: Any) -> None:
    steps.failing = {"reseed": "too little"}
    host.meet()
    said = become(host, entropy=entropy)
    assert said["reseeded"] is False
    assert len(said["problems"]) == 1
    host.hear("done")


def test_no_link() -> None:
    host = hosts.Host(online_seconds=0.05)
    host.meet()
    become(host, network="agent")
    (problem,) = host.hear("done")["problems"]
    assert "link" in problem
    assert "announce" in host.steps.names()
    host.close()


def test_a_clone_that_is_told_again(host: hosts.Host, steps: hosts.Steps) -> None:
    host.meet()
    steps.hooks_may_end.clear()
    become(host)
    hosts.until(lambda: "hooks" in steps.names())
    host.disconnect()
    host.meet(hosts.you_are_a_clone())
    host.hear("self")
    host.silent()
    steps.hooks_may_end.set()
    host.hear("done")
    calls = list(steps.calls)
    host.disconnect()
    host.meet(hosts.you_are_a_clone())
    host.hear("self")
    host.hear("done")
    assert steps.calls == calls


def test_a_host_that_answers_the_hello_after_you(host: hosts.Host) -> None:
    host.meet()
    become(host)
    host.hear("done")
    host.say(hosts.you_are_a_clone())
    host.hear("self")
    host.hear("done")
    host.silent()


def test_you_without_hello(host: hosts.Host) -> None:
    """A host that came so soon after another that the agent saw none of it."""
    host.meet()
    request = host.agent.begin("info", {})
    host.hear("request")
    host.replace()
    host.say(hosts.you())
    host.hear("hello")
    assert host.hear("request")["id"] == request.id
    host.say(hosts.you())
    host.hear("request")
    host.agent.forget(request)
    host.silent()


def test_forked_between_hello_and_its_answer(host: hosts.Host) -> None:
    host.meet()
    host.disconnect()
    host.connect()
    host.hear("hello")
    host.replace()
    host.say(hosts.you_are_a_clone())
    host.hear("hello")
    host.hear("self")
    host.hear("done")


def test_programs_in_a_clone(host: hosts.Host, steps: hosts.Steps) -> None:
    host.meet()
    asked = host.agent.begin("checkpoint_parent", {})
    other = host.agent.begin("join", {"ticket": "t"})
    for _ in range(2):
        host.hear("request")
    steps.hooks_may_end.clear()
    become(host, request=asked.id)
    hosts.until(lambda: "hooks" in steps.names())
    assert not is_answered(asked)
    assert not is_answered(other)
    # What is asked from now on is the clone's.
    later = host.agent.begin("info", {})
    assert host.hear("request")["id"] == later.id
    steps.hooks_may_end.set()
    host.hear("done")
    assert answer(asked) == {"result": {"clone_id": 3, "checkpoint": hosts.FORK}}
    error = answer(other)["error"]
    assert error["kind"] == "forked"
    assert not is_answered(later)
    host.say({"type": "answer", "id": later.id, "result": {}})
    assert answer(later) == {"result": {}}


def test_a_clone_that_is_forked_while_it_becomes_one(host: hosts.Host, steps: hosts.Steps) -> None:
    host.meet()
    asked = host.agent.begin("clone", {"ticket": "t"})
    host.hear("request")
    steps.hooks_may_end.clear()
    become(host, request=asked.id)
    hosts.until(lambda: "hooks" in steps.names())
    host.replace()
    host.say(
        hosts.you_are_a_clone(
            server=hosts.GRANDCHILD, fork=hosts.FORK_2, parent=hosts.CLONE, clone_id=1
        )
    )
    host.hear("hello")
    assert host.hear("self")["fork"] == hosts.FORK_2
    steps.hooks_may_end.set()
    assert host.hear("done")["fork"] == hosts.FORK_2
    assert answer(asked)["error"]["kind"] == "forked"
    configured = [call[1] for call in steps.calls if call[0] == "machine_id"]
    assert configured == [hosts.CLONE, hosts.GRANDCHILD]


def test_a_hook_of_the_parent_does_not_keep_a_clone(host: hosts.Host, steps: hosts.Steps) -> None:
    host.meet()
    steps.hooks_may_end.clear()
    host.say(prefork())
    hosts.until(lambda: steps.events() == ["prefork"])
    become(host)
    steps.hooks_may_end.set()
    assert host.hear("done")["problems"] == []
    assert steps.events() == ["prefork", "clone"]


def test_a_clone_that_is_a_parent(host: hosts.Host, steps: hosts.Steps) -> None:
    host.meet()
    become(host)
    host.hear("done")
    host.say(prefork(hosts.FORK_2))
    host.hear("ready")
    host.say(parent(hosts.FORK_2))
    host.hear("done")
    host.disconnect()
    host.meet(hosts.you_are_a_clone())
    said = [host.hear(kind)["fork"] for kind in ("self", "done", "done")]
    assert said == [hosts.FORK, hosts.FORK, hosts.FORK_2]


def test_an_agent_that_starts_in_a_clone(host: hosts.Host, steps: hosts.Steps) -> None:
    """The clone has booted since: what it is, it is already."""
    host.meet(hosts.you_are_a_clone())
    assert host.hear("self")["reseeded"] is True
    host.hear("done")
    assert steps.names() == ["reseed"]


def test_requests(host: hosts.Host) -> None:
    host.meet()
    first = host.agent.begin("request_ticket", {"n": 2})
    second = host.agent.begin("info", {})
    message = host.hear("request")
    assert message == {
        "type": "request",
        "id": first.id,
        "call": "request_ticket",
        "arguments": {"n": 2},
    }
    assert len(first.id) <= 64
    assert host.hear("request")["id"] == second.id != first.id
    host.say({"type": "answer", "id": second.id, "error": {"kind": "refused", "message": "no"}})
    assert answer(second) == {"error": {"kind": "refused", "message": "no"}}
    assert not is_answered(first)
    host.disconnect()
    third = host.agent.begin("info", {})
    host.connect()
    host.hear("hello")
    fourth = host.agent.begin("info", {})
    host.agent.forget(third)
    host.say(hosts.you())
    assert [host.hear("request")["id"] for _ in range(2)] == [first.id, fourth.id]
    host.say({"type": "answer", "id": third.id, "result": {}})
    host.say({"type": "answer", "id": first.id, "result": {"ticket": "t", "n": 2}})
    assert answer(first) == {"result": {"ticket": "t", "n": 2}}
    host.say({"type": "answer", "id": fourth.id})
    assert answer(fourth)["error"]["kind"] == "failed"


def part(request: pending.Request, clone_id: int, offset: int, data: bytes) -> protocol.Message:
    return {
        "type": "part",
        "id": request.id,
        "clone_id": clone_id,
        "offset": offset,
        "data": base64.b64encode(data).decode(),
    }


def joined(*sizes: int) -> dict[str, Any]:
    return {
        "clones": [
            {"clone_id": number, "status": 0, "error": None, "size": size}
            for number, size in enumerate(sizes, 1)
        ]
    }


def test_join(host: hosts.Host) -> None:
    big = os.urandom(100_000)
    host.meet()
    request = host.agent.begin("join", {"ticket": "t"})
    host.hear("request")
    host.say(part(request, 1, 0, b"cut off"), part(request, 3, 0, big[: 32 << 10]))
    host.silent()
    host.disconnect()
    host.meet()
    host.hear("request")
    host.say(part(request, 1, 0, b"one"))
    for offset in range(0, len(big), 32 << 10):
        host.say(part(request, 3, offset, big[offset : offset + (32 << 10)]))
    host.say({"type": "answer", "id": request.id, "result": joined(3, 0, len(big))})
    clones = answer(request)["result"]["clones"]
    assert [base64.b64decode(clone["result"]) for clone in clones] == [b"one", b"", big]
    assert clones[0]["status"] == 0


def test_a_join_that_misses_a_piece(host: hosts.Host) -> None:
    host.meet()
    request = host.agent.begin("join", {"ticket": "t"})
    host.hear("request")
    host.say(part(request, 1, 5, b"later"))
    host.say({"type": "answer", "id": request.id, "result": joined(10)})
    assert answer(request)["error"]["kind"] == "failed"


def test_no_host() -> None:
    host = hosts.Host(offline_seconds=0.05)
    assert host.agent.call("info", {})["error"]["kind"] == "offline"
    host.connect()
    host.hear("hello")
    assert host.agent.call("info", {})["error"]["kind"] == "offline"
    host.say(hosts.you())
    host.silent()
    host.disconnect()
    # It knows of forks, and will be back.
    request = host.agent.begin("info", {})
    assert not select.select([request], [], [], 0.2)[0]
    host.close()


def test_what_is_not_asked(host: hosts.Host) -> None:
    host.meet()
    reply = host.agent.call("put", {"offset": 0, "data": "x" * protocol.MAX_LINE})
    assert reply["error"]["kind"] == "invalid"
    descriptors = len(os.listdir("/proc/self/fd"))
    requests = [host.agent.begin("info", {}) for _ in range(pending.LIMIT)]
    assert host.agent.call("info", {})["error"]["kind"] == "busy"
    for request in requests:
        host.hear("request")
        host.agent.forget(request)
    host.silent()
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_host_that_does_not_read_keeps_nobody(host: hosts.Host, steps: hosts.Steps) -> None:
    """What cannot be sent now waits, and the agent listens on."""
    host.meet()
    data = "x" * 60000
    requests = [host.agent.begin("put", {"offset": 0, "data": data}) for _ in range(30)]
    host.say(prefork())
    hosts.until(lambda: steps.events() == ["prefork"])
    for request in requests:
        assert host.hear("request")["id"] == request.id
    host.hear("ready")


class Pty:
    """A port that is made anew when its host goes away."""

    def __init__(self) -> None:
        self.host = self.guest = -1
        self.arrivals = threading.Semaphore(0)
        self.received: list[protocol.Message] = []
        self.port = port.Port(
            self.open,
            self.arrivals.release,
            self.received.append,
            look_again=0.002,
            open_again=0.002,
        )

    def open(self) -> int:
        if self.guest < 0:
            raise FileNotFoundError("no port yet")
        fd, self.guest = self.guest, -1
        return fd

    def plug(self) -> None:
        self.host, guest = os.openpty()
        os.set_blocking(guest, False)
        self.guest = guest


def test_a_port_that_comes_late_and_is_replaced() -> None:
    pty = Pty()
    thread = threading.Thread(target=pty.port.run)
    thread.start()
    try:
        for number in range(3):
            pty.plug()
            assert pty.arrivals.acquire(timeout=hosts.TIMEOUT)
            os.write(pty.host, b'{"type":"x"}\n{"type"')
            hosts.until(lambda expected=number + 1: len(pty.received) == expected)  # type: ignore[misc]
            os.close(pty.host)
    finally:
        pty.port.stop()
        thread.join(hosts.TIMEOUT)
    assert pty.received == [{"type": "x"}] * 3


@pytest.mark.skipif(os.getuid() != 0, reason="mount namespaces are for root")
def test_in_the_foreground() -> None:
    """As a process, away from this machine's own files: it says hello, and SIGTERM ends it."""
    host, guest = os.openpty()
    script = (
        "mount -t tmpfs none /etc && mount -t tmpfs none /run && mkdir /etc/snowflock && "
        f"printf '[guest]\\nport = {os.ttyname(guest)}\\n' >/etc/snowflock/guest.conf && "
        f"exec {sys.executable} -m nova_snowflock.guest"
    )
    with subprocess.Popen(("unshare", "--mount", "sh", "-c", script)) as process:
        try:
            lines = protocol.Lines()
            heard: list[protocol.Message] = []
            while not heard:
                assert select.select([host], [], [], 30)[0], "it said nothing"
                heard += lines.feed(os.read(host, 4096))
            assert heard[0] == {"type": "hello", "version": 1, "agent": guest_agent.VERSION}
            path = f"/proc/{process.pid}/root/run/snowflock/guest.sock"
            assert stat.S_IMODE(os.stat(path).st_mode) == 0o660
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()
    os.close(host)
    os.close(guest)


def test_imports_are_light() -> None:
    script = (
        "import sys, json, nova_snowflock.guest.__main__; print(json.dumps(sorted(sys.modules)))"
    )
    out = subprocess.run((sys.executable, "-S", "-c", script), check=True, stdout=subprocess.PIPE)
    heavy = {
        "asyncio",
        "hashlib",
        "ssl",
        "email",
        "http",
        "urllib",
        "multiprocessing",
        "concurrent",
    }
    assert not heavy & set(json.loads(out.stdout))
