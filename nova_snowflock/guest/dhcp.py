# SPDX-License-Identifier: Apache-2.0
"""DHCP clients that go on with their parent's lease and MAC, as nothing tells them of a fork.

dhcpcd, systemd-networkd and NetworkManager see that an interface has another MAC, and ask anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
import os
import signal
import subprocess
import time
from typing import NamedTuple

FOREGROUND = {"dhclient": ("-d",), "udhcpc": ("-f", "--foreground")}
"""The clients that are started anew, and the options with which somebody else does that."""

_GONE_SECONDS = 2.0
_LOOK_AGAIN = 0.02


class Client(NamedTuple):
    """A process that asks for addresses."""

    pid: int
    kind: str
    argv: list[str]

    def is_for(self, names: Collection[str], all_names: Collection[str]) -> bool:
        """Whether it looks after one of these interfaces; if it names none, it is for any."""
        named = set(self.argv[1:]) & set(all_names)
        return not named or bool(named & set(names))


def restart(names: Collection[str], problems: list[str], root: str = "/") -> bool:
    """Have the clients of some interfaces forget what they know.

    They are not asked to end, which some do with a word to the server about an address that is
    another machine's.

    :param names: of interfaces that have a link and their own MACs
    :returns: whether there is such a client
    """
    all_names = os.listdir(os.path.join(root, "sys/class/net"))
    found = False
    for client in _clients(root):
        if not client.is_for(names, all_names):
            continue
        found = True
        try:
            _restart(client, root)
        except OSError as error:
            problems.append(f"{client.kind} has the parent's lease: {error}.")
    return found


def _clients(root: str) -> Iterator[Client]:
    for entry in os.listdir(os.path.join(root, "proc")):
        if not entry.isdigit():
            continue
        process = os.path.join(root, "proc", entry)
        try:
            with open(os.path.join(process, "comm"), encoding="utf-8", errors="replace") as file:
                kind = file.read().rstrip("\n")
            if kind not in FOREGROUND or not _is_near(process, root):
                continue
            with open(os.path.join(process, "cmdline"), "rb") as file:
                argv = [os.fsdecode(word) for word in file.read().split(b"\0")[:-1]]
        except OSError:
            continue  # it has ended
        if argv:  # a zombie has none
            yield Client(int(entry), kind, argv)


def _is_near(process: str, root: str) -> bool:
    """Whether it sees the interfaces and files that this process sees: no container's."""
    own = os.path.join(root, "proc/self")
    return all(
        os.readlink(os.path.join(process, "ns", kind)) == os.readlink(os.path.join(own, "ns", kind))
        for kind in ("net", "mnt", "pid")
    )


def _restart(client: Client, root: str) -> None:
    process = os.path.join(root, "proc", str(client.pid))
    # Of one that was upgraded since, the kernel says so at the end.
    program = os.readlink(os.path.join(process, "exe")).removesuffix(" (deleted)")
    if not os.access(program, os.X_OK):
        raise FileNotFoundError(f"there is no {program} to start anew")
    with open(os.path.join(process, "environ"), "rb") as file:
        pairs = (entry.split(b"=", 1) for entry in file.read().split(b"\0") if b"=" in entry)
        environment = {os.fsdecode(name): os.fsdecode(value) for name, value in pairs}
    os.kill(client.pid, signal.SIGKILL)
    if set(client.argv) & set(FOREGROUND[client.kind]):
        return
    deadline = time.monotonic() + _GONE_SECONDS
    # Some refuse to start while the one that their file of the PID names is there.
    while os.path.exists(process) and time.monotonic() < deadline:
        time.sleep(_LOOK_AGAIN)
    subprocess.Popen(
        client.argv,
        executable=program,
        env=environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
