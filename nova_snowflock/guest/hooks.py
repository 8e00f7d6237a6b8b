# SPDX-License-Identifier: Apache-2.0
"""The administrator's programs that run around a fork.

They are executable files in a directory for each event, and run one after another in the order of
their names. A hook that runs while the guest is forked runs on in both; the clone's agent ends it
there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import json
import os
import re
import select
import signal
import stat
import subprocess
import time
from typing import Any

from nova_snowflock.guest import execute

DIRECTORY = "/etc/snowflock"

_LOOK_AGAIN = 0.05
_KEPT = 4096
# As much as is in a pipe at most, unless somebody has changed that.
_PIPE = 65536


def context(
    event: str,
    *,
    server: str | None,
    fork: str | None,
    parent: str | None = None,
    clone_id: int = 0,
    params: Mapping[str, Any] | None = None,
    error: str | None = None,
) -> dict[str, Any]:
    """What hooks are told of an event: ``prefork``, ``clone`` or ``parent``.

    :param error: why the fork failed, of ``parent``
    """
    return {
        "event": event,
        "fork": fork,
        "clone_id": clone_id,
        "parent": parent,
        "server": server,
        "error": error,
        "params": {str(name): str(value) for name, value in (params or {}).items()},
    }


def environment(told: Mapping[str, Any]) -> dict[str, str]:
    """The variables that tell it."""
    variables = {
        f"SNOWFLOCK_{name.upper()}": "" if value is None else str(value)
        for name, value in told.items()
        if name != "params"
    }
    for name, value in told["params"].items():
        variables["SNOWFLOCK_PARAM_" + re.sub(r"[^A-Z0-9]", "_", name.upper())] = value
    return variables


def run(
    directory: str,
    told: Mapping[str, Any],
    seconds: float,
    abandoned: Callable[[], bool] = lambda: False,
) -> list[str]:
    """Run the hooks of a directory.

    :param told: see :func:`context`; they get it as JSON on their standard input, too
    :param seconds: for all of them; who is not done by then is killed with its process group
    :param abandoned: whether to end right now
    :returns: a sentence for each that failed, was too slow or was not run
    """
    deadline = time.monotonic() + seconds
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return []
    except OSError as error:
        return [f"The hooks cannot be read: {error}."]
    suspicion = _suspicion(directory)
    if suspicion and names:
        return [f"The hooks of {directory} were not run: it {suspicion}."]
    problems = []
    for name in names:
        if abandoned():
            break
        path = os.path.join(directory, name)
        if name.startswith(".") or not os.path.isfile(path) or not os.access(path, os.X_OK):
            continue
        suspicion = _suspicion(path)
        if suspicion:
            problems.append(f"The hook {name} was not run: it {suspicion}.")
        elif time.monotonic() >= deadline:
            problems.append(f"The hook {name} was not run: no time was left.")
        else:
            try:
                problem = _run(path, told, deadline, abandoned)
            except (OSError, ValueError) as error:
                problem = f"could not be run: {error}"
            if problem:
                problems.append(f"The hook {name} {problem}.")
    return problems


def _suspicion(path: str) -> str | None:
    """Why root does not run it: someone else could have written it."""
    if os.geteuid() != 0:
        return None
    found = os.stat(path)
    if found.st_uid != 0:
        return f"belongs to user {found.st_uid}, not root"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return "may be written by others than root"
    return None


def _run(
    path: str, told: Mapping[str, Any], deadline: float, abandoned: Callable[[], bool]
) -> str | None:
    read, write = os.pipe()
    try:
        os.set_blocking(read, False)
        try:
            process = _start(path, told, write)
        finally:
            os.close(write)
        errors = b""
        poll = select.poll()
        poll.register(read, select.POLLIN)
        ended = False
        while True:
            # What it starts in the background may keep the pipe open: its own end is what counts.
            if not ended and poll.poll(_LOOK_AGAIN * 1000):
                said = _read(read)
                errors = (errors + said)[-_KEPT:]
                ended = not said
            elif ended:
                time.sleep(_LOOK_AGAIN / 10)
            status = process.poll()
            if status is not None:
                errors = (errors + _read(read, _PIPE))[-_KEPT:]
                return execute.ending(status, errors) if status else None
            if abandoned() or time.monotonic() >= deadline:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return None if abandoned() else "was too slow, and was killed"
    finally:
        os.close(read)


def _start(path: str, told: Mapping[str, Any], errors: int) -> subprocess.Popen[bytes]:
    # A file, which it need not read, and which cannot be full.
    stdin = os.memfd_create("hook")
    try:
        os.write(stdin, json.dumps(told).encode() + b"\n")
        os.lseek(stdin, 0, os.SEEK_SET)
        return subprocess.Popen(
            [path],
            stdin=stdin,
            stdout=2,
            stderr=errors,
            cwd="/",
            env={**os.environ, **environment(told)},
            start_new_session=True,
        )
    finally:
        os.close(stdin)


def _read(fd: int, size: int = _KEPT) -> bytes:
    try:
        return os.read(fd, size)
    except BlockingIOError:
        return b""
