# SPDX-License-Identifier: Apache-2.0
"""``up``, ``join``, ``down``, ``status``, and ``run`` for what is to run in dom0."""

import argparse
import os
import sys

from devstack.embedded import processes
from devstack.xen import cloud
from devstack.xen import commands
from devstack.xen import machine


def say(line: str) -> None:
    print(line, flush=True)


def up(options: argparse.Namespace) -> int:
    """Start the machine unless it runs."""
    options.machine.up(paging=options.paging, say=say)
    say(f"Ready; its console is in {options.machine.log}")
    return 0


def join(options: argparse.Namespace) -> int:
    """Make it a compute host of the embedded cloud, which must be up."""
    cloud.join(options.machine, paging=options.paging, say=say)
    name, log = cloud.name(options.machine), cloud.nova_compute(options.machine).log
    say(f"{name} is there; nova-compute's log is {log}")
    return 0


def down(options: argparse.Namespace) -> int:
    """End the machine, and remove all but the cache."""
    options.machine.down()
    return 0


def status(options: argparse.Namespace) -> int:
    """Whether it runs. Exit status 1 if it does not."""
    if not options.machine.is_up():
        say("not ready" if options.machine.running().pid() else "does not run")
        return 1
    say(f"ready, with {'a hypervisor that pages' if options.machine.pages else 'stock Xen'}")
    return 0


def run(options: argparse.Namespace) -> int:
    """Run a program in dom0. Its exit status is this one's."""
    ssh, *argv = options.machine.command(options.command or ["bash"])
    terminal = ["-t"] if sys.stdin.isatty() else []
    os.execvp(ssh, [ssh, *terminal, *argv])


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m devstack.xen", description=__doc__)
    parser.add_argument(
        "--machine",
        type=int,
        choices=range(1, len(cloud.HOSTS) + 1),
        default=1,
        metavar="N",
        help="which, if there is more than one (default: 1)",
    )
    subparsers = parser.add_subparsers(required=True)
    for function in (up, join, down, status, run):
        command = subparsers.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        if function in (up, join):
            command.add_argument("--paging", action="store_true", help="with a hypervisor that can")
        if function is run:
            command.add_argument("command", nargs=argparse.REMAINDER, help="default: bash")
    options = parser.parse_args()
    options.machine = machine.Machine(options.machine)
    if os.geteuid() != 0:
        print("The machine's files are root's.", file=sys.stderr)
        return 2
    try:
        return int(options.function(options))
    except (commands.XenError, processes.CloudError) as error:
        print(error, file=sys.stderr)
        return 1
