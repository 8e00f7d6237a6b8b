# SPDX-License-Identifier: Apache-2.0
"""How soon clones run, over three hosts."""

from collections.abc import Iterator, Sequence
from concurrent import futures
import os
import statistics
import struct
import time
import uuid

import libvirt

from bench import figure
from bench import guests
from bench import network
from tests import engine
from tests.guest import domain

HOSTS = 3
COUNTS = (1, 2, 4, 8, 16)
# libvirt's save image is edited in place for each copy of the guest, so all names are as long.
_PARENT = "origin"
_SAVED = "/var/lib/libvirt/qemu/saved"
_HEADER_SIZE = 92
_XML_SIZE_OFFSET = 20
_BIG_MIB = 2048
_BIG_TOUCHED_MIB = 512


@figure.benchmark(*(f"engine.clones_running.{count}" for count in COUNTS))
def running() -> Iterator[figure.Figure]:
    """From the fork call until libvirt says that the last clone runs."""
    with guests.engines(HOSTS) as homes, guests.booted(homes[0].host, _PARENT):
        for count in COUNTS:
            times: list[float] = []
            answers: list[float] = []
            boots: list[float] = []
            for _ in range(figure.RUNS):
                ran, answered = _fork(homes, count)
                times.append(ran)
                answers.append(answered)
                boots.append(_boot(homes, count))
            yield figure.Figure(
                f"engine.clones_running.{count}",
                "s",
                times,
                f"guest of {guests.MEMORY_MIB} MiB with 1 vCPU (TCG), parent on the first of "
                f"{HOSTS} hosts and running meanwhile, MTU 1500; executes: "
                "virDomainRestoreFlags has returned, so QEMU runs the guest's CPU; the last guest "
                f"has answered over its serial port after {statistics.median(answers):.2f} s; "
                "baseline: as many plain boots until QEMU runs (virDomainCreate has returned)",
                boots,
            )


@figure.benchmark("engine.clones_running.8.vs_save_restore")
def vs_save_restore() -> Iterator[figure.Figure]:
    """Forks against what libvirt offers for the same."""
    count = 8
    times: list[float] = []
    baseline: list[float] = []
    with (
        guests.engines(HOSTS) as homes,
        guests.booted(homes[0].host, _PARENT, _BIG_MIB, _BIG_TOUCHED_MIB) as parent,
    ):
        content = parent.call("memory")
        used = (content["MemTotal"] - content["MemFree"]) // 1024
        parent.close()  # libvirt's own guest ends when it is saved
        for _ in range(figure.RUNS):
            times.append(_fork(homes, count)[0])
            baseline.append(_save_and_restore(homes, count))
    yield figure.Figure(
        f"engine.clones_running.{count}.vs_save_restore",
        "s",
        times,
        f"guest of {_BIG_MIB} MiB, {used} MiB of them in use (more would not fit into this machine "
        f"{count} times), 1 vCPU (TCG), over {HOSTS} hosts, MTU 1500, until the last guest runs; "
        "baseline: virsh save, copy to the other hosts by TCP (once a host), virsh restore of "
        "each, all on tmpfs",
        baseline,
    )


def _fork(homes: Sequence[engine.Engine], count: int) -> tuple[float, float]:
    """Seconds from the fork call until the last clone runs, and until it has answered."""
    image = str(uuid.uuid4())
    with guests.released(homes[0], homes[1:], image):
        started = time.monotonic()
        forked = homes[0].fork(_PARENT, image)
        with guests.spawned(homes, forked, count) as times:
            ran, answered = (max(moments) for moments in zip(*times, strict=True))
    return ran - started, answered - started


def _boot(homes: Sequence[engine.Engine], count: int) -> float:
    """Seconds until QEMU runs the last of as many new guests."""
    guest_hosts = [homes[number % len(homes)].host for number in range(count)]
    with futures.ThreadPoolExecutor(count) as pool:
        started = time.monotonic()
        boots = [
            pool.submit(domain.boot, host, f"plain{number:02}", guests.MEMORY_MIB)
            for number, host in enumerate(guest_hosts)
        ]
        futures.wait(boots)
        seconds = time.monotonic() - started
    for number, (host, boot) in enumerate(zip(guest_hosts, boots, strict=True)):
        boot.result()
        domain.destroy(host, f"plain{number:02}")
    return seconds


def _save_and_restore(homes: Sequence[engine.Engine], count: int) -> float:
    """Seconds until the last copy of a saved guest runs. The guest itself runs on afterwards."""
    hosts = [home.host for home in homes]
    copies = [(f"copy{number:02}", str(uuid.uuid4())) for number in range(count)]
    started = time.monotonic()
    original = hosts[0].run(_save)
    network.copy(hosts[0], hosts[1:], _SAVED)
    restores = [
        host.submit(_restore, copies[number :: len(hosts)]) for number, host in enumerate(hosts)
    ]
    for restore in restores:
        restore.result()
    seconds = time.monotonic() - started
    for number, (name, _) in enumerate(copies):
        domain.destroy(hosts[number % len(hosts)], name)
    hosts[0].run(_restore, [(_PARENT, original)])
    for host in hosts:
        host.run(os.unlink, _SAVED)
    return seconds


# On a host


def _save() -> str:
    """Save the guest, which ends with that, and return its UUID."""
    parent = engine.find_domain(_PARENT)
    parent.save(_SAVED)
    return str(parent.UUIDString())


def _restore(identities: Sequence[tuple[str, str]]) -> None:
    """Restore the saved guest under each of these names and UUIDs."""
    with libvirt.open("qemu:///system") as connection:
        for name, identity in identities:
            _rename(name, identity)
            connection.restore(_SAVED)


def _rename(name: str, identity: str) -> None:
    """Give the guest in the save image another name and UUID, each as long as the last."""
    with open(_SAVED, "r+b") as file:
        # nova_snowflock.virt.qemu.save_image describes the format.
        (size,) = struct.unpack_from("=I", file.read(_HEADER_SIZE), _XML_SIZE_OFFSET)
        xml = file.read(size)
        for tag, new in ((b"name", name), (b"uuid", identity)):
            old = xml.partition(b"<%s>" % tag)[2].partition(b"</%s>" % tag)[0]
            xml = xml.replace(old, new.encode())
        file.seek(_HEADER_SIZE)
        file.write(xml)
