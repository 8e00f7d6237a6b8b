# SPDX-License-Identifier: Apache-2.0
"""A program in a guest forks the machine that it runs on, and has its clones work for it."""

import contextlib
import json
import sys
import time
from typing import Any

from demo import checks
from demo import job
from demo import screen as demo_screen
from demo import story
from devstack.embedded import image
from nova_snowflock.virt import marks
from tests.cloud import agents
from tests.cloud import family

PARENT = "demo"
CLONES = 6
PATIENCE = 300.0
_LOOK_AGAIN = 0.5


class Demo:
    """The story, in the order in which it happens."""

    def __init__(self, screen: demo_screen.Screen, stack: contextlib.ExitStack) -> None:
        self.screen = screen
        self.stack = stack

    def run(self) -> None:
        say = self.screen.say
        parent = self.boot()
        agents.start(parent)
        say("snowflock-guest runs in it, and its host has told it who it is", "green")

        self.screen.title(f"$ python3 job.py, in {PARENT}")
        self.stack.callback(self.clean, parent)
        stages = self.follow(agents.Program(parent, job.PROGRAM))

        self.screen.title("Checks")
        clones = stages["join"]["clones"]
        checks.check(len(clones) == CLONES, f"{len(clones)} clones were joined, not {CLONES}")
        for clone in clones:
            checks.check(clone["status"] == 0, f"clone {clone['clone_id']}: {clone['error']}")
        say(f"all {CLONES} clones exited with status 0, and left a result", "green")
        found = sum(clone["result"]["sum"] for clone in clones)
        alone = stages["alone"]["sum"]
        checks.check(found == alone, f"the shares add up to {found}, and the data to {alone}")
        say(f"the shares add up to {found}, as the parent finds alone", "green")
        family.wait_until(lambda: not family.clones_known(parent), 60)
        say("no server is left of the clones", "green")

        self.screen.show("")
        self.summary(stages)

    def boot(self) -> str:
        """Create the parent, whose programs may have clones."""
        mark = {marks.GUEST_FORK_MAX: str(CLONES)}
        [(name, value)] = mark.items()
        self.screen.say(f"openstack server create --image {image.NAME} --flavor small {PARENT}")
        self.screen.say(f"    --property {name}={value}")
        return self.stack.enter_context(family.server(PARENT, "small", metadata=mark))

    def follow(self, program: agents.Program) -> dict[str, dict[str, Any]]:
        """Show what the program says until it has ended: its stages, by name."""
        stages: dict[str, dict[str, Any]] = {}
        clones: set[str] = set()
        deadline = time.monotonic() + PATIENCE
        while True:
            said = program.said()
            for line in said[len(stages) :]:
                if not line.startswith("{"):
                    checks.check(line == "ended 0", "the program failed:\n" + "\n".join(said))
                    return stages
                stage = json.loads(line)
                stages[stage["stage"]] = stage
                self.screen.say(_sentence(stage))
            known = set(family.clones_known(program.server))
            if len(known) > len(clones):
                self.screen.say(f"Nova has {len(known)} servers that are clones of {PARENT}")
            clones |= known
            checks.check(time.monotonic() < deadline, f"the program takes too long: {said}")
            time.sleep(_LOOK_AGAIN)

    def clean(self, parent: str) -> None:
        """Delete the clones, of which there are none if all went well."""
        family.delete(*family.clones_known(parent))

    def summary(self, stages: dict[str, dict[str, Any]]) -> None:
        size = stages["load"]["bytes"] / 1e6
        clones = stages["join"]["clones"]
        self.screen.show_table(
            f"What each clone computed of the {size:.0f} MB",
            ["clone", "host name", "sum", "seconds", "MB/s"],
            [
                [
                    str(clone["clone_id"]),
                    clone["result"]["name"],
                    str(clone["result"]["sum"]),
                    *_speed(size / len(clones), clone["result"]["seconds"]),
                ]
                for clone in clones
            ],
        )
        self.screen.show_table(
            "The program's stages, by the parent's clock; the machine that all clones share has "
            "few processors",
            ["stage", "seconds", "MB/s"],
            [
                ["load", *_speed(size, stages["load"]["seconds"])],
                ["request_ticket", f"{stages['request_ticket']['seconds']:.2f}", ""],
                ["clone", *_speed(size, stages["clone"]["seconds"])],
                ["compute, exit and join", *_speed(size, stages["join"]["seconds"])],
                ["compute alone", *_speed(size, stages["alone"]["seconds"])],
            ],
        )


def _sentence(stage: dict[str, Any]) -> str:
    sentences = {
        "load": "loaded {bytes:,} bytes",
        "request_ticket": "request_ticket() granted {n} clones",
        "clone": "clone() returned",
        "join": "join() returned",
        "alone": "computed all of it alone",
    }
    return f"{sentences[stage['stage']].format(**stage)} after {stage['seconds']:.2f} s"


def _speed(megabytes: float, seconds: float) -> list[str]:
    return [f"{seconds:.2f}", f"{megabytes / seconds:.1f}"]


def main() -> int:
    options = story.parser("demo.inside", __doc__).parse_args()
    return story.tell(options, lambda screen, stack: Demo(screen, stack).run())


if __name__ == "__main__":
    sys.exit(main())
