# SPDX-License-Identifier: Apache-2.0
"""Fork a running server of a real OpenStack cloud, on this machine, and check what comes of it."""

import argparse
from concurrent import futures
import contextlib
import datetime
import subprocess
import sys
import time
from typing import Any

from demo import checks
from demo import screen as demo_screen
from demo import site as demo_site
from demo import story
from devstack.embedded import identity
from devstack.embedded import image
from tests.cloud import family
from tests.guest import client as guest_client

MIB = 1 << 20
PARENT = "demo"
DISK: dict[str, Any] = {"disk": "vda", "offset": 600 * MIB, "length": 4 * MIB}


class Demo:
    """The story, in the order in which it happens."""

    def __init__(
        self,
        options: argparse.Namespace,
        screen: demo_screen.Screen,
        stack: contextlib.ExitStack,
    ) -> None:
        self.options = options
        self.screen = screen
        self.stack = stack
        self.compute = identity.client("demo").compute
        self.pool = stack.enter_context(futures.ThreadPoolExecutor(options.count + 1))

    def run(self) -> None:
        say = self.screen.say
        parent = self.boot()
        site = demo_site.Site(parent, self.screen)
        site.start()
        say(
            f"http://{site.address}/ serves data from its memory, digest {site.digest[:16]}",
            "green",
        )
        with family.talk(parent) as guest:
            guest.call("disk_write", seed=1, **DISK)
            content = disk_digest(guest)
            digest = guest.call("digest")
            before = guest.call("tick")["tick"]
        say(f"its memory holds random data, digest {digest[:16]}, and it counts", "green")
        say(f"its disk holds data, digest {content[:16]}", "green")

        pages: list[demo_site.Page] = []
        with site.visited(), site.captured(pages):
            self.screen.title(
                f"$ openstack server fork --count {self.options.count} --wait {PARENT}"
            )
            asked = time.time()
            self.fork(parent)
            answered = time.time()
            [listed] = family.request("GET", f"/servers/{parent}/forks")["forks"]
            fork = family.show(parent, listed["id"])
            with family.talk(parent) as guest:
                history = guest.call("history", count=2000)
                guest.call("write", seed=0, pages=64)
                guest.call("disk_write", seed=2, **DISK)

            self.screen.title("Checks, from the world outside")
            pages += self.pool.map(site.visit, fork["clones"])
            site.compare(pages)

            self.screen.title("Checks, from inside the servers")
            gap = checks.count_is_unbroken("the parent", history)
            say(f"the parent lost no tick; at most {gap * 1e3:.1f} ms were between two", "green")
            states = dict(self.pool.map(self.look, fork["clones"]))
            for name, state in states.items():
                checks.check(state["tick"] > before, f"{name} did not count on from tick {before}")
            say(f"every clone counted on from the parent's tick {before} or later", "green")
            checks.digests_are(dict.fromkeys(states, digest), digests(states, "digest"))
            say("every clone holds the parent's memory of then", "green")
            checks.digests_are(dict.fromkeys(states, content), digests(states, "disk"))
            say("every clone holds the parent's disk of then", "green")
            written = dict(self.pool.map(self.diverge, fork["clones"]))
            checks.all_differ([digest, *digests(written, "digest").values()])
            checks.all_differ([content, *digests(written, "disk").values()])
            say("all wrote to memory and disk, and none sees what another wrote", "green")

            self.screen.title("All the time")

        self.screen.show("")
        site.summary(pages)
        self.summary(family.show(parent, fork["id"]), asked, answered)

    def boot(self) -> str:
        """Create the parent, and wait until it answers."""
        network = demo_site.NETWORK
        options = f"--image {image.NAME} --flavor small --network {network}"
        self.screen.say(f"openstack server create {options} {PARENT}")
        return self.stack.enter_context(family.server(PARENT, "small", networks=family.on(network)))

    def fork(self, parent: str) -> None:
        """As a user would."""
        command = f"openstack server fork --count {self.options.count} --wait -f json {parent}"
        process = subprocess.Popen(
            ["bash", "-c", f"source {identity.OPENRC} demo && exec {command}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.stack.callback(self.clean, parent)
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip():
                self.screen.say(line.rstrip())
        checks.check(process.wait() == 0, "openstack server fork failed")

    def clean(self, parent: str) -> None:
        """Delete the clones and release the image."""
        for fork in family.request("GET", f"/servers/{parent}/forks")["forks"]:
            family.request("DELETE", f"/servers/{parent}/forks/{fork['id']}")

    def look(self, clone: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """What a clone says it is."""
        with family.talk(clone["server_id"]) as guest:
            state = dict(guest.call("state"))
            self.screen.say(f"{clone['name']} answers: tick {state['tick']}")
            return clone["name"], {**state, "disk": disk_digest(guest)}

    def diverge(self, clone: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Have a clone write what no other writes."""
        with family.talk(clone["server_id"]) as guest:
            seed = 100 + clone["clone_id"]
            state = dict(guest.call("write", seed=seed, pages=64))
            guest.call("disk_write", seed=seed, **DISK)
            return clone["name"], {**state, "disk": disk_digest(guest)}

    def summary(self, fork: dict[str, Any], asked: float, answered: float) -> None:
        captured = datetime.datetime.fromisoformat(fork["created_at"]).timestamp()
        stages = {**fork["stages"], "in all": fork["pause"]}
        self.screen.show_table(
            "Where the parent's pause went (ms)",
            list(stages),
            [[f"{seconds * 1e3:.1f}" for seconds in stages.values()]],
        )
        self.screen.show_table(
            f"Seconds from the command's start: captured after {captured - asked:.2f}, all clones "
            f"active and said to be so after {answered - asked:.2f}",
            [
                *("clone", "host", "scheduled", "disks", "network", "runs"),
                *("faults", "multicast", "unicast"),
            ],
            [self.row(clone, asked) for clone in fork["clones"]],
        )

    def row(self, clone: dict[str, Any], asked: float) -> list[str]:
        times = clone["times"]
        return [
            clone["name"],
            family.host_of(clone["server_id"]),
            *(f"{times[stage] - asked:.2f}" for stage in ("spawn", "disks", "guest", "running")),
            str(clone["faults"]),
            *(f"{clone[path] / 1e6:.1f} MB" for path in ("bytes_multicast", "bytes_unicast")),
        ]


def disk_digest(guest: guest_client.GuestClient) -> str:
    return str(guest.call("disk_digest", **DISK)["digest"])


def digests(states: dict[str, dict[str, Any]], name: str) -> dict[str, str]:
    return {server: str(state[name]) for server, state in states.items()}


def main() -> int:
    parser = story.parser("demo", __doc__)
    parser.add_argument("--count", type=int, default=6, choices=range(1, 65), metavar="N")
    options = parser.parse_args()
    return story.tell(options, lambda screen, stack: Demo(options, screen, stack).run())


if __name__ == "__main__":
    sys.exit(main())
