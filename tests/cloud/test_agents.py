# SPDX-License-Identifier: Apache-2.0
"""Servers with an agent: clones that take their own addresses, and programs that fork."""

from collections.abc import Iterator
import contextlib
import json
import secrets
from typing import Any

import pytest

from devstack.embedded import hosts
from devstack.embedded import identity
from nova_snowflock.guest import protocol
from tests.cloud import agents
from tests.cloud import family
from tests.cloud import senders
from tests.cloud import test_network

pytestmark = pytest.mark.usefixtures("cloud")


@pytest.fixture(autouse=True, scope="module")
def nothing_remains(cloud: None) -> Iterator[None]:
    with family.nothing_left():
        yield


@pytest.fixture(scope="module")
def parent(nothing_remains: None) -> Iterator[str]:
    """A server whose programs may have three clones."""
    with agents.parent(3) as server:
        yield server


def test_clones_take_their_own_addresses() -> None:
    """In the interfaces that they have, and before anything is heard of them."""
    with agents.parent(networks=family.on("public", "private")) as parent:
        ports = family.ports(parent)
        theirs = {port.mac_address for port in ports}
        theirs |= {ip["ip_address"] for port in ports for ip in port.fixed_ips}
        family.wait_until(lambda: test_network.is_itself(parent), 60)
        with (
            family.scheduled_on("host2", "host3"),
            senders.watched("host2", "host3") as seen,
            family.forked(parent, count=2, params={"job": "7"}) as fork,
        ):
            clones = family.clones_of(fork)
            for clone in clones:
                assert family.answers_ping(family.address(clone))
                # Its DHCP clients may just be asking.
                family.wait_until(lambda clone=clone: test_network.is_itself(clone), 30)  # type: ignore[misc]
                family.wait_until(lambda clone=clone: _name(clone) != "(none)", 30)  # type: ignore[misc]
            names = [_name(clone) for clone in clones]
            assert names == [family.compute().get_server(clone).hostname for clone in clones]
            assert len({*names, _name(parent)}) == 3
            assert len({_random(server) for server in (parent, *clones)}) == 3
            assert family.answers_ping(family.address(parent), 1)
            assert test_network.is_itself(parent)
            [clone, _] = clones
            shown = family.compute().get_server(clone).metadata
            assert shown["snowflock:clone_id"] == "1"
            assert shown["snowflock:parent"] == parent
            assert shown["snowflock:param:job"] == "7"
            # It is an ordinary server after that.
            family.compute().reboot_server(clone, "HARD")
            family.wait_for(clone)
            family.wait_until(lambda: test_network.is_itself(clone), 60)
        assert not theirs & seen


def _name(server: str) -> str:
    with family.talk(server) as guest:
        return agents.shell(guest, "hostname").strip()


def _random(server: str) -> str:
    with family.talk(server) as guest:
        return agents.shell(guest, "head -c 16 /dev/urandom | od -An -tx1")


def test_dhcp_clients_ask_anew() -> None:
    """They have their clones' leases, to renew."""
    with agents.parent(networks=family.on("public")) as parent:
        family.wait_until(lambda: test_network.is_itself(parent), 60)
        client = _dhcp_client(parent)
        with family.forked(parent) as fork:
            [clone] = family.clones_of(fork)
            family.wait_until(lambda: _dhcp_client(clone) not in ("", client), 30)
            family.wait_until(lambda: test_network.is_itself(clone), 30)
            with family.talk(clone) as guest:
                agents.shell(guest, f"kill -USR1 {_dhcp_client(clone)}; sleep 2")
            assert test_network.is_itself(clone)
            assert family.answers_ping(family.address(clone))
        assert _dhcp_client(parent) == client


def _dhcp_client(server: str) -> str:
    """Its PID, if it is there."""
    with family.talk(server) as guest:
        return agents.shell(guest, "pidof udhcpc || true").strip()


