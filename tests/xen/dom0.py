# SPDX-License-Identifier: Apache-2.0
"""A Xen machine's dom0, as a host that functions can be run on."""

from collections.abc import Iterator
import contextlib
import subprocess
import sys

from devstack.xen import emulator
from devstack.xen import machine
from devstack.xen import settings
from tests import emulation

HELPER = "/usr/lib/nova-snowflock/snowflock-xen"
SOURCES = settings.REPOSITORY / "nova_snowflock/virt/xen/native"
ADDRESS = emulator.ADDRESS.partition("/")[0]
_SOCKET = "/run/snowflock-agent.sock"


@contextlib.contextmanager
def attached(xen: machine.Machine) -> Iterator[emulation.Host]:
    """dom0, for as long as the context lasts. The machine must be up."""
    build_helper(xen)
    local = xen.directory / "agent.sock"
    where = f"--chdir={settings.REPOSITORY}"
    command = xen.command(["env", where, sys.executable, "-m", "tests.xen.agent", _SOCKET])
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as running:
        try:
            assert running.stdout is not None
            assert running.stdout.readline() == b"ready\n"
            with xen.forwarded(local, _SOCKET):
                yield emulation.Host(machine.NAME, ADDRESS, running.pid, local)
        finally:
            running.kill()


def keep_multicast(xen: machine.Machine) -> None:
    """Have multicast stay in dom0, where memory server and memtap both are."""
    for argv in ("link set lo multicast on", "route replace 239.0.0.0/8 dev lo"):
        xen.run(["ip", *argv.split()], check=True)


def build_helper(xen: machine.Machine) -> None:
    """Have snowflock-xen in dom0, built from the sources of this checkout, by what is there."""
    build = "/root/snowflock-xen"
    for argv in (
        ["rm", "-rf", build],
        ["cp", "-r", str(SOURCES), build],
        ["make", "-C", build, "CC=gcc"],
        ["install", "-D", f"{build}/snowflock-xen", HELPER],
    ):
        xen.run(argv, check=True)
