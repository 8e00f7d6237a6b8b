# SPDX-License-Identifier: Apache-2.0
"""What a back end's methods have in common: stages that are timed, and errors that are promised."""

from collections.abc import Iterator
import contextlib
import time

import libvirt
from oslo_log import log as logging

from nova_snowflock import exception

LOG = logging.getLogger(__name__)


class Stopwatch:
    """Seconds between laps, by the name of what was done, in order."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """What was done since the last one has that name."""
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


@contextlib.contextmanager
def raised_as(kind: type[exception.SnowFlockError]) -> Iterator[None]:
    """Raise what fails inside as the one error that the caller is promised."""
    try:
        yield
    except kind:
        raise
    except (exception.SnowFlockError, OSError, libvirt.libvirtError) as error:
        raise kind(str(error)) from error


@contextlib.contextmanager
def ended_on_failure(domain: libvirt.virDomain) -> Iterator[None]:
    """Have a clone end if what is inside fails."""
    try:
        yield
    except BaseException:
        try:
            domain.destroy()
        except libvirt.libvirtError as error:
            if error.get_error_code() not in (
                libvirt.VIR_ERR_NO_DOMAIN,  # it has ended, and that may be what failed
                libvirt.VIR_ERR_OPERATION_INVALID,
            ):
                LOG.error("The clone %s is left, stopped: %s", domain.name(), error)
        raise
