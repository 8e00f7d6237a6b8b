# SPDX-License-Identifier: Apache-2.0
"""QEMU 7.2 emulates SVM with a flaw: after a while with several guests one of them gets the state
of the hypervisor, or of another guest, and ends by a triple fault. So does a guest that was never
touched. A test that loses its guest so is run again; one that finds something wrong is not.
"""

from collections.abc import Callable
import functools
from typing import Any, TypeVar

from nova_snowflock import exception
from tests import emulation
from tests.guest import client as guest_client
from tests.xen import guest

Result = TypeVar("Result")

_TIMES = 4
_LOST = (guest_client.GuestError, exception.SnowFlockError, OSError)
count = 0


def on_triple_faults(test: Callable[..., Result]) -> Callable[..., Result]:
    """Run a test, with its fixture ``host``, up to four times while its guests are lost so."""

    @functools.wraps(test)
    def run(*, host: emulation.Host, **fixtures: Any) -> Result:
        global count
        for _ in range(_TIMES - 1):
            before = host.run(guest.triple_faults)
            try:
                return test(host=host, **fixtures)
            except _LOST:
                if host.run(guest.triple_faults) == before:
                    raise
                count += 1
        return test(host=host, **fixtures)

    return run
