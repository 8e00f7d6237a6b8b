# SPDX-License-Identifier: Apache-2.0
"""Fork a Nova server of Xen, on machines that QEMU emulates, and check what comes of it."""

import argparse
import contextlib
import functools
import sys
from typing import Any

from demo import checks
from demo import forking as demo_forking
from demo import screen as demo_screen
from demo import story
from devstack.xen import cloud
from devstack.xen import machine
from tests.cloud import family
from tests.xen import servers

MIB = 1 << 20
PARENT = "demo"
DISK: dict[str, Any] = {"disk": "xvda", "offset": 64 * MIB, "length": 2 * MIB}


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
        self.hosts = {
            cloud.name(xen): servers.join(xen, stack, paging=not options.stock, say=screen.say)
            for xen in map(machine.Machine, range(1, options.machines + 1))
        }
        self.ask = functools.partial(servers.ask, self.hosts)

    def run(self) -> None:
        say = self.screen.say
        parent = self.boot()
        self.ask(parent, "disk_write", seed=1, **DISK)
        disk = self.disk_digest(parent)
        before = self.ask(parent, "state")
        digest = before["digest"]
        say(f"its memory holds random data, digest {digest[:16]}, and it counts", "green")
        say(f"its disk holds data, digest {disk[:16]}", "green")

        forking = demo_forking.Forking(self.screen, parent, PARENT, self.options.count)
        self.stack.callback(forking.clean)
        fork = forking.run()
        clones = {clone["name"]: clone["server_id"] for clone in fork["clones"]}

        self.screen.title("Checks, from inside the servers")
        history = self.ask(parent, "history", count=2000)
        gap = checks.count_is_unbroken("the parent", history)
        say(f"the parent lost no tick; at most {gap * 1e3:.1f} ms were between two", "green")
        # Should a clone see this, its digests would say so.
        written = {PARENT: self.diverge(parent, 0)}
        for name, clone in clones.items():
            state = self.ask(clone, "state")
            say(f"{name} answers: tick {state['tick']}")
            checks.check(state["boot_id"] == before["boot_id"], f"{name} has booted")
            checks.check(state["tick"] > before["tick"], f"{name} did not count on")
            checks.digests_are({name: digest}, {name: state["digest"]})
            checks.digests_are({name: disk}, {name: self.disk_digest(clone)})
        say(f"every clone counted on from the parent's tick {before['tick']} or later", "green")
        say("every clone holds the parent's memory and disk of then", "green")
        for number, (name, clone) in enumerate(clones.items(), 1):
            written[name] = self.diverge(clone, number)
        found = {name: self.digests(server) for name, server in {PARENT: parent, **clones}.items()}
        checks.check(found == written, "a server sees what another wrote")
        checks.all_differ([digest, *(memory for memory, _ in written.values())])
        checks.all_differ([disk, *(content for _, content in written.values())])
        say("all wrote to memory and disk, and none sees what another wrote", "green")

        self.screen.show("")
        forking.summary(family.show(parent, fork["id"]))

    def boot(self) -> str:
        """Create the parent on the Xen host, and wait until it answers."""
        self.screen.say(f"openstack server create --image {cloud.IMAGE} --flavor tiny {PARENT}")
        return self.stack.enter_context(servers.server(self.hosts, PARENT))

    def diverge(self, server: str, seed: int) -> tuple[str, str]:
        """Have a server write what no other writes; the digests of its memory and disk then."""
        self.ask(server, "write", seed=100 + seed, pages=64)
        self.ask(server, "disk_write", seed=100 + seed, **DISK)
        return self.digests(server)

    def digests(self, server: str) -> tuple[str, str]:
        """Of its memory, and of its disk."""
        return str(self.ask(server, "digest")), self.disk_digest(server)

    def disk_digest(self, server: str) -> str:
        return servers.disk_digest(self.hosts, server, **DISK)


def main() -> int:
    parser = story.parser("demo.xen", __doc__)
    parser.add_argument("--count", type=int, default=3, choices=range(1, 4), metavar="N")
    parser.add_argument(
        "--machines", type=int, default=1, choices=range(1, 3), metavar="N", help="of Xen"
    )
    parser.add_argument("--stock", action="store_true", help="on Debian's Xen, which does not page")
    options = parser.parse_args()
    return story.tell(options, lambda screen, stack: Demo(options, screen, stack).run())


if __name__ == "__main__":
    sys.exit(main())
