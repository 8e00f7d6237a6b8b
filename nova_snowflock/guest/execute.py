# SPDX-License-Identifier: Apache-2.0
"""Running the guest's own programs, never through a shell."""

from __future__ import annotations

from collections.abc import Sequence
import os
import subprocess

_LIMIT = 20.0
# A service's PATH need not have those of administrators.
_FURTHER = ("/usr/local/sbin", "/usr/sbin", "/sbin")


class CommandFailed(Exception):
    """A program is not there, failed, or took too long. The message says which and why."""


def find(program: str) -> str | None:
    """Path of a program that can be run, if there is one."""
    for directory in (*os.get_exec_path(), *_FURTHER):
        path = os.path.join(directory, program)
        if os.path.isfile(path) and os.access(path, os.X_OK):
            return path
    return None


def run(program: str, *arguments: str, seconds: float = _LIMIT) -> str:
    """Run a program to its end, and return what it said.

    :param seconds: how long it may take
    :raises CommandFailed: it did not succeed
    """
    said = " ".join((program, *arguments))
    path = find(program)
    if path is None:
        raise CommandFailed(f"{said}: there is no {program}")
    try:
        done = subprocess.run(
            (path, *arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"{said}: not done after {seconds:g} s") from error
    except (OSError, ValueError) as error:
        raise CommandFailed(f"{said}: {error}") from error
    if done.returncode:
        raise CommandFailed(f"{said}: {ending(done.returncode, done.stderr)}")
    return done.stdout.decode(errors="replace")


def ending(status: int, errors: bytes) -> str:
    """How a program ended, for a sentence: its status, and the last line that it complained."""
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    lines: Sequence[str] = errors.decode(errors="replace").strip().splitlines()
    return f"{how}: {lines[-1][:200]}" if lines else how
