# SPDX-License-Identifier: Apache-2.0
"""DHCP clients that are started anew: busybox's own, in a network namespace, and scripts."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from nova_snowflock.guest import dhcp

ROOT = pathlib.Path(__file__).parents[3]
# Two interfaces with a client each, of which one is to ask anew.
SCRIPT = """
set -e
mount -t sysfs sysfs /sys
ln -s $(command -v busybox) {directory}/udhcpc
ip link add guest0 type veth peer name guest1
for name in guest0 guest1; do
    ip link set $name up
    {directory}/udhcpc -b -t 1 -T 1 -A 1 -i $name -p {directory}/$name.pid -s /bin/true
    # Whoever has gone into the background when nobody has answered writes its file again.
    until kill -0 $(cat {directory}/$name.pid) 2>/dev/null; do sleep 0.1; done
done
cd {directory}
cp guest0.pid before0
cp guest1.pid before1
cd {repository}
{python} -c 'from nova_snowflock.guest import dhcp
problems = []
assert dhcp.restart(["guest0"], problems), "none found"
assert not problems, problems'
until ! cmp -s {directory}/guest0.pid {directory}/before0 &&
    line=$(tr '\\0' ' ' 2>/dev/null </proc/$(cat {directory}/guest0.pid)/cmdline) && [ "$line" ]
do
    sleep 0.1
done
printf %s "$line"
! kill -0 $(cat {directory}/before0)
kill -0 $(cat {directory}/before1)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="network namespaces are for root")
def test_client_of_one_interface_asks_anew(tmp_path: pathlib.Path) -> None:
    script = SCRIPT.format(directory=tmp_path, repository=ROOT, python=sys.executable)
    done = subprocess.run(
        ("unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", script),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    options = f"-b -t 1 -T 1 -A 1 -i guest0 -p {tmp_path}/guest0.pid -s /bin/true"
    assert done.stdout == f"{tmp_path}/udhcpc {options} "


@contextlib.contextmanager
def client(directory: pathlib.Path, name: str, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """A script of that name, which notes each of its lives."""
    script = directory / name
    script.write_text('#!/bin/sh\necho "$TOLD $*" >>"$LOG"\nexec 3<"$PIPE"\nread line <&3\n')
    script.chmod(0o755)
    environment = {**os.environ, "LOG": str(directory / "log"), "PIPE": str(directory / "pipe")}
    os.mkfifo(directory / "pipe")
    running = subprocess.Popen((script, *options), env={**environment, "TOLD": "as before"})
    holder = os.open(directory / "pipe", os.O_RDWR)
    # As init does.
    threading.Thread(target=running.wait, daemon=True).start()
    try:
        lives(directory, 1)
        yield running
    finally:
        # Whoever waits for a line has one.
        os.write(holder, b"end\n" * 8)
        os.close(holder)
        running.kill()
        running.wait()


def lives(directory: pathlib.Path, number: int) -> list[str]:
    """What the client has noted, when it has lived so often."""
    deadline = time.monotonic() + 10
    while True:
        noted = (directory / "log").read_text() if (directory / "log").exists() else ""
        if noted.count("\n") >= number:
            return noted.splitlines()
        assert time.monotonic() < deadline, noted
        time.sleep(0.02)


def restarted(*names: str) -> list[str]:
    problems: list[str] = []
    assert dhcp.restart(names, problems)
    return problems


def test_client_has_its_options_and_environment(tmp_path: pathlib.Path) -> None:
    with client(tmp_path, "dhclient", "-nw", "lo") as running:
        assert restarted("lo") == []
        assert running.wait(10) == -signal.SIGKILL
        assert lives(tmp_path, 2) == ["as before -nw lo"] * 2


def test_client_of_no_interface_in_particular(tmp_path: pathlib.Path) -> None:
    with client(tmp_path, "dhclient"):
        assert restarted("eth7") == []
        assert lives(tmp_path, 2) == ["as before "] * 2


def test_client_that_somebody_else_starts_anew(tmp_path: pathlib.Path) -> None:
    with client(tmp_path, "udhcpc", "-f", "-i", "lo") as running:
        assert restarted("lo") == []
        assert running.wait(10) == -signal.SIGKILL
        time.sleep(0.2)
        assert len(lives(tmp_path, 1)) == 1


def test_other_interfaces_clients_go_on(tmp_path: pathlib.Path) -> None:
    with client(tmp_path, "dhclient", "lo") as running:
        problems: list[str] = []
        assert not dhcp.restart(["eth7"], problems)
        assert problems == []
        assert running.poll() is None


def test_client_that_cannot_be_started(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError("Out of memory")

    with client(tmp_path, "dhclient", "lo"):
        monkeypatch.setattr(subprocess, "Popen", refuse)
        assert restarted("lo") == ["dhclient has the parent's lease: Out of memory."]
