# SPDX-License-Identifier: Apache-2.0
"""Emulated hosts from the command line: ``python -m tests.emulation up --hosts 3``."""

import argparse
import os
import pathlib
import signal
import subprocess
import sys
import time

from tests import emulation
from tests.emulation import harness


def up(args: argparse.Namespace) -> int:
    """Start hosts that stay up until `down`."""
    keeper = subprocess.Popen(
        [sys.executable, "-m", "tests.emulation", "keep", *sys.argv[2:]],
        cwd=harness.REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )
    assert keeper.stdout is not None
    said = keeper.stdout.readline()
    if said != "up\n":
        sys.stderr.write(said + keeper.stdout.read())
        return 1
    for host in emulation.attach(args.name):
        print(host.name, host.address)
    return 0


def keep(args: argparse.Namespace) -> int:
    """What `up` leaves running: the process that the hosts live and die with."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        with emulation.hosts(args.hosts, mtu=args.mtu, name=args.name):
            keeper_file(args.name).write_text(str(os.getpid()))
            print("up", flush=True)
            # Python acts on a signal that comes just before a system call when that has ended.
            while True:
                time.sleep(0.1)
    except emulation.EmulationError as error:
        print(error)
        return 1


def down(args: argparse.Namespace) -> int:
    """End the hosts that `up` started, and remove what killed harnesses left."""
    harness.sweep()
    keeper = keeper_file(args.name)
    try:
        os.kill(int(keeper.read_text()), signal.SIGTERM)
    except FileNotFoundError:
        return 0
    while keeper.parent.exists():
        time.sleep(0.02)
    return 0


def execute(args: argparse.Namespace) -> int:
    """Run a program on a host."""
    for host in emulation.attach(args.name):
        if host.name == args.host:
            return host.popen(args.command or ["bash"]).wait()
    raise emulation.EmulationError(f"no host of {args.name} is named {args.host}")


def keeper_file(name: str) -> pathlib.Path:
    return harness.RUN / (harness.PREFIX + name) / "keeper"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emulation", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for function in (up, keep, down, execute):
        command = commands.add_parser(function.__name__, description=function.__doc__)
        command.add_argument("--name", default="dev", help="several sets of hosts can be up")
        command.set_defaults(function=function)
        if function in (up, keep):
            command.add_argument("--hosts", type=int, default=3)
            command.add_argument("--mtu", type=int, default=1500, help="bytes")
        if function is execute:
            command.add_argument("host", help="host1, ...")
            command.add_argument("command", nargs=argparse.REMAINDER, help="default: bash")
    args = parser.parse_args()
    try:
        return int(args.function(args))
    except emulation.EmulationError as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
