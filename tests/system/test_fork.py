# SPDX-License-Identifier: Apache-2.0
"""Forks of a real guest to clones on three hosts."""

from collections.abc import Callable, Iterator
from concurrent import futures
import contextlib
import secrets
import time
from typing import Any

import libvirt
import pytest

from demo import checks
from nova_snowflock import descriptor
from tests import emulation
from tests import engine
from tests.guest import client as guest_client
from tests.guest import domain

FILL_MIB = 16


@pytest.fixture(scope="module")
def engines(hosts: list[emulation.Host]) -> list[engine.Engine]:
    for host in hosts:
        domain.install_kernel(host)
    return [engine.Engine(host, background_rate=200) for host in hosts]


@pytest.fixture(scope="module")
def parent(engines: list[engine.Engine]) -> Iterator[guest_client.GuestClient]:
    """A guest on the first host that the tests share: it runs on, whatever they do."""
    with booted(engines[0], "parent", 256) as guest:
        yield guest


@contextlib.contextmanager
def booted(
    home: engine.Engine, name: str, memory_mib: int, **options: int
) -> Iterator[guest_client.GuestClient]:
    domain.boot(home.host, name, memory_mib, fill_mib=FILL_MIB, **options)
    try:
        with domain.client(home.host, name) as guest:
            guest.call("tick")
            yield guest
    finally:
        domain.destroy(home.host, name)


@contextlib.contextmanager
def forked(engines: list[engine.Engine], name: str = "parent") -> Iterator[engine.Image]:
    """An image of a guest on the first host, released on all hosts in the end."""
    image = engines[0].fork(name)
    try:
        yield image
    finally:
        for one in engines:
            one.release(image.uuid)


@contextlib.contextmanager
def spawned(
    home: engine.Engine, image: engine.Image, clone_id: int = 1, **options: Any
) -> Iterator[guest_client.GuestClient]:
    """A clone, which is connected to but may be paused."""
    name = f"clone{clone_id}-{secrets.token_hex(2)}"
    home.spawn(image, name, clone_id, **options)
    try:
        with domain.client(home.host, name) as guest:
            yield guest
    finally:
        domain.destroy(home.host, name)


def change_state(name: str, method: str) -> None:
    """On a host: suspend or resume a domain."""
    getattr(engine.find_domain(name), method)()


def is_paused(name: str) -> bool:
    return bool(engine.find_domain(name).state()[0] == libvirt.VIR_DOMAIN_PAUSED)