def test_interfaces_that_came_and_went() -> None:
    """Of a parent that runs: its clones have those that it has when it is forked."""
    compute = family.compute()
    with agents.parent(networks=family.on("public")) as parent:
        [network] = family.on("private")
        added = compute.create_server_interface(parent, net_id=network["uuid"])
        for _ in range(2):
            family.wait_until(lambda: test_network.is_itself(parent), 60)
            with family.forked(parent) as fork:
                [clone] = family.clones_of(fork)
                family.wait_until(lambda clone=clone: test_network.is_itself(clone), 30)  # type: ignore[misc]
                assert len(family.ports(clone)) == len(family.ports(parent))
                assert family.answers_ping(family.address(clone))
                with family.talk(clone) as guest:
                    assert clone in agents.shell(guest, "snowflock info")
            compute.delete_server_interface(added.port_id, server=parent, ignore_missing=True)
            family.wait_until(lambda: len(family.ports(parent)) == 1, 60)


def test_network_without_dhcp() -> None:
    """The host tells the agent what nobody else does."""
    with (
        test_network.network(enable_dhcp=False) as name,
        agents.parent(networks=family.on(name)) as parent,
    ):
        with family.talk(parent) as guest:
            agents.shell(guest, f"ip address add {family.address(parent, name)}/24 dev eth0")
        with family.forked(parent) as fork:
            [clone] = family.clones_of(fork)
            family.wait_until(lambda: test_network.is_itself(clone), 30)
            with family.talk(clone) as guest:
                assert guest.call("reaches", address=family.address(parent, name))


def test_network_that_is_gone() -> None:
    with test_network.network() as name:
        [gone] = family.on(name)
    with agents.parent(networks=family.on("private")) as server:
        body = {"fork": {"networks": [gone]}}
        status, message = family.refusal("POST", f"/servers/{server}/action", body)
        assert status == 400
        assert gone["uuid"] in message
        assert family.captures(server) == 0


def test_agent_that_is_asked_for_and_is_not_there() -> None:
    admin = family.compute("admin")
    flavor = admin.create_flavor(name=f"agent-{secrets.token_hex(2)}", ram=256, vcpus=1, disk=1)
    try:
        admin.create_flavor_extra_specs(flavor, {"snowflock:identity": "agent"})
        with family.server("no-agent", flavor.name) as server:
            body: dict[str, Any] = {"fork": {}}
            status, message = family.refusal("POST", f"/servers/{server}/action", body)
            assert status == 409
            assert "no agent in its guest answers" in message
    finally:
        admin.delete_flavor(flavor)


def test_hooks(parent: str) -> None:
    """Of the parent before and after, and of the clone; each with what it has to do with."""
    with family.talk(parent) as guest:
        for event in ("prefork", "parent", "clone"):
            agents.shell(
                guest,
                f"mkdir -p /etc/snowflock/{event}.d; f=/etc/snowflock/{event}.d/note;"
                f"printf '#!/bin/sh\\ncat >>/run/hooks; echo >>/run/hooks\\n' >$f; chmod 755 $f",
            )
    with _cleaned(parent), family.forked(parent, params={"job": "7"}) as fork:
        [clone] = family.clones_of(fork)
        before = [{"event": "prefork", "clone_id": 0, "server": parent}]
        after = {
            parent: [*before, {"event": "parent", "clone_id": 0, "server": parent}],
            clone: [*before, {"event": "clone", "clone_id": 1, "server": clone}],
        }
        for server, told in after.items():
            family.wait_until(lambda server=server: len(_hooked(server)) >= 2, 30)  # type: ignore[misc]
            found = _hooked(server)
            assert [{key: one[key] for key in told[0]} for one in found] == told
            assert all(one["fork"] == fork["id"] for one in found)
            assert all(one["params"] == {"job": "7"} for one in found)
        assert family.show(parent, fork["id"])["problems"] == []


@contextlib.contextmanager
def _cleaned(server: str) -> Iterator[None]:
    """A server has no hooks any more afterwards."""
    try:
        yield
    finally:
        with family.talk(server) as guest:
            agents.shell(guest, "rm -rf /etc/snowflock /run/hooks")


