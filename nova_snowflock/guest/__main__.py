# SPDX-License-Identifier: Apache-2.0
"""``python3 -m nova_snowflock.guest``: the agent, in the foreground."""

from __future__ import annotations

import glob
import logging
import os
import signal
import sys
import tty
from typing import Any

from nova_snowflock.guest import agent as guest_agent
from nova_snowflock.guest import becoming
from nova_snowflock.guest import programs
from nova_snowflock.guest import settings as guest_settings

LOG = logging.getLogger(__name__)


def find_port(port: str, root: str = "/") -> str:
    """Path of the virtio-serial port of that name.

    :raises FileNotFoundError: there is none (yet)
    """
    path = os.path.join(root, "dev/virtio-ports", port)
    if os.path.exists(path):
        return path
    # The name is udev's, which small guests are without.
    for name in glob.glob(os.path.join(glob.escape(root), "sys/class/virtio-ports/*/name")):
        with open(name, encoding="utf-8", errors="replace") as file:
            if file.read().strip() == port:
                return os.path.join(root, "dev", os.path.basename(os.path.dirname(name)))
    raise FileNotFoundError(f"no virtio-serial port is named {port}")


def open_port(port: str) -> int:
    """Open the port, or whatever is used in its place, to read and write and not to wait.

    :param port: its name, or a path

    :raises OSError: it is not there, or in use
    """
    fd = os.open(port if "/" in port else find_port(port), os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY)
    if os.isatty(fd):
        tty.setraw(fd)
    return fd


def main() -> int:
    """Entry point."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        settings = guest_settings.read()
        agent = guest_agent.Agent(lambda: open_port(settings.port), becoming.Steps(settings))
        server = programs.ProgramServer(agent)
    except (guest_settings.InvalidSettings, OSError) as error:
        print(f"snowflock-guest: {error}", file=sys.stderr)
        return 1

    def stop(_signal: int, _frame: Any) -> None:
        agent.stop()

    for ending in (signal.SIGTERM, signal.SIGINT):
        signal.signal(ending, stop)
    server.start()
    LOG.info("snowflock-guest %s has started", guest_agent.VERSION)
    agent.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
