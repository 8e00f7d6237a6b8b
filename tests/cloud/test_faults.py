# SPDX-License-Identifier: Apache-2.0
"""What ends or fails in the middle of a fork on a real cloud: no parent notices, and nothing stays.

A fork is held at a place by what it waits for there, all of it from outside: a lock, a service or a
process that is stopped, a link that is down.
"""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import glob
import json
import os
import pathlib
import secrets
import shutil
import signal
import subprocess
import time
from typing import Any
import uuid

import libvirt
import pytest

from devstack.embedded import configuration
from devstack.embedded import database
from devstack.embedded import hosts
from devstack.embedded import identity
from devstack.embedded import image
from devstack.embedded import messaging
from devstack.embedded import openstack
from devstack.embedded import processes
from devstack.embedded import settings
from nova_snowflock.memtap import process as data_plane
from tests import engine
from tests.cloud import family

pytestmark = pytest.mark.usefixtures("cloud")

Gate = Callable[[], bool]
"""Waits until a fork is held; whether it is."""


@pytest.fixture(scope="module")
def parents(cloud: None) -> Iterator[dict[str, str]]:
    """A parent on each host, by the host's name. They run on, whatever the tests do."""
    compute = family.compute()
    group = compute.create_server_group(
        name=f"faults-{secrets.token_hex(2)}", policy="anti-affinity"
    )
    hints = {"group": group.id}
    booted = [family.create(f"faults-{host}", scheduler_hints=hints) for host in settings.HOSTS]
    try:
        for server in booted:
            family.wait_for(server)
        with contextlib.ExitStack() as stack:
            for server in booted:
                stack.enter_context(family.runs_on(server))
            yield {family.host_of(server): server for server in booted}
    finally:
        family.delete(*booted)
        compute.delete_server_group(group)


@pytest.fixture(autouse=True)
def nothing_remains(parents: dict[str, str]) -> Iterator[None]:
    """Whatever happens, the parents answer, and nothing else is there after a sweep."""
    with family.nothing_left():
        yield
        with futures.ThreadPoolExecutor() as pool:
            list(pool.map(answers, parents.values()))


def answers(parent: str) -> None:
    with family.talk(parent) as guest:
        guest.call("tick")
    family.wait_until(lambda: state_of(parent) is None, 90)


def ask(parent: str, **arguments: Any) -> tuple[int, str]:
    """The status and text of the answer to a fork, whatever it is."""
    answer = family.compute().request(
        f"/servers/{parent}/action", "POST", json={"fork": {"count": 1, **arguments}}
    )
    return answer.status_code, answer.text


def state_of(server: str) -> str | None:
    found = family.compute("admin").get_server(server)
    return str(found.task_state) if found.task_state else None


