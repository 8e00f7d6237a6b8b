# SPDX-License-Identifier: Apache-2.0
"""For how long a fork stops its parent."""

from collections.abc import Iterator
import contextlib
import os
import shutil
import statistics
import time

from bench import figure
from bench import guests
from nova_snowflock.virt.disks import qcow2
from tests import engine
from tests.guest import client as guest_client
from tests.guest import domain

SIZES = {"512MiB": 512, "2GiB": 2048, "8GiB": 8192}
TOUCHED_MIB = 2048
"""At most; so that a machine with less memory than the biggest guest can run this."""
_PARENT = "parent"
_DISKS = "/var/lib/libvirt/images/parent"
_MIB = 1 << 20


@figure.benchmark("engine.parent_pause.512MiB")
def pause_512() -> Iterator[figure.Figure]:
    yield _pause("512MiB")


@figure.benchmark("engine.parent_pause.2GiB")
def pause_2048() -> Iterator[figure.Figure]:
    yield _pause("2GiB")


@figure.benchmark("engine.parent_pause.8GiB")
def pause_8192() -> Iterator[figure.Figure]:
    yield _pause("8GiB")


def _pause(size: str) -> figure.Figure:
    images: list[engine.Image] = []
    baseline: list[float] = []
    with (
        guests.engines(1) as (home,),
        guests.booted(home.host, _PARENT, SIZES[size], TOUCHED_MIB) as parent,
    ):
        touched = parent.call("touch", mib=1)["mib"] + 64
        for _ in range(2 * figure.RUNS):
            baseline.append(home.host.run(_suspend_and_resume, _PARENT))
            image = home.fork(_PARENT)
            home.release(image.uuid)
            images.append(image)
            _let_run(parent)
    return figure.Figure(
        f"engine.parent_pause.{size}",
        "ms",
        [image.pause * 1e3 for image in images],
        f"guest with 1 vCPU (TCG) and {size}, of which {touched} MiB are touched, running; by "
        f"stage: {_stages(images)}; baseline: virDomainSuspend and virDomainResume alone",
        [seconds * 1e3 for seconds in baseline],
    )


@figure.benchmark("engine.parent_pause.2GiB_disk", "engine.parent_pause.2GiB_3_disks")
def pause_with_disks() -> Iterator[figure.Figure]:
    yield _pause_with_disks("engine.parent_pause.2GiB_disk", 1)
    yield _pause_with_disks("engine.parent_pause.2GiB_3_disks", 3)


def _pause_with_disks(name: str, count: int) -> figure.Figure:
    images: list[engine.Image] = []
    plain: list[float] = []
    targets = [f"vd{letter}" for letter in "abc"[:count]]
    with (
        guests.engines(1) as (home,),
        _booted_with(home, targets) as parent,
    ):
        parent.call("touch", mib=1500, timeout=600)
        for run in range(2 * figure.RUNS):
            for target in targets:
                parent.call("disk_write", disk=target, offset=0, seed=run, length=4 * _MIB)
            image = home.fork(_PARENT)
            home.release(image.uuid)
            home.collapse(_PARENT)
            images.append(image)
            plain.append(image.pause - image.stages["disks"])
    return figure.Figure(
        name,
        "ms",
        [image.pause * 1e3 for image in images],
        f"guest with 1 vCPU (TCG) and 2 GiB, of which 1.5 GiB are touched, running; qcow2 disks: "
        f"{count}; by stage: {_stages(images)}; baseline: without the disks' stage",
        [seconds * 1e3 for seconds in plain],
    )


@contextlib.contextmanager
def _booted_with(home: engine.Engine, targets: list[str]) -> Iterator[guest_client.GuestClient]:
    home.host.run(_make_disks, targets)
    devices = "".join(
        f"<disk type='file'><driver name='qemu' type='qcow2'/><source file='{_DISKS}/{target}'/>"
        f"<target dev='{target}' bus='virtio'/></disk>"
        for target in targets
    )
    description = domain.xml(_PARENT, SIZES["2GiB"])
    domain.start(home.host, description.replace("</devices>", f"{devices}</devices>"))
    try:
        with domain.client(home.host, _PARENT) as parent:
            yield parent
    finally:
        domain.destroy(home.host, _PARENT)
        home.host.run(shutil.rmtree, _DISKS)


def _let_run(parent: guest_client.GuestClient) -> None:
    """Let the guest write for a while to what the fork has shared."""
    parent.call("tick")
    time.sleep(0.5)


def _stages(images: list[engine.Image]) -> str:
    medians = {
        stage: statistics.median(image.stages[stage] for image in images) * 1e3
        for stage in images[0].stages
    }
    return ", ".join(f"{stage} {median:.1f} ms" for stage, median in medians.items())


# On a host


def _make_disks(names: list[str]) -> None:
    os.makedirs(_DISKS)
    os.chmod(_DISKS, 0o755)
    for name in names:
        qcow2.qemu_img("create", "-q", "-f", "qcow2", f"{_DISKS}/{name}", "1G")


def _suspend_and_resume(name: str) -> float:
    domain = engine.find_domain(name)
    started = time.perf_counter()
    domain.suspend()
    domain.resume()
    return time.perf_counter() - started
