# SPDX-License-Identifier: Apache-2.0
"""The engine alone, without Nova: fork a guest on emulated hosts, and check that it is one fork."""

import argparse
from collections.abc import Callable, Iterable
from concurrent import futures
import contextlib
import dataclasses
import functools
import pathlib
import sys
import time
from typing import Any, TypeVar

from demo import checks
from demo import screen as demo_screen
from nova_snowflock import exception
from tests import emulation
from tests import engine
from tests.guest import client as guest_client
from tests.guest import domain

T = TypeVar("T")

PAGE = 4096
# More than a page may take to come, far less than anyone would wait for the demo.
PATIENCE = 300.0


@dataclasses.dataclass
class Clone:
    """One clone. Times by time.monotonic()."""

    number: int
    engine: engine.Engine
    guest: guest_client.GuestClient
    running: float
    answered: float
    history: checks.History

    @property
    def name(self) -> str:
        return f"clone{self.number}"


class Demo:
    """The story, in the order in which it happens."""

    def __init__(
        self,
        options: argparse.Namespace,
        screen: demo_screen.Screen,
        hosts: list[emulation.Host],
        stack: contextlib.ExitStack,
    ) -> None:
        self.options = options
        self.screen = screen
        self.stack = stack
        self.engines = [
            engine.Engine(host, mtu=options.mtu, population=options.population) for host in hosts
        ]
        self.pool = futures.ThreadPoolExecutor(options.clones + 1)
        # Whoever waits for a guest when the demo ends early stops waiting when its host ends.
        stack.callback(self.pool.shutdown, wait=False, cancel_futures=True)
        for host in hosts:
            domain.install_kernel(host)

    def run(self) -> None:
        say = self.screen.say
        home = self.engines[0]
        parent = self.boot()
        digest = parent.call("digest")
        say(f"it holds 64 MiB of random data, digest {digest[:16]}, and counts", "green")

        self.screen.title(f"Fork into {self.options.clones} clones on {len(self.engines)} hosts")
        before = parent.call("tick")["tick"]
        started = time.monotonic()
        image = home.fork("parent")
        for one in self.engines:
            self.stack.callback(one.release, image.uuid)
        say(f"image {image.uuid} is frozen and served from {home.host.name}", "green")
        say(f"the parent was stopped for {image.pause * 1e3:.1f} ms and runs again")
        starting = [
            self.pool.submit(self.spawn, image, number)
            for number in range(1, self.options.clones + 1)
        ]
        history = parent.call("history", count=2000)
        # Should this be seen by a clone, its digest would say so.
        digests = {"parent": parent.call("write", seed=0, pages=64)["digest"]}
        self.populate(image, starting)
        clones = [future.result() for future in starting]

        self.screen.title("Checks, from inside the guests")
        gap = checks.count_is_unbroken("the parent", history)
        say(
            f"the parent lost no tick; by its clock at most {gap * 1e3:.1f} ms were between two",
            "green",
        )
        instants = {
            clone.name: checks.clone_continues(clone.name, clone.history, history)
            for clone in clones
        }
        instant = checks.one_instant(instants, before, history[-1][0])
        say(f"every clone counted on from the parent's tick {instant}", "green")
        found = self.everywhere(clones, lambda clone: clone.guest.call("digest"))
        checks.digests_are(dict.fromkeys(found, digest), found)
        say(f"every clone holds the parent's data of then, digest {digest[:16]}", "green")
        memory = {clone.name: clone.engine.private_memory(clone.name) for clone in clones}

        write = functools.partial(guest_client.GuestClient.call, command="write", pages=64)
        written = self.everywhere(
            clones, lambda clone: write(clone.guest, seed=clone.number)["digest"]
        )
        digests.update(written)
        found = self.everywhere(clones, lambda clone: clone.guest.call("digest"))
        checks.digests_are(digests, {**found, "parent": parent.call("digest")})
        checks.all_differ([digest, *digests.values()])
        say("all wrote to their data, and none sees what another wrote", "green")

        self.screen.show("")
        self.summary(image, started, clones, memory)

    def boot(self) -> guest_client.GuestClient:
        """Start the parent, and wait until it counts."""
        host = self.engines[0].host
        memory = self.options.memory
        domain.boot(host, "parent", memory)
        self.screen.say(f"the parent boots on {host.name}, with {memory} MiB")
        guest = self.stack.enter_context(domain.client(host, "parent"))
        guest.call("tick")
        return guest

    def spawn(self, image: engine.Image, number: int) -> Clone:
        """Start a clone; this is done for all of them at once."""
        home = self.engines[number % len(self.engines)]
        name = f"clone{number}"
        home.spawn(image, name, number)
        running = time.monotonic()
        self.screen.say(f"{name} runs on {home.host.name}")
        guest = self.stack.enter_context(domain.client(home.host, name))
        tick = guest.call("tick")["tick"]
        answered = time.monotonic()
        self.screen.say(f"{name} answers: tick {tick}")
        return Clone(number, home, guest, running, answered, guest.call("history", count=2000))

    def populate(self, image: engine.Image, starting: list[futures.Future[Clone]]) -> None:
        """Show how memory arrives on the hosts until all clones run and all of it has."""
        deadline = time.monotonic() + PATIENCE
        missing = dict.fromkeys(self.engines_used(), 1)
        while any(missing.values()) or not all(future.done() for future in starting):
            for one in missing:
                with contextlib.suppress(LookupError):  # its memtap has not started yet
                    pages = one.memtap(image.uuid)["pages"]
                    here, wanted = pages["resident"], pages["resident"] + pages["missing"]
                    name = f"memory on {one.host.name}"
                    self.screen.bar(name, megabytes(here), megabytes(wanted))
                    missing[one] = 0 if self.options.population == "lazy" else pages["missing"]
            for future in starting:
                if future.done():
                    future.result()
            checks.check(time.monotonic() < deadline, "the clones or their memory do not arrive")
            time.sleep(0.05)
        self.screen.end_bars()

    def engines_used(self) -> list[engine.Engine]:
        """Those on whose hosts there are clones."""
        numbers = range(1, self.options.clones + 1)
        return [
            one
            for place, one in enumerate(self.engines)
            if any(number % len(self.engines) == place for number in numbers)
        ]

    def everywhere(self, clones: list[Clone], call: Callable[[Clone], T]) -> dict[str, T]:
        """The result of a call for every clone, all at once."""
        results = self.pool.map(call, clones)
        return {clone.name: result for clone, result in zip(clones, results, strict=True)}

    def summary(
        self,
        image: engine.Image,
        started: float,
        clones: list[Clone],
        memory: dict[str, tuple[int, int]],
    ) -> None:
        stages = dict(image.stages)
        suspend, save, resume = (stages.pop(name) for name in ("suspend", "device_state", "resume"))
        freeze = sum(stages.values())  # what is left are its steps
        pause = [suspend, save, freeze, resume, image.pause]
        self.screen.show_table(
            "Where the parent's pause went (ms)",
            ["suspend", "device state", "freeze", "resume", "in all"],
            [[f"{seconds * 1e3:.2f}" for seconds in pause]],
        )
        self.screen.show_table(
            "Clones: when each ran and its guest answered, from the fork call; memory of its own",
            ["clone", "host", "runs (s)", "answers (s)", "guest (KiB)", "QEMU (MiB)"],
            [
                [
                    clone.name,
                    clone.engine.host.name,
                    f"{clone.running - started:.3f}",
                    f"{clone.answered - started:.3f}",
                    f"{memory[clone.name][0]}",
                    f"{memory[clone.name][1] / 1024:.1f}",
                ]
                for clone in clones
            ],
        )
        self.screen.show_table(
            f"What came to each host (MB), besides a descriptor of "
            f"{len(image.descriptor) / 1e3:.1f} kB",
            ["host", "faults", "multicast", "unicast", "repeated", "resident", "zero: not sent"],
            [[one.host.name, *host_figures(one.memtap(image.uuid))] for one in self.engines_used()],
        )


