# SPDX-License-Identifier: Apache-2.0
"""Forks in a real cloud: what a user waits for."""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import datetime
import statistics
import time
from typing import Any

from bench import figure
from devstack.embedded import cloud
from devstack.embedded import identity
from devstack.embedded import image
from devstack.embedded import settings
from tests.cloud import agents
from tests.cloud import family
from tests.guest import client as guest_client

MIB = 1 << 20
COUNTS = (1, 4, 8)
FORKS = 20
PINGED = 6
DISK: dict[str, Any] = {"disk": "vda", "offset": 600 * MIB, "length": 64 * MIB}
_LOOK_AGAIN = 0.2


@contextlib.contextmanager
def up() -> Iterator[None]:
    """The cloud runs, and ends with this unless it ran before."""
    was_there = settings.STATE.exists()
    cloud.up(lambda _: None)
    try:
        yield
    finally:
        if not was_there:
            cloud.down(lambda _: None)


@figure.benchmark("nova.embedded_up", "nova.ram.embedded_cloud")
def embedded() -> Iterator[figure.Figure]:
    """From nothing, with everything installed."""
    if settings.STATE.exists():
        raise RuntimeError(f"{settings.STATE} is there: `make cloud-down` first")
    seconds, again, memory = [], [], []
    for _ in range(figure.RUNS):
        started = time.monotonic()
        cloud.up(lambda _: None)
        seconds.append(time.monotonic() - started)
        started = time.monotonic()
        cloud.up(lambda _: None)
        again.append(time.monotonic() - started)
        memory.append(float(sum(cloud.memory().values())))
        cloud.down(lambda _: None)
    yield figure.Figure(
        "nova.embedded_up", "s", seconds, "packages installed; baseline: when all runs", again
    )
    yield figure.Figure(
        "nova.ram.embedded_cloud",
        "MB",
        memory,
        "resident, all daemons of three hosts, no servers; baseline: what it may take",
        [3000.0],
    )


@figure.benchmark(*(f"nova.fork.{count}" for count in COUNTS))
def fork() -> Iterator[figure.Figure]:
    """From the API call until all clones are ACTIVE and execute."""
    with up(), _parent("tiny") as parent:
        for host in settings.HOSTS:
            with family.placed(f"warm-{host}", host):
                pass  # the image is in its cache now
        for count in COUNTS:
            runs = [_fork(parent, count) for _ in range(figure.RUNS)]
            boots = [_boot(count) for _ in range(figure.RUNS)]
            stages = {stage: statistics.median(run[stage] for run in runs) for stage in runs[0]}
            split = ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items())
            yield figure.Figure(
                f"nova.fork.{count}",
                "s",
                [max(run["executing"], run["active"]) for run in runs],
                f"256 MiB guests with 1 vCPU (TCG), three hosts, warm image cache; until the last "
                f"clone is captured, ...: {split}; baseline: server create of as many, until each "
                "guest answers on its console",
                boots,
            )


@figure.benchmark("nova.fork.8.vs_snapshot_boot")
def fork_instead_of_snapshot() -> Iterator[figure.Figure]:
    """What a user does today to multiply a server and its state."""
    forks, others = [], []
    with up(), _parent("tiny") as parent:
        with family.talk(parent) as guest:
            guest.call("disk_write", seed=1, **DISK)
        for _ in range(figure.RUNS):
            run = _fork(parent, 8)
            forks.append(max(run["executing"], run["active"]))
            others.append(_snapshot_and_boot(parent, 8))
    yield figure.Figure(
        "nova.fork.8.vs_snapshot_boot",
        "s",
        forks,
        "8 clones of a 256 MiB guest with 64 MiB of data in memory; baseline: snapshot of it to an "
        "image, create and boot of 8 servers, until each has made its data anew and answers",
        others,
    )


@figure.benchmark("identity.first_ping.hotplug.6")
def first_ping_hotplug() -> Iterator[figure.Figure]:
    """There is no agent in the parent, so its clones get other interfaces."""
    yield from _first_ping("hotplug", lambda _: None, "other interfaces, DHCP by udhcpc")


@figure.benchmark("identity.first_ping.agent.6")
def first_ping_agent() -> Iterator[figure.Figure]:
    """Clones keep their interfaces, and an agent in them gives those other addresses."""
    yield from _first_ping("agent", agents.start, "addresses by the agent in each")