def test_clones_continue_and_diverge(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    digest = parent.call("digest")
    boot_id = parent.call("state")["boot_id"]
    before = parent.call("tick")["tick"]
    with forked(engines) as image, contextlib.ExitStack() as stack:
        history = parent.call("history")
        checks.count_is_unbroken("the parent", history)
        changed = parent.call("write", seed=0, pages=20)["digest"]
        clones = {
            f"clone{number}": stack.enter_context(spawned(home, image, number))
            for number, home in enumerate(engines, 1)
        }
        instants = {
            name: checks.clone_continues(name, clone.call("history"), history)
            for name, clone in clones.items()
        }
        checks.one_instant(instants, before, history[-1][0])
        for clone in clones.values():
            state = clone.call("state")
            assert (state["digest"], state["boot_id"]) == (digest, boot_id)

        written = [
            clone.call("write", seed=number, pages=20)["digest"]
            for number, clone in enumerate(clones.values(), 1)
        ]
        assert [clone.call("digest") for clone in clones.values()] == written
        assert parent.call("digest") == changed
        assert len({digest, changed, *written}) == 5


def test_paused_clone(engines: list[engine.Engine], parent: guest_client.GuestClient) -> None:
    with forked(engines) as image:
        history = parent.call("history")
        engines[1].spawn(image, "paused", paused=True)
        host = engines[1].host
        try:
            assert host.run(is_paused, "paused")
            with domain.client(host, "paused") as clone:
                with pytest.raises(guest_client.GuestError, match="no answer in time"):
                    clone.call("tick", timeout=0.5)
                host.run(change_state, "paused", "resume")
                checks.clone_continues("paused", clone.call("history"), history)
                assert clone.call("job")["checksum"] > 1
        finally:
            domain.destroy(host, "paused")


def test_two_forks_of_one_parent(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    first_digest = parent.call("digest")
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(forked(engines))
        second_digest = parent.call("write", seed=100, pages=50)["digest"]
        second = stack.enter_context(forked(engines))
        third_digest = parent.call("write", seed=101, pages=50)["digest"]
        younger = stack.enter_context(spawned(engines[1], second, 2, population="lazy"))
        with spawned(engines[1], first, 1) as older:
            assert older.call("digest") == first_digest
        for one in engines:
            one.release(first.uuid)
        assert younger.call("digest") == second_digest
        assert parent.call("digest") == third_digest


def test_clones_outlive_their_parent(engines: list[engine.Engine]) -> None:
    with contextlib.ExitStack() as stack:
        with booted(engines[0], "mortal", 256) as guest:
            digest = guest.call("digest")
            image = stack.enter_context(forked(engines, "mortal"))
            clone = stack.enter_context(spawned(engines[1], image, 1, population="lazy"))
        late = stack.enter_context(spawned(engines[2], image, 2, population="lazy"))
        assert engines[1].memtap(image.uuid)["pages"]["missing"]
        assert clone.call("digest") == digest
        assert late.call("digest") == digest


def test_clones_outlive_a_complete_image(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    """Once all memory is on the clones' host, the parent's host needs to keep nothing."""
    digest = parent.call("digest")
    with forked(engines) as image, spawned(engines[1], image, population="eager") as clone:
        wait_until(lambda: engines[1].memtap(image.uuid)["state"] == "detached")
        engines[0].release(image.uuid)
        assert clone.call("digest") == digest
        assert engines[1].memtap(image.uuid)["pages"]["missing"] == 0


def test_release_leaves_nothing(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    before = [one.footprint() for one in engines]
    with forked(engines) as image:
        assert any("frozen" in entry for entry in engines[0].footprint() - before[0])
        for home in engines[:2]:
            with spawned(home, image) as clone:
                clone.call("tick")
        assert any("mount" in entry for entry in engines[1].footprint() - before[1])
    assert [one.footprint() - old for one, old in zip(engines, before, strict=True)] == [set()] * 3
    for one in engines:
        one.release(image.uuid)


def test_concurrent_spawns_share_one_memtap(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    digest = parent.call("digest")
    names = [f"together{number}" for number in range(1, 5)]
    host = engines[1].host
    before = engines[1].footprint()
    with forked(engines) as image:
        try:
            with futures.ThreadPoolExecutor() as pool:
                list(pool.map(lambda name: engines[1].spawn(image, name), names))
            new = engines[1].footprint() - before
            assert sum("nova_snowflock.memtap.client.memtap" in entry for entry in new) == 1
            for name in names:
                with domain.client(host, name) as clone:
                    assert clone.call("digest") == digest
        finally:
            for name in names:
                domain.destroy(host, name)


def test_two_processors(engines: list[engine.Engine]) -> None:
    with booted(engines[0], "smp", 256, vcpus=2) as guest, contextlib.ExitStack() as stack:
        digest = guest.call("digest")
        image = stack.enter_context(forked(engines, "smp"))
        history = guest.call("history")
        clone = stack.enter_context(spawned(engines[1], image))
        checks.clone_continues("clone", clone.call("history"), history)
        assert clone.call("digest") == digest
        assert clone.call("job")["checksum"] == guest.call("job")["checksum"]
        assert descriptor.Descriptor.decode(image.descriptor).vcpus == 2


def test_memory_on_both_sides_of_the_pci_hole(engines: list[engine.Engine]) -> None:
    with booted(engines[0], "large", 4096) as guest, contextlib.ExitStack() as stack:
        digest = guest.call("digest")
        image = stack.enter_context(forked(engines, "large"))
        clone = stack.enter_context(spawned(engines[1], image))
        # The data is above the hole, for Linux takes memory from the top; the kernel is below.
        assert clone.call("digest") == digest
        assert clone.call("touch", mib=64) == {"mib": 64}
        assert clone.call("digest") == digest
        assert clone.call("memory")["MemTotal"] > 3 << 20


def test_fork_of_a_clone(engines: list[engine.Engine], parent: guest_client.GuestClient) -> None:
    """Of which next to nothing is on its host yet."""
    with contextlib.ExitStack() as stack:
        image = stack.enter_context(forked(engines))
        engines[1].spawn(image, "child", population="lazy")
        stack.callback(domain.destroy, engines[1].host, "child")
        missing = engines[1].memtap(image.uuid)["pages"]["missing"]
        grandchildren = engines[1].fork("child")
        for one in engines:
            stack.callback(one.release, grandchildren.uuid)
        assert missing > 0
        digest = parent.call("digest")
        with domain.client(engines[1].host, "child") as child:
            history = child.call("history")
            child.call("write", seed=7, pages=20)
        for home in (engines[2], engines[0]):
            clone = stack.enter_context(spawned(home, grandchildren))
            checks.clone_continues("clone", clone.call("history"), history)
            assert clone.call("digest") == digest


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_release_spares_clones_on_the_parents_host(
    engines: list[engine.Engine], parent: guest_client.GuestClient
) -> None:
    digest = parent.call("digest")
    home = engines[0]
    with forked(engines) as image:
        with spawned(home, image, population="eager") as clone:
            deadline = time.monotonic() + 60
            while home.memtap(image.uuid)["state"] != "detached":
                assert time.monotonic() < deadline
                time.sleep(0.05)
            home.release(image.uuid)
            assert home.memtap(image.uuid)["state"] == "detached"
            with pytest.raises(LookupError, match="no memory server"):
                home.memory_server(image.uuid)
            assert clone.call("digest") == digest
        home.release(image.uuid)
        with pytest.raises(LookupError, match="no memtap"):
            home.memtap(image.uuid)
