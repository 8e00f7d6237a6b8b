# SPDX-License-Identifier: Apache-2.0
"""``up``, ``down``, ``status`` and what else a developer does to the cloud."""

import argparse
import os
import sys

from devstack.embedded import cloud
from devstack.embedded import hosts
from devstack.embedded import processes
from devstack.embedded import settings


def say(line: str) -> None:
    print(line, flush=True)


def up(options: argparse.Namespace) -> int:
    """Start what does not run and make what is missing."""
    cloud.up(say)
    say(f"source {settings.STATE}/openrc, and `openstack server list`; logs are in {settings.LOG}")
    return 0


def down(options: argparse.Namespace) -> int:
    """End and remove everything."""
    cloud.down(say)
    return 0


def status(options: argparse.Namespace) -> int:
    """What runs. Exit status 1 if anything does not."""
    complete = True
    used = cloud.memory()
    for service in cloud.services():
        pid = service.pid()
        ready = service.is_ready()
        complete &= ready
        state = "ready" if ready else "not ready" if pid else "does not run"
        say(f"{service.name:24} {state:14} {pid or '':>8} {used[service.name]:6} MB")
    say(f"{'all':24} {'':14} {'':8} {sum(used.values()):6} MB")
    return 0 if complete else 1


def restart(options: argparse.Namespace) -> int:
    """End services, by name, and start them again."""
    known = {service.name: service for service in cloud.services()}
    for name in options.services:
        if name not in known:
            raise processes.CloudError(f"no service {name}; there are {', '.join(known)}")
    cloud.stop(known[name] for name in options.services)
    cloud.up(say)
    return 0


def execute(options: argparse.Namespace) -> int:
    """Run a program on a compute host."""
    command = options.command or ["bash"]
    return hosts.attach(options.host).popen(command).wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m devstack.embedded", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for function in (up, down, status, restart, execute):
        command = commands.add_parser(function.__name__, help=function.__doc__)
        command.set_defaults(function=function)
        if function is restart:
            command.add_argument("services", nargs="+", help="as `status` names them")
        if function is execute:
            command.add_argument("host", choices=settings.HOSTS)
            command.add_argument("command", nargs=argparse.REMAINDER, help="default: bash")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print(
            "The cloud needs root: it makes namespaces and runs virtual machines.", file=sys.stderr
        )
        return 2
    try:
        return int(options.function(options))
    except processes.CloudError as error:
        print(error, file=sys.stderr)
        return 1