def _first_ping(
    identity_name: str, prepare: Callable[[str], None], means: str
) -> Iterator[figure.Figure]:
    """From the API call until each clone has answered under its own address.

    :param prepare: what is done to the parent first
    :param means: how the clones get their addresses
    """
    forks, resumes, boots = [], [], []
    with contextlib.ExitStack() as stack:
        stack.enter_context(up())
        networks = family.on("public")
        parent = stack.enter_context(family.server("bench", "tiny", networks=networks))
        assert family.answers_ping(family.address(parent), 60)
        prepare(parent)
        for _ in range(figure.RUNS):
            asked = time.time()
            with family.forked(parent, wait=False, count=PINGED) as made:
                servers = family.clones_of(made)
                answered = _answer_pings(servers)
                shown = family.show(parent, made["id"])
            forks.append(max(answered.values()) - asked)
            resumes += [
                answered[clone["server_id"]] - clone["times"]["running"]
                for clone in shown["clones"]
            ]
        for _ in range(figure.RUNS):
            asked = time.time()
            servers = []
            try:
                for number in range(PINGED):
                    servers.append(family.create(f"boot-{number}", networks=networks))
                boots.append(max(_answer_pings(servers).values()) - asked)
            finally:
                family.delete(*servers)
    yield figure.Figure(
        f"identity.first_ping.{identity_name}.{PINGED}",
        "s",
        forks,
        f"{PINGED} clones of a 256 MiB guest (TCG) with one interface, OVN in user space, {means}; "
        f"of it, from a clone's resume on: {statistics.median(resumes):.2f} "
        f"({min(resumes):.2f} to {max(resumes):.2f}); baseline: as many servers created",
        boots,
    )


def _answer_pings(servers: list[str]) -> dict[str, float]:
    """When each has answered a ping from outside first."""

    def answers(server: str) -> float:
        while not (ports := family.ports(server)) or not ports[0].fixed_ips:
            time.sleep(_LOOK_AGAIN)
        if not family.answers_ping(str(ports[0].fixed_ips[0]["ip_address"]), 120):
            raise RuntimeError(f"{server} does not answer")
        return time.time()

    with futures.ThreadPoolExecutor(len(servers)) as pool:
        return dict(zip(servers, pool.map(answers, servers), strict=True))


@figure.benchmark("nova.parent_pause.2GiB")
def parent_pause() -> Iterator[figure.Figure]:
    """With a disk, mostly touched."""
    pauses, stages, plain = [], [], []
    with up(), _parent("large") as parent:
        with family.talk(parent) as guest:
            guest.call("touch", mib=1500, timeout=300)
        for _ in range(figure.RUNS):
            with family.forked(parent, count=0, checkpoint=True) as made:
                shown = family.show(parent, made["id"])
            pauses.append(shown["pause"] * 1e3)
            stages.append(shown["stages"])
            plain.append((shown["pause"] - shown["stages"]["disks"]) * 1e3)
            time.sleep(3)
    split = ", ".join(
        f"{name} {statistics.median(run[name] for run in stages) * 1e3:.1f}" for name in stages[0]
    )
    yield figure.Figure(
        "nova.parent_pause.2GiB",
        "ms",
        pauses,
        f"2 GiB guest (TCG), 1.5 GiB touched, one qcow2 disk; {split}; baseline: without the disk",
        plain,
    )


@figure.benchmark("nova.disk.sequential", "nova.disk.random4k")
def disk() -> Iterator[figure.Figure]:
    """First touch of forked data in a clone."""
    sequential: list[float] = []
    random: list[float] = []
    near, nearby = [], []
    with up(), _parent("tiny") as parent:
        with family.talk(parent) as guest:
            guest.call("disk_write", seed=1, **DISK)
            for run in range(figure.RUNS):
                near.append(_sequential(guest))
                nearby.append(_random(guest, run))
        for run in range(figure.RUNS):
            for rates, measure in ((sequential, _sequential), (random, _random)):
                with (
                    family.forked(parent, population="lazy") as made,
                    family.talk(made["clones"][0]["server_id"]) as guest,
                ):
                    rates.append(measure(guest, run))
    conditions = "64 MiB written by the parent, read past the guest's cache, lazy population"
    yield figure.Figure(
        "nova.disk.sequential", "MB/s", sequential, f"{conditions}; baseline: the parent's", near
    )
    yield figure.Figure(
        "nova.disk.random4k", "us", random, f"{conditions}, 500 pages; baseline: parent's", nearby
    )