def _hooked(server: str) -> list[dict[str, Any]]:
    with family.talk(server) as guest:
        lines = agents.shell(guest, "cat /run/hooks").splitlines()
    return [json.loads(line) for line in lines if line]


def test_guest_that_is_never_ready(parent: str) -> None:
    """It is forked all the same, and the fork says so."""
    with family.talk(parent) as guest:
        hook = "/etc/snowflock/prefork.d/hang"
        agents.shell(guest, f"mkdir -p {hook.rpartition('/')[0]}")
        agents.shell(guest, f"printf '#!/bin/sh\\nsleep 1000\\n' >{hook}; chmod 755 {hook}")
    with _cleaned(parent), family.runs_on(parent), family.forked(parent) as fork:
        [problem] = family.show(parent, fork["id"])["problems"]
        assert "hang" in problem


def test_agent_that_hangs(parent: str) -> None:
    with family.talk(parent) as guest:
        agents.shell(guest, f"kill -STOP $(cat {agents.PID})")
    try:
        with family.forked(parent, count=0, checkpoint=True) as fork:
            [problem] = family.show(parent, fork["id"])["problems"]
            assert "not ready within" in problem
    finally:
        with family.talk(parent) as guest:
            agents.shell(guest, f"kill -CONT $(cat {agents.PID})")


NOISE = f"""
import os, random, time
name = next(
    f"/dev/{{port}}"
    for port in os.listdir("/sys/class/virtio-ports")
    if open(f"/sys/class/virtio-ports/{{port}}/name").read().strip() == "{protocol.PORT}"
)
port = os.open(name, os.O_RDWR)
source = random.Random(1)
kinds = ["hello", "ready", "self", "done", "request", "x"]
for number in range(300):
    line = source.choice([
        source.randbytes(source.randrange(5000)),
        b"x" * 200000 if number % 50 == 0 else b"",
        b'{{"type":"%s","id":%d,"fork":[],"problems":{{}},"arguments":7}}'
        % (source.choice(kinds).encode(), number),
        b'{{"type":"request","id":"%d","call":"%s","arguments":{{"ticket":"../../x","n":1e99}}}}'
        % (number, source.choice(["join", "kill", "request_ticket", "_find", "x"]).encode()),
        b"[" * 5000,
    ])
    os.write(port, line + b"\\n")
print("enough")
time.sleep(1000)
"""


def test_agent_that_lies() -> None:
    """Only its own server has to do with what it says."""
    with (
        agents.parent(1) as honest,
        family.placed("liar", "host1", metadata={"snowflock:guest_fork_max": "1"}) as liar,
    ):
        noise = agents.Program(liar, NOISE)
        family.wait_until(lambda: "enough" in noise.said(), 120)
        with family.forked(liar, count=0, checkpoint=True) as fork:
            assert family.show(liar, fork["id"])["problems"]
        assert agents.Program(honest, "print(guest.request_ticket(1).n)").ended() == ["1"]


def test_program_in_clones(parent: str) -> None:
    """Results of any size, a status each, and clones are gone when they have been joined."""
    program = agents.Program(
        parent,
        """
ticket = guest.request_ticket(9)
print(ticket.n)
number = guest.clone(ticket, {"job": "7"})
if number:
    guest.exit(number, guest.info().params["job"].encode() * 40000 * number)
for joined in guest.join(ticket):
    print(joined.clone_id, joined.status, joined.error, len(joined.result), set(joined.result))
for again in (lambda: guest.clone(ticket), lambda: guest.join(ticket), guest.exit):
    try:
        again()
    except guest.Invalid as error:
        print(error)
""",
    )
    said = program.ended()
    assert said[0] == "3"
    assert said[1:4] == [f"{n} {n} None {40000 * n} {{{ord('7')}}}" for n in (1, 2, 3)]
    assert "has been used" in said[4]
    assert "no clones" in said[5]
    assert "not a clone" in said[6]
    _wait_until_alone(parent)


def _wait_until_alone(parent: str) -> None:
    family.wait_until(lambda: not family.clones_known(parent), 60)