def privileged(host: str) -> int:
    """The process that has root for nova-compute on a host, as seen from here."""
    [found] = [
        pid
        for pid in hosts.nova_compute(host).processes()
        if b"nova_snowflock.virt.privileged.context"
        in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return found


# Where forks are held


@contextlib.contextmanager
def before_the_pause(host: str, parent: str) -> Iterator[Gate]:
    """Somebody else works on the parent's disks."""
    path = f"/var/lib/nova-snowflock/{parent}.lock"
    holder = hosts.attach(host).popen(
        ["flock", path, "sh", "-c", "echo; cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    file = hosts.attach(host).path(path)

    def is_waited_for() -> bool:
        family.wait_until(lambda: file.read_bytes() != b"", 30)
        return True

    try:
        yield is_waited_for
    finally:
        holder.communicate()


@contextlib.contextmanager
def inside_the_pause(host: str, parent: str) -> Iterator[Gate]:
    """QEMU does not answer."""
    name = family.compute("admin").get_server(parent).instance_name
    with _stopped_by(host, stop_guest, name) as gate:
        yield gate


@contextlib.contextmanager
def after_the_pause(host: str, parent: str) -> Iterator[Gate]:
    """The memory server does not answer."""
    with _stopped_by(host, stop_memory_server) as gate:
        yield gate


@contextlib.contextmanager
def _stopped_by(host: str, function: Callable[..., int], *arguments: str) -> Iterator[Gate]:
    machine = hosts.attach(host)
    stopping = machine.submit(function, *arguments)
    try:
        yield lambda: bool(stopping.result())
    finally:
        machine.run(go_on, stopping.result())


def stop_guest(name: str) -> int:
    pid = engine.qemu_pid(name)
    with at_once():
        pause = when_there("/run/nova-snowflock/*/stopped")
        os.kill(pid, signal.SIGSTOP)
    assert os.path.exists(pause), "too late: the pause is over"
    return pid


def stop_memory_server() -> int:
    with at_once():
        directory = os.path.dirname(when_there("/run/nova-snowflock/*/stopped"))
        server = data_plane.find_memory_server(directory)
        assert server is not None
        pid = server.peer()
        os.kill(pid, signal.SIGSTOP)
    return pid


def go_on(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Nothing else has the processor first."""
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def when_there(pattern: str) -> str:
    deadline = time.monotonic() + 60
    while not (found := glob.glob(pattern)):
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.0005)
    return found[0]


# nova-compute and its privileged process on the parent's host


def test_compute_service_is_killed_while_its_server_is_captured(parents: dict[str, str]) -> None:
    gates = (before_the_pause, inside_the_pause, after_the_pause)
    with futures.ThreadPoolExecutor() as pool:
        ends = [
            pool.submit(cut_short, host, parents[host], gate)
            for host, gate in zip(settings.HOSTS, gates, strict=True)
        ]
        for end in ends:
            status, text = end.result()
            assert status == 409, text
            assert "is down" in text


def cut_short(host: str, parent: str, gate: Any) -> tuple[int, str]:
    """What the user is told whose fork is held at the gate, and its host's service killed there."""
    service = hosts.nova_compute(host)
    with futures.ThreadPoolExecutor() as pool:
        with gate(host, parent) as held:
            asked = pool.submit(ask, parent)
            held()
            family.kill(service)
            if gate is not inside_the_pause:
                family.start(service)
        family.start(service)
        return asked.result()


def test_compute_service_and_its_privileged_process_are_killed(parents: dict[str, str]) -> None:
    """Together, as a service manager does; the privileged process alone; and nova-compute when all
    is done, but not told."""
    with futures.ThreadPoolExecutor() as pool:
        both, one, late = settings.HOSTS
        ends = [
            pool.submit(kill_both, both, parents[both]),
            pool.submit(kill_privileged, one, parents[one]),
            pool.submit(kill_when_recorded, late, parents[late]),
        ]
        told = [end.result() for end in ends]
    assert [status for status, _ in told] == [409] * 3, told
    assert "You may try again" in told[1][1]


def kill_both(host: str, parent: str) -> tuple[int, str]:
    service = hosts.nova_compute(host)
    with futures.ThreadPoolExecutor() as pool:
        with inside_the_pause(host, parent) as held:
            asked = pool.submit(ask, parent)
            held()
            os.kill(privileged(host), signal.SIGKILL)
            family.kill(service)
        # Nobody is there who would have the guest run again.
        family.wait_until(lambda: hosts.attach(host).run(is_paused, parent), 30)
        family.start(service)
        return asked.result()


def is_paused(server: str) -> bool:
    with libvirt.open("qemu:///system") as connection:
        state, _ = connection.lookupByUUIDString(server).state()
    return bool(state == libvirt.VIR_DOMAIN_PAUSED)


def kill_privileged(host: str, parent: str) -> tuple[int, str]:
    with futures.ThreadPoolExecutor() as pool:
        with inside_the_pause(host, parent) as held:
            asked = pool.submit(ask, parent)
            held()
            os.kill(privileged(host), signal.SIGKILL)
        answer = asked.result()
        # At once, not with the next sweep.
        assert not hosts.attach(host).run(is_paused, parent)
        return answer


def kill_when_recorded(host: str, parent: str) -> tuple[int, str]:
    service = hosts.nova_compute(host)
    with futures.ThreadPoolExecutor() as pool:
        asked = pool.submit(ask, parent)
        hosts.attach(host).run(when_there, "/var/lib/nova/snowflock/*.json")
        family.kill(service)
        family.start(service)
        return asked.result()


# The clones' hosts


def on(host: str) -> dict[str, Any]:
    """What an administrator asks for whose clone shall be on a host."""
    return {"availability_zone": f"nova:{host}", "user": "admin"}


def outcome(*forks: dict[str, Any]) -> list[str]:
    """The clones' states, once none is being built."""
    clones = [clone["server_id"] for fork in forks for clone in fork["clones"]]

    def states() -> list[str]:
        return [family.compute().get_server(clone).status for clone in clones]

    family.wait_until(lambda: "BUILD" not in states(), 150)
    return states()


def test_image_s_host_does_not_answer(parents: dict[str, str]) -> None:
    """Clones give up, with a reason; and whose host is killed meanwhile ends likewise."""
    home, patient, killed = settings.HOSTS
    parent = parents[home]
    service = hosts.nova_compute(home)
    with family.forked(parent, count=0, checkpoint=True) as fork:
        with family.stopped(openstack.SCHEDULER):
            forks = [
                family.fork(parent, wait=False, fork_id=fork["id"], **on(host))
                for host in (patient, killed)
            ]
            os.kill(service.pid() or 0, signal.SIGSTOP)
        clones = [fork["clones"][0]["server_id"] for fork in forks]
        try:
            family.wait_until(lambda: {state_of(clone) for clone in clones} == {"spawning"}, 30)
            family.kill(hosts.nova_compute(killed))
            family.start(hosts.nova_compute(killed))
            assert outcome(*forks) == ["ERROR", "ERROR"]
        finally:
            os.kill(service.pid() or 0, signal.SIGCONT)
        assert f"the image of fork {fork['id']} does not answer" in family.fault_of(clones[0])
        # Another try succeeds.
        more = family.fork(parent, fork_id=fork["id"], count=2)
        assert outcome(more) == ["ACTIVE"] * 2


def set_link(host: str, state: str) -> None:
    assert hosts.attach(host).popen(["ip", "link", "set", "eth0", state]).wait() == 0


def test_memory_does_not_come(parents: dict[str, str]) -> None:
    """A clone that needs it to start gives up; those that run wait for it."""
    home, alone, shared = settings.HOSTS
    parent = parents[home]
    with family.talk(parent) as guest:
        digest = guest.call("digest")
    with family.forked(parent, population="lazy", **on(shared)) as first:
        with family.stopped(openstack.SCHEDULER):
            more = [
                family.fork(parent, wait=False, fork_id=first["id"], **on(host))
                for host in (alone, shared)
            ]
            # By then the scheduler has not told any host.
            set_link(home, "down")
        try:
            # What the second one needs, the one that runs there has fetched.
            assert outcome(*more) == ["ERROR", "ACTIVE"]
        finally:
            set_link(home, "up")
        fault = family.fault_of(more[0]["clones"][0]["server_id"])
        assert "did not get what it starts with" in fault
        with family.talk(first["clones"][0]["server_id"]) as guest:
            assert guest.call("digest") == digest


def test_compute_service_is_killed_while_a_clone_starts(parents: dict[str, str]) -> None:
    home, target, _ = settings.HOSTS
    parent = parents[home]
    service = hosts.nova_compute(target)
    with family.forked(parent, count=0, checkpoint=True) as fork:
        with family.stopped(openstack.SCHEDULER):
            more = family.fork(parent, wait=False, fork_id=fork["id"], **on(target))
            set_link(home, "down")
        try:
            hosts.attach(target).run(when_there, f"/run/nova-snowflock/{fork['id']}/mount")
            family.kill(service)
            family.start(service)
        finally:
            set_link(home, "up")
        assert outcome(more) == ["ERROR"]
        again = family.fork(parent, fork_id=fork["id"], **on(target))
        assert outcome(again) == ["ACTIVE"]


# The image


def test_image_is_released_before_its_clones_come(parents: dict[str, str]) -> None:
    parent = parents[settings.HOSTS[0]]
    with family.stopped(openstack.SCHEDULER):
        fork = family.fork(parent, wait=False, count=2)
        path = f"/servers/{parent}/forks/{fork['id']}"
        status, message = family.refusal("POST", f"{path}/action", {"release": {}})
        assert status == 409
        assert "being built" in message
        family.request("POST", f"{path}/action", {"release": {"force": True}})
    assert outcome(fork) == ["ERROR"] * 2
    for clone in fork["clones"]:
        assert f"fork {fork['id']} has no image any more" in family.fault_of(clone["server_id"])
    family.request("DELETE", path)


def test_image_is_lost(parents: dict[str, str]) -> None:
    """As long as there is its memory, another server is started for whoever comes."""
    home = hosts.attach(settings.HOSTS[0])
    parent = parents[home.name]
    with family.forked(parent, count=0, checkpoint=True) as fork:
        path = f"/servers/{parent}/action"
        home.run(kill_memory_server, fork["id"])
        more = family.fork(parent, fork_id=fork["id"])
        assert outcome(more) == ["ACTIVE"]
        with family.stopped(openstack.SCHEDULER):
            more = family.fork(parent, wait=False, fork_id=fork["id"])
            home.run(kill_frozen, fork["id"])
            home.run(kill_memory_server, fork["id"])
        assert outcome(more) == ["ERROR"]
        assert "has no image any more" in family.fault_of(more["clones"][0]["server_id"])
        status, message = family.refusal("POST", path, {"fork": {"fork_id": fork["id"]}})
        assert status == 404
        assert "is lost" in message
        assert family.show(parent, fork["id"])["state"] == "lost"


def test_image_that_nobody_can_use_goes(parents: dict[str, str]) -> None:
    parent = family.create("short-lived")
    family.wait_for(parent)
    home = hosts.attach(family.host_of(parent))
    fork = family.fork(parent, count=0, checkpoint=True)
    family.delete(parent)
    family.wait_until(lambda: not home.path(f"/run/nova-snowflock/{fork['id']}").exists(), 60)


def test_image_that_clones_need_stays(parents: dict[str, str]) -> None:
    """Whether or not anybody asks it for pages just now."""
    home = hosts.attach(settings.HOSTS[0])
    parent = parents[home.name]
    with family.forked(parent, population="lazy", **on(settings.HOSTS[1])) as fork:
        path = f"/servers/{parent}/forks/{fork['id']}/action"
        home.run(kill_memory_server, fork["id"])
        status, message = family.refusal("POST", path, {"release": {}})
        assert status == 409
        assert f"the image of fork {fork['id']}" in message
        with family.talk(fork["clones"][0]["server_id"]) as guest:
            guest.call("digest")


def kill_memory_server(fork: str) -> None:
    server = data_plane.find_memory_server(f"/run/nova-snowflock/{fork}")
    assert server is not None
    os.kill(server.peer(), signal.SIGKILL)


def kill_frozen(fork: str) -> None:
    record = json.loads(pathlib.Path(f"/run/nova-snowflock/{fork}/frozen").read_text())
    os.kill(record["pid"], signal.SIGKILL)


def test_parent_is_deleted_while_it_is_captured(parents: dict[str, str]) -> None:
    """It goes when the capture is over; its clones do not."""
    doomed = family.create("doomed")
    family.wait_for(doomed)
    with futures.ThreadPoolExecutor() as pool:
        with before_the_pause(family.host_of(doomed), doomed) as held:
            asked = pool.submit(family.fork, doomed, wait=False)
            held()
            family.compute().delete_server(doomed)
            family.wait_until(lambda: state_of(doomed) == "deleting", 30)
        fork = asked.result()
    family.delete(doomed)
    assert outcome(fork) == ["ACTIVE"]
    clone = fork["clones"][0]["server_id"]
    with family.talk(clone) as guest:
        guest.call("digest")
    family.request("DELETE", f"/servers/{clone}/forks/{fork['id']}")
    family.delete(clone)


def test_base_image_is_deleted(parents: dict[str, str]) -> None:
    """Clones run where it is cached; elsewhere they cannot, and say so."""
    name = f"faults-{secrets.token_hex(2)}"
    service = identity.client("demo").image
    base = service.create_image(
        name=name, filename=str(image.DISK), disk_format="qcow2", container_format="bare"
    )
    parent = family.create("of-its-own", image_name=name)
    try:
        family.wait_for(parent)
        service.delete_image(base)
        home = family.host_of(parent)
        other = next(host for host in settings.HOSTS if host != home)
        with family.forked(parent, **on(home)) as fork:
            more = family.fork(parent, wait=False, fork_id=fork["id"], **on(other))
            assert outcome(more) == ["ERROR"]
            fault = family.fault_of(more["clones"][0]["server_id"])
            assert f"Image {base.id} could not be found" in fault
    finally:
        family.delete(parent)


# What the whole cloud leans on


@pytest.mark.parametrize("service", [messaging.SERVICE, database.SERVICE], ids=lambda one: one.name)
def test_restart_during_forks(parents: dict[str, str], service: processes.Service) -> None:
    """Killed and started again while forks are held at several places. Each of them succeeds, or
    fails and says so; none stays half done, and the next one succeeds."""
    early, late, origin = settings.HOSTS
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(family.forked(parents[origin], count=0, checkpoint=True))
        more = {"fork_id": image["id"], "wait": False}
        with link_down(origin), contextlib.ExitStack() as held:
            starting = family.fork(parents[origin], **more, **on(early))
            hosts.attach(early).run(when_there, f"/run/nova-snowflock/{image['id']}/mount")
            held.enter_context(family.stopped(openstack.SCHEDULER))
            scheduled = family.fork(parents[origin], **more)
            pool = stack.enter_context(futures.ThreadPoolExecutor())
            asked = []
            for host, gate in ((early, before_the_pause), (late, after_the_pause)):
                is_held = held.enter_context(gate(host, parents[host]))
                asked.append((parents[host], pool.submit(ask, parents[host])))
                is_held()
            family.kill(service)
            family.start(service)
        answers = [(parent, *future.result()) for parent, future in asked]
        family.wait_until(all_services_are_up, 120)
        forks = [starting, scheduled]
        for parent, status, text in answers:
            assert status in (202, 409, 503), text
            if status == 202:
                fork = json.loads(text)["fork"]
                forks.append(fork)
                stack.callback(family.request, "DELETE", f"/servers/{parent}/forks/{fork['id']}")
        for fork, state in zip(forks, outcome(*forks), strict=True):
            [clone] = fork["clones"]
            assert state == "ACTIVE" or family.fault_of(clone["server_id"])
        for parent in parents.values():
            with (
                family.forked(parent) as fork,
                family.talk(fork["clones"][0]["server_id"]) as guest,
            ):
                guest.call("digest")


@contextlib.contextmanager
def link_down(host: str) -> Iterator[None]:
    """Nobody gets pages from a host."""
    set_link(host, "down")
    try:
        yield
    finally:
        set_link(host, "up")


def all_services_are_up() -> bool:
    services = list(family.compute("admin").services())
    return all(service.state == "up" for service in services)


# Hosts that cannot take clones


@contextlib.contextmanager
def filled(*names: str) -> Iterator[None]:
    """Hosts whose memory is given to something else."""
    placement = identity.client("admin").placement
    project, user = (identity.client("admin").current_project_id, "faults")
    consumers = []
    try:
        for host in names:
            provider = next(placement.resource_providers(name=host)).id
            path = f"/resource_providers/{provider}"
            inventory = placement.get(f"{path}/inventories").json()["inventories"]["MEMORY_MB"]
            usage = placement.get(f"{path}/usages").json()["usages"]["MEMORY_MB"]
            free = inventory["total"] - inventory["reserved"] - usage
            consumers.append(f"/allocations/{uuid.uuid4()}")
            allocation = {
                "allocations": {provider: {"resources": {"MEMORY_MB": free - 1}}},
                "project_id": project,
                "user_id": user,
                "consumer_generation": None,
            }
            answer = placement.put(consumers[-1], json=allocation, microversion="1.28")
            assert answer.status_code == 204, answer.text
        yield
    finally:
        for consumer in consumers:
            placement.delete(consumer)


def test_no_room(parents: dict[str, str]) -> None:
    home, *others = settings.HOSTS
    parent = parents[home]
    with filled(*others), family.forked(parent, wait=False, count=2) as fork:
        # Where there is some, they are.
        assert outcome(fork) == ["ACTIVE"] * 2
        assert {family.host_of(clone["server_id"]) for clone in fork["clones"]} == {home}
        with filled(home):
            more = family.fork(parent, wait=False, fork_id=fork["id"], count=2)
            assert outcome(more) == ["ERROR"] * 2
            for clone in more["clones"]:
                assert "No valid host" in family.fault_of(clone["server_id"])


def test_host_without_the_plugin(parents: dict[str, str]) -> None:
    home, other, plain = settings.HOSTS
    service = hosts.nova_compute(plain)
    file = configuration.nova_compute_file(plain)
    ours = file.read_text()
    try:
        service.stop()
        file.write_text(ours.replace("snowflock.SnowFlockDriver", "libvirt.LibvirtDriver"))
        family.start(service)
        forget_trait(plain)
        status, message = ask(parents[plain])
        assert status == 409
        assert "cannot fork" in message
        with (
            family.scheduled_on(other, plain),
            family.forked(parents[home], wait=False, count=2) as fork,
        ):
            assert outcome(fork) == ["ACTIVE"] * 2
            assert {family.host_of(clone["server_id"]) for clone in fork["clones"]} == {other}
            with family.scheduled_on(plain):
                more = family.fork(parents[home], wait=False, fork_id=fork["id"])
                assert outcome(more) == ["ERROR"]
                assert "No valid host" in family.fault_of(more["clones"][0]["server_id"])
    finally:
        service.stop()
        file.write_text(ours)
        family.start(service)


def forget_trait(host: str) -> None:
    """As whoever takes the plugin from a host has to."""
    placement = identity.client("admin").placement
    provider = next(placement.resource_providers(name=host)).id
    path = f"/resource_providers/{provider}/traits"
    known = placement.get(path, microversion="1.6").json()
    known["traits"].remove("CUSTOM_SNOWFLOCK_QEMU")
    answer = placement.put(path, json=known, microversion="1.6")
    assert answer.status_code == 200, answer.text


def test_host_whose_processor_lacks_a_feature(parents: dict[str, str]) -> None:
    """Clones of a guest that has it are refused there before they start, and built elsewhere."""
    home, other, lesser = settings.HOSTS
    parent = parents[home]
    # Nova prefers the host with more room whose last build did not fail.
    with family.forked(parent, **on(lesser)) as fork:
        family.fork(parent, fork_id=fork["id"], count=2, **on(other))
        with without_feature(lesser, "sse4.2"), family.scheduled_on(other, lesser):
            more = family.fork(parent, wait=False, fork_id=fork["id"])
            assert outcome(more) == ["ACTIVE"]
            clone = more["clones"][0]["server_id"]
            assert family.host_of(clone) == other
            assert tried_on(clone) == {lesser, other}
            alone = family.fork(parent, wait=False, fork_id=fork["id"], **on(lesser))
            assert outcome(alone) == ["ERROR"]
        fault = family.fault_of(alone["clones"][0]["server_id"])
        assert "does not provide required features: sse4.2" in fault


def tried_on(server: str) -> set[str]:
    """The hosts that began to start a clone."""
    compute = family.compute("admin")
    [created] = [action for action in compute.server_actions(server) if action.action == "create"]
    path = f"/servers/{server}/os-instance-actions/{created.request_id}"
    answer = compute.get(path, microversion="2.62").json()["instanceAction"]
    return {event["host"] for event in answer["events"] if event["event"] == "compute_fork"}


@contextlib.contextmanager
def without_feature(host: str, name: str) -> Iterator[None]:
    """A host whose QEMU, and so libvirt, cannot give guests a feature of the processor."""
    machine = hosts.attach(host)
    machine.run(hide_feature, name)
    try:
        yield
    finally:
        machine.run(show_features)


QEMU = "/usr/bin/qemu-system-x86_64"
BESIDE = pathlib.Path("/run/lesser-qemu")


def hide_feature(name: str) -> None:
    """libvirt sees that its QEMU is another one, and asks it what it can."""
    BESIDE.mkdir()
    (real, lesser) = BESIDE / "real", BESIDE / "lesser"
    real.touch()
    subprocess.run(["mount", "--bind", QEMU, real], check=True)
    modules = "/usr/lib/x86_64-linux-gnu/qemu"
    lesser.write_text(
        f'#!/bin/sh\nQEMU_MODULE_DIR={modules} exec {real} "$@" -global max-x86_64-cpu.{name}=off\n'
    )
    lesser.chmod(0o755)
    subprocess.run(["mount", "--bind", lesser, QEMU], check=True)


def show_features() -> None:
    subprocess.run(["umount", QEMU], check=True)
    subprocess.run(["umount", BESIDE / "real"], check=True)
    shutil.rmtree(BESIDE)
