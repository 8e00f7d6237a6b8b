# SPDX-License-Identifier: Apache-2.0
"""Names, keys, randomness, time; and the settings that say which of them are the guest's own."""

from __future__ import annotations

from collections.abc import Callable
import errno
import fcntl
import os
import pathlib
import signal
import stat
import struct
import subprocess
import time
from typing import Any

import pytest

from nova_snowflock.guest import __main__ as main
from nova_snowflock.guest import execute
from nova_snowflock.guest import identity
from nova_snowflock.guest import protocol
from nova_snowflock.guest import settings

SERVER = "0A1b2c3d-0000-4000-8000-123456789abc"
DIGITS = "0a1b2c3d000040008000123456789abc"


@pytest.fixture
def root(tmp_path: pathlib.Path) -> pathlib.Path:
    root = tmp_path / "root"
    for name in ("etc/ssh", "var/lib/dbus", "run", "proc"):
        (root / name).mkdir(parents=True)
    return root


@pytest.fixture
def program(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Puts a shell script in front of a program."""
    directory = tmp_path / "programs"
    directory.mkdir()
    monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")

    def program(name: str, script: str) -> None:
        (directory / name).write_text(f"#!/bin/sh\n{script}\n")
        (directory / name).chmod(0o755)

    return program


def test_clock() -> None:
    set_to: list[float] = []
    identity.clock(time.time() + 0.1, set_to.append)
    identity.clock(time.time() - 0.1, set_to.append)
    assert set_to == []
    for difference in (3600.0, -3600.0, 1.0):
        there = time.time() + difference
        identity.clock(there, set_to.append)
        assert set_to.pop() == there


@pytest.mark.parametrize("seconds", [None, "5", True, float("nan"), float("inf"), 0, -1, 10**30])
def test_no_time(seconds: Any) -> None:
    with pytest.raises(ValueError, match="told"):
        identity.clock(seconds, lambda _: pytest.fail("it was set"))


def test_hostname(root: pathlib.Path) -> None:
    names: list[str] = []
    identity.hostname("clone-1", str(root), names.append)
    assert names == ["clone-1"]
    path = root / "etc/hostname"
    assert not path.exists()
    path.write_text("parent\n")
    path.chmod(0o600)
    identity.hostname("clone-2.example.org", str(root), names.append)
    assert path.read_text() == "clone-2.example.org\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(os.listdir(root / "etc")) == ["hostname", "ssh"]


@pytest.mark.parametrize("name", [None, "", "-x", "a b", "a\n", "x" * 65, "a/b", "\N{SNOWFLAKE}"])
def test_no_hostname(root: pathlib.Path, name: Any) -> None:
    (root / "etc/hostname").write_text("parent\n")
    with pytest.raises(ValueError, match="name"):
        identity.hostname(name, str(root), lambda _: pytest.fail("it was set"))
    assert (root / "etc/hostname").read_text() == "parent\n"


def test_machine_id(root: pathlib.Path) -> None:
    first, second = root / "etc/machine-id", root / "var/lib/dbus/machine-id"
    identity.machine_id(SERVER, str(root))
    assert not first.exists()
    first.write_text("0" * 32 + "\n")
    first.chmod(0o444)
    second.symlink_to(first)
    identity.machine_id(SERVER, str(root))
    assert first.read_text() == DIGITS + "\n"
    assert stat.S_IMODE(first.stat().st_mode) == 0o444
    assert second.is_symlink()
    second.unlink()
    second.write_text("0" * 32 + "\n")
    identity.machine_id(SERVER, str(root))
    assert second.read_text() == DIGITS + "\n"
    with pytest.raises(ValueError, match="no UUID"):
        identity.machine_id("parent", str(root))


@pytest.mark.skipif(os.getuid() != 0, reason="entropy is credited by root")
def test_reseed_for_real() -> None:
    """The numbers are the kernel's own: it takes what is added, and knows the request."""
    identity.reseed(os.urandom(32))


def test_reseed(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    device = tmp_path / "random"
    device.write_bytes(b"")
    calls: list[tuple[int, Any]] = []
    failure = 0

    def ioctl(_fd: int, request: int, argument: Any = None) -> int:
        calls.append((request, argument))
        if request == 0x5207 and failure:
            raise OSError(failure, os.strerror(failure))
        return 0

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    entropy = bytes(range(32))
    identity.reseed(entropy, str(device))
    added = struct.pack("=ii", 256, 32) + entropy
    assert calls == [(0x40085203, added), (0x5207, None)]
    failure = errno.ENODATA
    identity.reseed(entropy, str(device))
    # A kernel that does not know the request would go on for minutes with what its siblings have.
    failure = errno.EINVAL
    with pytest.raises(OSError, match="Invalid"):
        identity.reseed(entropy, str(device))
    monkeypatch.setattr(os, "getrandom", raise_would_block)
    identity.reseed(entropy, str(device))
    failure = errno.EPERM
    with pytest.raises(OSError, match="permitted"):
        identity.reseed(entropy, str(device))
    calls.clear()
    with pytest.raises(ValueError, match="31 random bytes"):
        identity.reseed(entropy[1:], str(device))
    assert calls == []


def raise_would_block(_size: int, _flags: int) -> bytes:
    raise BlockingIOError


def keys(root: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (root / "etc/ssh").glob("ssh_host_*")}


def test_ssh_host_keys(root: pathlib.Path) -> None:
    if execute.find("ssh-keygen") is None:
        pytest.skip("there is no ssh-keygen")
    identity.ssh_host_keys(str(root))
    assert keys(root) == {}  # no SSH server, no keys
    for name in ("ssh_host_ed25519_key", "ssh_host_ed25519_key.pub", "ssh_host_dsa_key"):
        (root / "etc/ssh" / name).write_text("the parent's")
    with subprocess.Popen(
        ("sh", "-c", "trap 'exit 7' HUP; echo; while :; do sleep 0.01; done"),
        stdout=subprocess.PIPE,
    ) as server:
        assert server.stdout is not None
        server.stdout.readline()
        (root / "run/sshd.pid").write_text(f"{server.pid}\n")
        (root / f"proc/{server.pid}").mkdir()
        (root / f"proc/{server.pid}/comm").write_text("sshd\n")
        identity.ssh_host_keys(str(root))
        assert server.wait(10) == 7
    made = keys(root)
    assert "ssh_host_ed25519_key.pub" in made
    assert b"the parent's" not in made.values()
    assert "ssh_host_dsa_key" not in made or made["ssh_host_dsa_key"] != b"the parent's"


def test_another_process_has_the_ssh_servers_pid(
    root: pathlib.Path, program: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    program("ssh-keygen", "exit 0")
    (root / "etc/ssh/ssh_host_rsa_key").write_text("the parent's")
    (root / "run/sshd.pid").write_text("4711\n")
    (root / "proc/4711").mkdir()
    (root / "proc/4711/comm").write_text("bash\n")
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("it was signalled"))
    identity.ssh_host_keys(str(root))


@pytest.mark.parametrize("active", ["ssh.service", "sshd.service", ""])
def test_ssh_server_of_systemd(
    root: pathlib.Path, tmp_path: pathlib.Path, program: Callable[[str, str], None], active: str
) -> None:
    (root / "run/systemd/system").mkdir(parents=True)
    (root / "etc/ssh/ssh_host_rsa_key").write_text("the parent's")
    program("ssh-keygen", f'echo keygen "$@" >>{tmp_path}/log')
    program(
        "systemctl",
        f'echo "$@" >>{tmp_path}/log; [ "$1" != is-active ] || [ "$3" = "{active}" ]',
    )
    identity.ssh_host_keys(str(root))
    first, *_, last = (tmp_path / "log").read_text().splitlines()
    assert first == f"keygen -A -f {root}"
    assert last == (
        f"try-reload-or-restart {active}" if active else "is-active --quiet sshd.service"
    )


def test_ssh_keys_that_cannot_be_made(
    root: pathlib.Path, program: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "etc/ssh/ssh_host_rsa_key").write_text("the parent's")
    program("ssh-keygen", "echo no space left >&2; exit 255")
    with pytest.raises(execute.CommandFailed, match="no space left"):
        identity.ssh_host_keys(str(root))
    (root / "etc/ssh/ssh_host_rsa_key").write_text("the parent's")
    monkeypatch.setattr(execute, "find", lambda _: None)
    with pytest.raises(execute.CommandFailed, match="there is no ssh-keygen"):
        identity.ssh_host_keys(str(root))
    assert keys(root) == {"ssh_host_rsa_key": b"the parent's"}


def test_commands(program: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(execute.CommandFailed, match="there is no no-such-program"):
        execute.run("no-such-program", "x")
    program("slow", "exec sleep 1000")
    with pytest.raises(execute.CommandFailed, match=r"slow: not done after 0\.1 s"):
        execute.run("slow", seconds=0.1)
    program("killed", "kill -KILL $$")
    with pytest.raises(execute.CommandFailed, match=f"killed: signal {signal.SIGKILL.value}"):
        execute.run("killed")
    program("fine", "exit 0")
    execute.run("fine")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert execute.find("ip") in ("/usr/sbin/ip", "/sbin/ip", None)


def test_settings(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "guest.conf"
    assert settings.read(str(path)) == settings.Settings()
    assert settings.Settings().port == protocol.PORT
    path.write_text("# nothing\n")
    assert settings.read(str(path)) == settings.Settings()
    path.write_text(
        "[guest]\nport = /dev/ttyS1\nssh_host_keys = keep\nhostname=keep\nmachine_id: keep\n"
        "hook_seconds = 2.5\n"
    )
    assert settings.read(str(path)) == settings.Settings("/dev/ttyS1", "keep", "keep", "keep", 2.5)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("port = x\n", "no section headers"),
        ("[guest]\nhostname = change\n", "hostname must be set or keep, not 'change'"),
        ("[guest]\nhook_seconds = soon\n", "hook_seconds must be a number"),
        ("[guest]\nhook_seconds = nan\n", "hook_seconds must be a number"),
        ("[guest]\nhook_seconds = 0\n", "hook_seconds must be a number"),
        ("[guest]\nhostnam = keep\n", "no option hostnam"),
        ("[gust]\nhostname = keep\n", r"no section \[gust\]"),
        ("[guest]\n\xff", "guest.conf"),
    ],
)
def test_invalid_settings(tmp_path: pathlib.Path, text: str, complaint: str) -> None:
    path = tmp_path / "guest.conf"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(settings.InvalidSettings, match=complaint):
        settings.read(str(path))


def test_find_port(tmp_path: pathlib.Path) -> None:
    with pytest.raises(FileNotFoundError, match="no virtio-serial port"):
        main.find_port("a.port", str(tmp_path))
    for number, name in enumerate(("another.port", "a.port")):
        directory = tmp_path / f"sys/class/virtio-ports/vport0p{number}"
        directory.mkdir(parents=True)
        (directory / "name").write_text(name + "\n")
    assert main.find_port("a.port", str(tmp_path)) == f"{tmp_path}/dev/vport0p1"
    (tmp_path / "dev/virtio-ports").mkdir(parents=True)
    (tmp_path / "dev/virtio-ports/a.port").write_text("")
    assert main.find_port("a.port", str(tmp_path)) == f"{tmp_path}/dev/virtio-ports/a.port"


def test_open_port() -> None:
    host, guest = os.openpty()
    try:
        fd = main.open_port(os.ttyname(guest))
        try:
            with pytest.raises(BlockingIOError):
                os.read(fd, 1)
            os.write(host, b"\x03\n")  # no interrupt, no line discipline
            assert os.read(fd, 10) == b"\x03\n"
        finally:
            os.close(fd)
    finally:
        os.close(host)
        os.close(guest)
