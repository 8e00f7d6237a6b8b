# SPDX-License-Identifier: Apache-2.0
"""A fork as a user asks for it, and what came of it, in tables."""

import datetime
import subprocess
import time
from typing import Any

from demo import checks
from demo import screen as demo_screen
from devstack.embedded import identity
from tests.cloud import family


class Forking:
    """One fork of a server.

    :param server: its UUID; it has no other forks
    """

    def __init__(self, screen: demo_screen.Screen, server: str, name: str, count: int) -> None:
        self._screen = screen
        self._server = server
        self._name = name
        self._count = count
        self._asked = self._answered = 0.0

    def run(self) -> dict[str, Any]:
        """Fork the server; the fork as the API shows it. To be cleaned whatever happens.

        :raises CheckFailed: the command failed
        """
        self._screen.title(f"$ openstack server fork --count {self._count} --wait {self._name}")
        command = f"openstack server fork --count {self._count} --wait -f json {self._server}"
        self._asked = time.time()
        process = subprocess.Popen(
            ["bash", "-c", f"source {identity.OPENRC} demo && exec {command}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        for line in process.stderr:
            if line.strip():
                self._screen.say(line.rstrip())
        checks.check(process.wait() == 0, "openstack server fork failed")
        self._answered = time.time()
        [listed] = family.request("GET", f"/servers/{self._server}/forks")["forks"]
        return family.show(self._server, listed["id"])

    def clean(self) -> None:
        """Delete the clones and release the image."""
        for fork in family.request("GET", f"/servers/{self._server}/forks")["forks"]:
            family.request("DELETE", f"/servers/{self._server}/forks/{fork['id']}")

    def summary(self, fork: dict[str, Any]) -> None:
        """Print where time and memory went."""
        captured = datetime.datetime.fromisoformat(fork["created_at"]).timestamp()
        stages = {**fork["stages"], "in all": fork["pause"]}
        self._screen.show_table(
            f"Where the parent's pause went (ms); its memory was frozen by {fork['method']}",
            list(stages),
            [[f"{seconds * 1e3:.1f}" for seconds in stages.values()]],
        )
        self._screen.show_table(
            f"Seconds from the command's start: captured after {captured - self._asked:.2f}, all "
            f"clones active and said to be so after {self._answered - self._asked:.2f}",
            [
                *("clone", "host", "scheduled", "disks", "network", "runs"),
                *("faults", "multicast", "unicast"),
            ],
            [self._row(clone) for clone in fork["clones"]],
        )

    def _row(self, clone: dict[str, Any]) -> list[str]:
        times = clone["times"]
        return [
            clone["name"],
            family.host_of(clone["server_id"]),
            *(f"{times[stage] - self._asked:.2f}" for stage in ("spawn", "disks", "guest")),
            f"{times['running'] - self._asked:.2f}",
            # A host that has nothing of the image any more does not know.
            "" if clone["faults"] is None else str(clone["faults"]),
            *(_megabytes(clone[path]) for path in ("bytes_multicast", "bytes_unicast")),
        ]


def _megabytes(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f} MB"
