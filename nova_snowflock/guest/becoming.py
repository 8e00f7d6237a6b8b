# SPDX-License-Identifier: Apache-2.0
"""What a guest can do to itself when it was forked, as its administrator has chosen.

Apart from the agent, which says when: each step may fail, and the others are made all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
import os
from typing import Any

from nova_snowflock.guest import hooks
from nova_snowflock.guest import identity
from nova_snowflock.guest import network
from nova_snowflock.guest import protocol
from nova_snowflock.guest import settings as guest_settings


class Steps:
    """The steps. Those that return lists return a sentence for each problem; others raise."""

    def __init__(self, settings: guest_settings.Settings) -> None:
        self._settings = settings
        self.hook_seconds = settings.hook_seconds

    def clock(self, seconds: Any) -> None:
        """Set the clock; see :func:`identity.clock`."""
        identity.clock(seconds)

    def reseed(self, entropy: bytes) -> None:
        """See :func:`identity.reseed`."""
        identity.reseed(entropy)

    def configure(
        self, before: Sequence[protocol.Message], after: Sequence[protocol.Message]
    ) -> tuple[list[network.Device], list[str]]:
        """See :func:`network.configure`."""
        return network.configure(before, after)

    def missing(self, after: Sequence[protocol.Message]) -> list[str]:
        """See :func:`network.missing`."""
        return network.missing(after)

    def announce(self, devices: Sequence[network.Device]) -> list[str]:
        """Announce the addresses, have who looks after interfaces do so again, and look, too."""
        problems = network.announce(devices)
        if network.renew(devices, problems):
            network.settle(devices, problems)
        return problems

    def hostname(self, name: Any) -> None:
        """See :func:`identity.hostname`."""
        if self._settings.hostname == "set":
            identity.hostname(name)

    def machine_id(self, server: str) -> None:
        """See :func:`identity.machine_id`."""
        if self._settings.machine_id == "set":
            identity.machine_id(server)

    def ssh_host_keys(self) -> None:
        """See :func:`identity.ssh_host_keys`."""
        if self._settings.ssh_host_keys == "regenerate":
            identity.ssh_host_keys()

    def hooks(
        self, told: Mapping[str, Any], seconds: float, abandoned: Callable[[], bool]
    ) -> list[str]:
        """Run the hooks of the event; see :func:`hooks.run`."""
        directory = os.path.join(hooks.DIRECTORY, f"{told['event']}.d")
        return hooks.run(directory, told, seconds, abandoned)
