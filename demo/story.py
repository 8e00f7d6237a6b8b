# SPDX-License-Identifier: Apache-2.0
"""A story that happens in the cloud: bring that up, tell it, and say how it ended."""

import argparse
from collections.abc import Callable
import contextlib
import pathlib
import sys

import openstack.exceptions

from demo import checks
from demo import screen as demo_screen
from devstack.embedded import cloud
from devstack.embedded import processes
from devstack.embedded import settings
from tests.guest import client as guest_client


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """The options of every story."""
    made = argparse.ArgumentParser(prog=f"python -m {name}", description=description)
    made.add_argument("--record", type=pathlib.Path, metavar="PATH", help="write a picture, SVG")
    made.add_argument("--keep", action="store_true", help="leave the cloud up")
    return made


def tell(
    options: argparse.Namespace,
    story: Callable[[demo_screen.Screen, contextlib.ExitStack], None],
) -> int:
    """Tell a story in a cloud that ends with it, unless it ran before; the exit status.

    :param story: leaves on the stack what is to be undone
    """
    was_up = settings.STATE.exists()
    try:
        with demo_screen.Screen(options.record) as screen, contextlib.ExitStack() as stack:
            screen.title("An OpenStack cloud with three compute hosts, on this machine")
            if not (was_up or options.keep):
                stack.callback(cloud.down, screen.say)
            cloud.up(screen.say)
            story(screen, stack)
    except checks.CheckFailed as failure:
        print(f"The check failed: {failure}", file=sys.stderr)
        return 1
    except (
        guest_client.GuestError,
        openstack.exceptions.SDKException,
        processes.CloudError,
    ) as error:
        print(f"The demo failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
