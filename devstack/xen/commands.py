# SPDX-License-Identifier: Apache-2.0
"""Programs that make something."""

from collections.abc import Mapping, Sequence
import os
import pathlib
import subprocess
from typing import IO


class XenError(Exception):
    """The machine could not be made, started or reached; the message says what to look at."""


def run(
    argv: Sequence[str | pathlib.Path],
    *,
    cwd: pathlib.Path | None = None,
    environment: Mapping[str, str] | None = None,
    input: bytes | None = None,
    stdin: IO[bytes] | int | None = subprocess.DEVNULL,
) -> str:
    """Run a program to its end, which comes with that of this process; what it said.

    :raises XenError: it failed; with the last lines of what it said
    """
    done = subprocess.run(
        ["setpriv", "--pdeathsig", "KILL", *map(str, argv)],
        stdin=stdin if input is None else None,
        input=input,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        # Debian keeps some of these from the paths of ordinary users.
        env={
            **os.environ,
            "LC_ALL": "C",
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            **(environment or {}),
        },
        check=False,
    )
    said = done.stdout.decode(errors="replace")
    if done.returncode:
        last = "\n".join(said.splitlines()[-15:])
        raise XenError(f"{' '.join(map(str, argv))} ended with status {done.returncode}:\n{last}")
    return said
