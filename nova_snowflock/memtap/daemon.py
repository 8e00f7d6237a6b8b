# SPDX-License-Identifier: Apache-2.0
"""What a memory server and a memtap have in common as processes: start, privileges, control."""

from collections.abc import Callable, Mapping
import dataclasses
import gc
import logging
import os
import signal
import sys
from typing import TypeVar

from nova_snowflock.memtap import control
from nova_snowflock.memtap import loop as event_loop
from nova_snowflock.memtap import privilege
from nova_snowflock.memtap import spec as process_spec

LOG = logging.getLogger(__name__)

_READY = b"ready\n"
_Spec = TypeVar("_Spec", process_spec.ServerSpec, process_spec.MemtapSpec)


@dataclasses.dataclass
class Process:
    """What a process does once it is set up.

    :param commands: for its control socket
    :param work: background work, for the loop
    :param close: called at the end
    """

    commands: Mapping[str, control.Command]
    work: Callable[[], float | None]
    close: Callable[[], None] = lambda: None


def run(kind: type[_Spec], set_up: Callable[[_Spec, event_loop.Loop], Process]) -> int:
    """Read the spec from standard input, go into the background, serve until told to stop.

    The caller waits until standard output says ``ready``, or why it never will be.
    """
    spec = process_spec.decode(kind, sys.stdin.buffer.read())
    read, write = os.pipe()
    if os.fork():
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            outcome = pipe.read()
        os.write(1, outcome or b"it ended at once\n")
        return 0 if outcome == _READY else 1
    os.close(read)
    try:
        loop, process, server = _start(spec, set_up)
        gc.freeze()  # what is here now stays, and need not be looked through again
    except Exception as error:
        os.write(write, f"{error or type(error).__name__}\n".encode())
        return 1
    os.write(write, _READY)
    os.close(write)
    try:
        loop.run(process.work)
    except Exception:
        LOG.exception("Image %s: the %s ends", spec.image, spec.role)
        return 1
    finally:
        server.drain()
        process.close()
    return 0


def _start(
    spec: _Spec, set_up: Callable[[_Spec, event_loop.Loop], Process]
) -> tuple[event_loop.Loop, Process, control.ControlServer]:
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    log = os.open(
        process_spec.log_path(spec.run_directory, spec.role),
        os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW,
        0o600,
    )
    for fd, replacement in enumerate((null, null, log)):
        os.dup2(replacement, fd)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")

    loop = event_loop.Loop()
    process = set_up(spec, loop)
    try:
        path = process_spec.socket_path(spec.run_directory, spec.role)
        server = control.ControlServer(path, process.commands, loop)
        privilege.drop(spec.user)
        loop.stop_on(signal.SIGTERM)
        server.start()
    except BaseException:
        process.close()
        raise
    return loop, process, server
