# SPDX-License-Identifier: Apache-2.0
from concurrent import futures
import threading

import libvirt
import pytest

from nova_snowflock.virt import connections

# libvirt's own, in memory.
URI = "test:///default"


def test_a_thread_has_one_to_itself() -> None:
    some = connections.Connections(URI)
    both = threading.Barrier(2)

    def two() -> tuple[libvirt.virConnect, libvirt.virConnect]:
        first = some.get()
        both.wait()
        return first, some.get()

    with futures.ThreadPoolExecutor(2) as pool:
        (a, again), (b, _) = (call.result() for call in [pool.submit(two), pool.submit(two)])
    assert a is again
    assert a is not b


@pytest.mark.parametrize("domain", [libvirt.VIR_FROM_RPC, libvirt.VIR_FROM_REMOTE])
def test_a_broken_one_is_replaced(monkeypatch: pytest.MonkeyPatch, domain: int) -> None:
    some = connections.Connections(URI)
    broken = some.get()
    error = libvirt.libvirtError("Cannot write data: Broken pipe")
    error.err = (libvirt.VIR_ERR_SYSTEM_ERROR, domain)

    def fail() -> None:
        raise error

    monkeypatch.setattr(broken, "getLibVersion", fail)
    assert some.get() is not broken
    assert some.get().isAlive()


def test_what_it_refuses_is_said() -> None:
    with pytest.raises(libvirt.libvirtError, match=r"no\.such\.file"):
        connections.Connections("test:///no.such.file").get()