def test_map(parent: str) -> None:
    program = agents.Program(
        parent,
        """
from nova_snowflock.guest import workers
data = list(range(1000))
def work(item):
    if item == 5:
        raise ValueError("five")
    return item, sum(data)
print(workers.map(work, range(5), 2))
try:
    workers.map(work, [5], 1)
except workers.WorkerError as error:
    print(str(error).splitlines()[-1])
""",
    )
    assert program.ended() == [str([(n, 499500) for n in range(5)]), "ValueError: five"]
    _wait_until_alone(parent)


def test_checkpoint(parent: str) -> None:
    program = agents.Program(
        parent,
        """
kept = guest.checkpoint_parent()
if kept.clone_id:
    guest.exit(7, b"clone %d" % kept.clone_id)
for _ in range(2):
    ticket = guest.request_ticket(1)
    guest.create_clones(kept, ticket)
    print([(one.clone_id, one.status, one.result) for one in guest.join(ticket)])
try:
    guest.create_clones(ticket.id, guest.request_ticket(1))
except guest.Invalid as error:
    print(error)
while True:
    try:
        guest.release(kept)
        break
    except guest.Failed:
        guest.client.time.sleep(1)
for held in guest.info().tickets:
    guest.kill(held.ticket)
""",
    )
    said = program.ended()
    assert said[:2] == ["[(1, 7, b'clone 1')]", "[(2, 7, b'clone 2')]"]
    assert "There is no checkpoint" in said[2]
    _wait_until_alone(parent)


def test_clone_that_its_owner_deletes(parent: str) -> None:
    """It counts as exited, with an error; and one that is killed is gone."""
    program = agents.Program(
        parent,
        """
import time
ticket = guest.request_ticket(1)
if guest.clone(ticket):
    time.sleep(1000)
print("cloned")
print([(one.status, one.error) for one in guest.join(ticket)])
ticket = guest.request_ticket(1)
if guest.clone(ticket):
    time.sleep(1000)
guest.kill(ticket)
print(guest.info().tickets)
""",
    )
    family.wait_until(lambda: "cloned" in program.said(), 60)
    [clone] = family.clones_known(parent)
    family.wait_for_status(clone)
    family.delete(clone)
    said = program.ended()
    assert said[1] == "[(None, 'Its server is DELETED, and it has not exited')]"
    assert said[2] == "()"
    _wait_until_alone(parent)


@pytest.mark.parametrize("when", ["asks", "cloned"])
def test_host_that_is_restarted_meanwhile(parent: str, when: str) -> None:
    """Whoever waits for an answer gets it, once."""
    program = agents.Program(
        parent,
        """
import time
ticket = guest.request_ticket(2)
print("asks")
if guest.clone(ticket):
    time.sleep(5)
    guest.exit(3)
print("cloned")
print([(one.clone_id, one.status) for one in guest.join(ticket)])
""",
    )
    family.wait_until(lambda: when in program.said(), 60)
    compute = hosts.nova_compute("host1")
    family.kill(compute)
    family.start(compute)
    assert program.ended()[-1] == "[(1, 3), (2, 3)]"
    _wait_until_alone(parent)


def test_programs_that_may_not() -> None:
    """Unless the owner has allowed it, and within the quota."""
    ask = """
try:
    print(guest.request_ticket(2).n)
except guest.Refused as error:
    print(error)
"""
    with agents.parent(networks="none") as server:
        [said] = agents.Program(server, ask).ended()
        assert "owner has not allowed it" in said
        compute = family.compute()
        compute.set_server_metadata(server, **{"snowflock:guest_fork_max": "5"})
        used = len(list(compute.servers()))
        project = identity.client().identity.find_project("demo").id
        quota = identity.client().compute
        for room, answer in ((1, "1"), (0, "quota")):
            quota.update_quota_set(project, instances=used + room)
            try:
                [said] = agents.Program(server, ask).ended()
            finally:
                quota.revert_quota_set(project)
            assert answer in said