def host_figures(status: dict[str, Any]) -> Iterable[str]:
    yield str(status["faults"])
    for kind in ("bytes_multicast", "bytes_unicast", "bytes_repeated"):
        yield f"{status[kind] / 1e6:.1f}"
    for kind in ("resident", "zero"):
        yield f"{megabytes(status['pages'][kind]):.1f}"


def megabytes(pages: int) -> float:
    return pages * PAGE / 1e6


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo.engine", description=__doc__)
    parser.add_argument("--clones", type=int, default=8, choices=range(1, 65), metavar="N")
    parser.add_argument("--hosts", type=int, default=3, choices=range(1, 17), metavar="N")
    parser.add_argument("--memory", type=int, default=512, metavar="MiB", help="of the parent")
    parser.add_argument(
        "--population", choices=("lazy", "background", "eager"), default="background"
    )
    parser.add_argument("--mtu", type=int, default=1500, help="of the hosts' network, bytes")
    parser.add_argument("--record", type=pathlib.Path, metavar="PATH", help="write a picture, SVG")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    try:
        with (
            demo_screen.Screen(options.record) as screen,
            emulation.hosts(options.hosts, mtu=options.mtu) as hosts,
            contextlib.ExitStack() as stack,
        ):
            screen.title(f"{options.hosts} emulated hosts, each with a libvirtd of its own")
            Demo(options, screen, hosts, stack).run()
    except checks.CheckFailed as failure:
        print(f"The check failed: {failure}", file=sys.stderr)
        return 1
    except (exception.SnowFlockError, guest_client.GuestError, emulation.EmulationError) as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
