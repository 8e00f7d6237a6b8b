# SPDX-License-Identifier: Apache-2.0
"""For how long a fork stops its parent."""

from collections.abc import Iterator
import statistics
import time

from bench import figure
from bench import guests
from tests import engine
from tests.guest import client as guest_client

SIZES = {"512MiB": 512, "2GiB": 2048, "8GiB": 8192}
TOUCHED_MIB = 2048
"""At most; so that a machine with less memory than the biggest guest can run this."""
_PARENT = "parent"


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


def _suspend_and_resume(name: str) -> float:
    domain = engine.find_domain(name)
    started = time.perf_counter()
    domain.suspend()
    domain.resume()
    return time.perf_counter() - started
