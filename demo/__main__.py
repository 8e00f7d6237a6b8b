# SPDX-License-Identifier: Apache-2.0
"""Fork a running server of a real OpenStack cloud, on this machine, and check what comes of it."""

import argparse
from concurrent import futures
import contextlib
import sys
from typing import Any

from demo import checks
from demo import forking as demo_forking
from demo import screen as demo_screen
from demo import site as demo_site
from demo import story
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
            forking = demo_forking.Forking(self.screen, parent, PARENT, self.options.count)
            self.stack.callback(forking.clean)
            fork = forking.run()
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
        forking.summary(family.show(parent, fork["id"]))

    def boot(self) -> str:
        """Create the parent, and wait until it answers."""
        network = demo_site.NETWORK
        options = f"--image {image.NAME} --flavor small --network {network}"
        self.screen.say(f"openstack server create {options} {PARENT}")
        return self.stack.enter_context(family.server(PARENT, "small", networks=family.on(network)))

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