@figure.benchmark("nova.disk.after_20_forks", "nova.disk.with_20_images")
def twenty_forks() -> Iterator[figure.Figure]:
    """What forks leave of a parent's disk, and what images that are kept cost it."""
    with up(), _parent("tiny") as parent, family.talk(parent) as guest:
        guest.call("disk_write", seed=1, **DISK)
        before = [_sequential(guest) for _ in range(figure.RUNS)]
        with family.nothing_left():
            for seed in range(FORKS):
                with family.forked(parent, count=0, checkpoint=True):
                    guest.call("disk_write", **{**DISK, "length": MIB, "seed": seed})
        after = [_sequential(guest) for _ in range(figure.RUNS)]
        with contextlib.ExitStack() as images:
            for seed in range(FORKS):
                images.enter_context(family.forked(parent, count=0, checkpoint=True))
                guest.call("disk_write", **{**DISK, "length": MIB, "seed": seed})
            kept = [_sequential(guest) for _ in range(figure.RUNS)]
    conditions = f"{FORKS} checkpoints, 1 MiB written after each, then 64 MiB read past the cache"
    yield figure.Figure(
        "nova.disk.after_20_forks",
        "MB/s",
        after,
        f"the parent's disk after {conditions}; all deleted before; baseline: before the first",
        before,
    )
    yield figure.Figure(
        "nova.disk.with_20_images",
        "MB/s",
        kept,
        f"the parent's disk after {conditions}; none deleted; baseline: before the first",
        before,
    )


def _sequential(guest: guest_client.GuestClient, run: int = 0) -> float:
    """MB/s."""
    found = guest.call("disk_digest", timeout=300, **DISK)
    return float(DISK["length"] / 1e6 / found["seconds"])


def _random(guest: guest_client.GuestClient, run: int) -> float:
    """Microseconds a page."""
    found = guest.call(
        "disk_read_random",
        disk="vda",
        offset=DISK["offset"],
        length=DISK["length"],
        count=500,
        seed=run,
        timeout=300,
    )
    return float(found["seconds"] / 500 * 1e6)


@contextlib.contextmanager
def _parent(flavor: str) -> Iterator[str]:
    with family.server("bench", flavor) as parent:
        yield parent


def _fork(parent: str, count: int) -> dict[str, float]:
    """Seconds from the API call until the last clone has got so far."""
    asked = time.time()
    with family.forked(parent, wait=False, count=count) as made:
        active = when_active(family.clones_of(made)) - asked
        shown = family.show(parent, made["id"])
    times = [clone["times"] for clone in shown["clones"]]
    captured = datetime.datetime.fromisoformat(shown["created_at"]).timestamp()
    return {
        "captured": captured - asked,
        "scheduled": max(each["spawn"] for each in times) - asked,
        "disks": max(each["disks"] for each in times) - asked,
        "network": max(each["guest"] for each in times) - asked,
        "restored": max(each["restored"] for each in times) - asked,
        "executing": max(each["running"] for each in times) - asked,
        "active": active,
    }


def when_active(servers: list[str]) -> float:
    """When the last of them was seen to be, by time.time()."""
    left = set(servers)
    while left:
        for server in family.compute().servers(details=True):
            if server.status == "ERROR" and server.id in left:
                raise RuntimeError(f"{server.name}: {server.fault}")
            if server.status == "ACTIVE":
                left.discard(server.id)
        if left:
            time.sleep(_LOOK_AGAIN)
    return time.time()


def _boot(count: int, picture: str | None = None) -> float:
    """Seconds from the API call until as many new servers answer."""
    compute = family.compute()
    asked = time.time()
    compute.post(
        "/servers",
        json={
            "server": {
                "name": "boot",
                "imageRef": picture or identity.client("demo").image.find_image(image.NAME).id,
                "flavorRef": compute.find_flavor("tiny").id,
                "networks": "none",
                "min_count": count,
                "max_count": count,
            }
        },
        microversion="2.90",
    ).raise_for_status()
    servers = [server.id for server in compute.servers() if server.name.startswith("boot")]
    try:
        when_active(servers)
        with futures.ThreadPoolExecutor(count) as pool:
            list(pool.map(_answer, servers))
        return time.time() - asked
    finally:
        family.delete(*servers)


def _answer(server: str) -> None:
    with family.talk(server) as guest:
        guest.call("digest", timeout=300)


def _snapshot_and_boot(parent: str, count: int) -> float:
    started = time.time()
    pictures = identity.client("demo").image
    family.compute().create_server_image(parent, "bench", wait=True, timeout=300)
    snapshot = pictures.find_image("bench").id
    try:
        return time.time() - started + _boot(count, snapshot)
    finally:
        pictures.delete_image(snapshot)
