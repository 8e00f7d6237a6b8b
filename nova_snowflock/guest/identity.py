# SPDX-License-Identifier: Apache-2.0
"""What tells a machine from its siblings, apart from its network: names, keys, randomness, time."""

from __future__ import annotations

from collections.abc import Callable
import errno
import fcntl
import glob
import math
import os
import re
import signal
import socket
import struct
import time
from typing import Any

from nova_snowflock.guest import execute
from nova_snowflock.guest import textfile

# linux/random.h: _IOW('R', 0x03, int[2]) and _IO('R', 0x07).
RNDADDENTROPY = 0x40085203
RNDRESEEDCRNG = 0x5207

_POOL_INFO = struct.Struct("=ii")
_ENTROPY = 32
_CLOCK_TOLERANCE = 0.5
_KEYGEN_SECONDS = 60.0
_NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,62}[A-Za-z0-9])?", re.ASCII)


def _set_time(seconds: float) -> None:
    time.clock_settime(time.CLOCK_REALTIME, seconds)


def clock(seconds: Any, set_time: Callable[[float], None] = _set_time) -> None:
    """Set the clock, unless it is right to half a second.

    :param seconds: since the epoch
    :raises ValueError: that is no time
    :raises OSError: it could not be set
    """
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise ValueError("the host told no time")
    if not math.isfinite(seconds) or not 0 < seconds < 1 << 33:
        raise ValueError(f"the host told a time that makes no sense: {seconds}")
    if abs(seconds - time.time()) > _CLOCK_TOLERANCE:
        set_time(seconds)


def reseed(entropy: bytes, device: str = "/dev/random") -> None:
    """Make the kernel's random numbers differ from those of its siblings from now on.

    :param entropy: random bytes that nobody else was given
    :raises ValueError: they are too few
    :raises OSError: the kernel goes on with what it had
    """
    if len(entropy) < _ENTROPY:
        raise ValueError(f"the host gave {len(entropy)} random bytes, not {_ENTROPY}")
    fd = os.open(device, os.O_RDWR)
    try:
        # struct rand_pool_info: how many bits it is worth, how many bytes there are, the bytes.
        info = _POOL_INFO.pack(len(entropy) * 8, len(entropy)) + entropy
        fcntl.ioctl(fd, RNDADDENTROPY, info)
        try:
            fcntl.ioctl(fd, RNDRESEEDCRNG)
        except OSError as error:
            # A generator that has no key yet refuses. Its first one is made of what was added.
            if error.errno == errno.ENODATA or (error.errno == errno.EINVAL and not _has_key()):
                return
            raise
    finally:
        os.close(fd)


def _has_key() -> bool:
    try:
        os.getrandom(1, os.GRND_NONBLOCK)
    except BlockingIOError:
        return False
    return True


def hostname(
    name: Any, root: str = "/", set_name: Callable[[str], None] = socket.sethostname
) -> None:
    """Set the host name, and the one that the next boot sets.

    :raises ValueError: that is no host name
    :raises OSError: it could not be set
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"the host told a name that is none: {name!r}")
    set_name(name)
    path = os.path.join(root, "etc/hostname")
    if textfile.is_regular(path):
        textfile.replace(path, name + "\n")


def machine_id(server: str, root: str = "/") -> None:
    """Make the server's UUID the machine ID, where there is one.

    :raises ValueError: it is no UUID
    :raises OSError: it could not be set
    """
    digits = server.replace("-", "").lower()
    if not re.fullmatch(r"[0-9a-f]{32}", digits):
        raise ValueError(f"the host told a server that is no UUID: {server!r}")
    for name in ("etc/machine-id", "var/lib/dbus/machine-id"):
        path = os.path.join(root, name)
        if textfile.is_regular(path):
            textfile.replace(path, digits + "\n")


def ssh_host_keys(root: str = "/") -> None:
    """Make new SSH host keys if there are any, and have the SSH server take them.

    :raises CommandFailed: there are none now, or the server has the parent's
    :raises OSError: they could not be removed, or the server not be told
    """
    private = glob.glob(os.path.join(glob.escape(root), "etc/ssh/ssh_host_*_key"))
    if not private:
        return
    if execute.find("ssh-keygen") is None:
        raise execute.CommandFailed("it has its parent's SSH host keys: there is no ssh-keygen")
    for path in private:
        os.unlink(path)
        if os.path.lexists(path + ".pub"):
            os.unlink(path + ".pub")
    execute.run("ssh-keygen", "-A", "-f", root, seconds=_KEYGEN_SECONDS)
    _reload_sshd(root)


def _reload_sshd(root: str) -> None:
    # systemctl may be there where systemd is not.
    if os.path.isdir(os.path.join(root, "run/systemd/system")) and execute.find("systemctl"):
        for unit in ("ssh.service", "sshd.service"):
            try:
                execute.run("systemctl", "is-active", "--quiet", unit)
            except execute.CommandFailed:
                continue  # it has another name here, or is started for each connection
            execute.run("systemctl", "try-reload-or-restart", unit)
            return
        return
    try:
        with open(os.path.join(root, "run/sshd.pid"), encoding="ascii") as file:
            pid = int(file.read())
        with open(os.path.join(root, f"proc/{pid}/comm"), encoding="utf-8") as file:
            is_sshd = file.read().startswith("sshd")
    except FileNotFoundError:
        return  # none runs
    if pid > 1 and is_sshd:
        os.kill(pid, signal.SIGHUP)
