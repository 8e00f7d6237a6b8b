# SPDX-License-Identifier: Apache-2.0
"""Disks of forked servers as Nova keeps them: their formats, further disks, config drives."""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
import pathlib
import secrets
import subprocess
from typing import Any

import libvirt
from lxml import etree
import pytest

from devstack.embedded import hosts
from devstack.embedded import settings
from nova_snowflock.virt import disk_info
from tests.cloud import console
from tests.cloud import family
from tests.guest import client as guest_client

pytestmark = pytest.mark.usefixtures("cloud")

MIB = family.MIB
INSTANCES = pathlib.Path("/var/lib/nova/instances")
CONFIG_DRIVE = "disk.config"
[RAW_HOST] = settings.RAW_HOSTS
QCOW2_HOST = "host1"
QCOW2_MAGIC = b"QFI\xfb"

# Where tests write in each disk: past all that is of the image, or of mkfs and mkswap.
OFFSETS = {"vda": 600 * MIB, "vdb": 700 * MIB, "vdc": 32 * MIB}
FLAVOR = f"disks-{secrets.token_hex(2)}"


@pytest.fixture(scope="module")
def flavor(cloud: None) -> Iterator[str]:
    """A flavor with an ephemeral disk, vdb, and a swap disk, vdc."""
    admin = family.compute("admin")
    made = admin.create_flavor(name=FLAVOR, ram=256, vcpus=1, disk=1, ephemeral=1, swap=64)
    yield FLAVOR
    admin.delete_flavor(made)


@pytest.fixture(autouse=True)
def nothing_remains(cloud: None) -> Iterator[None]:
    with family.nothing_left():
        yield


@dataclasses.dataclass(frozen=True)
class Disk:
    """A writable disk of a server.

    :param formats: what it is to the domain that runs, to the domain's definition, to Nova
        (disk.info), and by its first bytes
    :param layers: how many files it consists of
    """

    formats: tuple[str, str, str, str]
    layers: int


def disks(server: str) -> dict[str, Disk]:
    """A server's disks, by their names in the guest."""
    return dict(hosts.attach(family.host_of(server)).run(_disks, server))


def _disks(server: str) -> dict[str, Disk]:
    """On the server's host."""
    with libvirt.open("qemu:///system") as connection:
        domain = connection.lookupByUUIDString(server)
        live = _drivers(domain.XMLDesc())
        defined = _drivers(domain.XMLDesc(libvirt.VIR_DOMAIN_XML_INACTIVE))
    noted = json.loads((INSTANCES / server / "disk.info").read_text())
    found = {}
    for target, (path, kind) in live.items():
        with open(path, "rb") as file:
            actual = "qcow2" if file.read(4) == QCOW2_MAGIC else "raw"
        command = ["qemu-img", "info", "-U", "-f", kind, "--backing-chain", "--output=json", path]
        chain = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        found[target] = Disk(
            (kind, defined[target][1], noted[disk_info.disk_of(path)], actual), len(chain)
        )
    return found


def _drivers(description: str) -> dict[str, tuple[str, str]]:
    """Path and format of each writable disk in a domain's XML, by its name in the guest."""
    found = {}
    for disk in etree.fromstring(description).iterfind("devices/disk[@device='disk']"):
        source, target, driver = (disk.find(tag) for tag in ("source", "target", "driver"))
        assert source is not None
        assert target is not None
        assert driver is not None
        found[str(target.get("dev"))] = (str(source.get("file")), str(driver.get("type")))
    return found


def all_are(kind: str, layers: int, *targets: str) -> dict[str, Disk]:
    """What :func:`disks` must be."""
    return dict.fromkeys(targets or ("vda",), Disk((kind, kind, kind, kind), layers))


def files(server: str) -> list[str]:
    """The files of its disks, by name."""
    return list(hosts.attach(family.host_of(server)).run(_files, server))


def _files(server: str) -> list[str]:
    names = sorted(os.listdir(INSTANCES / server))
    return [name for name in names if name.startswith("disk") and name != "disk.info"]


def digest(guest: guest_client.GuestClient, target: str = "vda") -> str:
    answer = guest.call("disk_digest", disk=target, offset=OFFSETS[target], length=MIB)
    return str(answer["digest"])


def write(guest: guest_client.GuestClient, seed: int, target: str = "vda") -> str:
    guest.call("disk_write", disk=target, offset=OFFSETS[target], seed=seed, length=MIB)
    return digest(guest, target)


def reboot_hard(server: str) -> None:
    family.compute().reboot_server(server, "HARD")
    family.wait_for_status(server)


def stop_and_start(server: str) -> None:
    compute = family.compute()
    compute.stop_server(server)
    family.wait_for_status(server, "SHUTOFF")
    compute.start_server(server)
    family.wait_for_status(server)


def release(parent: str, fork: dict[str, Any]) -> None:
    family.request("DELETE", f"/servers/{parent}/forks/{fork['id']}")


def test_raw_parent() -> None:
    with family.placed("raw-parent", RAW_HOST) as parent, contextlib.ExitStack() as stack:
        assert disks(parent) == all_are("raw", 1)
        with family.talk(parent) as guest:
            content = write(guest, 1)
        fork = family.fork(parent, count=2)
        stack.callback(family.delete, *family.clones_of(fork))
        with family.scheduled_on(RAW_HOST):
            more = family.fork(parent, fork_id=fork["id"], count=1)
        stack.callback(family.delete, *family.clones_of(more))
        [neighbour] = family.clones_of(more)
        assert family.host_of(neighbour) == RAW_HOST
        assert disks(parent) == all_are("qcow2", 2)
        with family.talk(parent) as guest:
            theirs = write(guest, 2)
        for seed, clone in enumerate((*family.clones_of(fork), neighbour), 10):
            assert set(disks(clone)["vda"].formats) == {"qcow2"}
            with family.talk(clone) as guest:
                assert digest(guest) == content
                own = write(guest, seed)
            reboot_hard(clone)
            with family.talk(clone) as guest:
                assert digest(guest) == own
        release(parent, fork)
        family.wait_until(lambda: disks(parent) == all_are("raw", 1), 60)
        assert files(parent) == ["disk"]
        with family.talk(parent) as guest:
            assert digest(guest) == theirs
            theirs = write(guest, 3)
        for restart in (reboot_hard, stop_and_start):
            restart(parent)
            assert disks(parent) == all_are("raw", 1)
            with family.talk(parent) as guest:
                assert digest(guest) == theirs


@pytest.mark.parametrize("host", [QCOW2_HOST, RAW_HOST])
def test_parent_that_is_started_from_its_layers(host: str) -> None:
    with family.placed("layered", host) as parent:
        plain = disks(parent)
        layered = all_are("qcow2", plain["vda"].layers + 1)
        for seed, restart in enumerate((reboot_hard, stop_and_start)):
            with family.forked(parent, count=0, checkpoint=True):
                with family.talk(parent) as guest:
                    content = write(guest, seed)
                restart(parent)
                assert disks(parent) == layered
                with family.talk(parent) as guest:
                    assert digest(guest) == content
            family.wait_until(lambda: disks(parent) == plain, 60)
            with family.talk(parent) as guest:
                assert digest(guest) == content
        # libvirt knows the disk by a layer's name.
        family.act(parent, "suspend")
        family.wait_for_status(parent, "SUSPENDED")
        family.act(parent, "resume")
        family.wait_for_status(parent)
        with family.talk(parent) as guest:
            content = write(guest, 9)
        reboot_hard(parent)
        assert disks(parent) == plain
        with family.talk(parent) as guest:
            assert digest(guest) == content


def test_parent_that_is_stopped_gets_its_raw_disk_back() -> None:
    compute = family.compute()
    with family.placed("raw-stopped", RAW_HOST) as parent:
        with family.talk(parent) as guest:
            write(guest, 1)
        fork = family.fork(parent, count=0, checkpoint=True)
        with family.talk(parent) as guest:
            content = write(guest, 2)
        compute.stop_server(parent)
        family.wait_for_status(parent, "SHUTOFF")
        release(parent, fork)
        family.wait_until(lambda: disks(parent) == all_are("raw", 1), 60)
        assert files(parent) == ["disk"]
        compute.start_server(parent)
        family.wait_for_status(parent)
        with family.talk(parent) as guest:
            assert digest(guest) == content


def test_released_while_it_is_rescued() -> None:
    """Its layers are left alone until it has its own disk again, of which Nova wrote before."""
    with family.placed("rescued", RAW_HOST) as parent:
        with family.talk(parent) as guest:
            write(guest, 1)
        with family.forked(parent, count=0, checkpoint=True):
            with family.talk(parent) as guest:
                content = write(guest, 2)
            family.request("POST", f"/servers/{parent}/action", {"rescue": {}})
            family.wait_for_status(parent, "RESCUE")
        assert disks(parent) == {**all_are("raw", 1), **all_are("qcow2", 2, "vdb")}
        family.request("POST", f"/servers/{parent}/action", {"unrescue": None})
        family.wait_for_status(parent)
        with family.talk(parent) as guest:
            assert digest(guest) == content
        family.wait_until(lambda: disks(parent) == all_are("raw", 1), 90)
        with family.talk(parent) as guest:
            assert digest(guest) == content


def test_clone_where_disks_are_raw() -> None:
    with family.placed("qcow2-parent", QCOW2_HOST) as parent:
        with family.talk(parent) as guest:
            content = write(guest, 1)
        with family.scheduled_on(RAW_HOST):
            fork = family.fork(parent, count=1, population="background")
        [clone] = family.clones_of(fork)
        try:
            assert family.host_of(clone) == RAW_HOST
            layers = disks(clone)["vda"].layers
            assert disks(clone) == all_are("qcow2", layers)
            with family.talk(clone) as guest:
                assert digest(guest) == content
                content = write(guest, 2)
            reboot_hard(clone)
            assert disks(clone) == all_are("qcow2", layers)
            with family.talk(clone) as guest:
                assert digest(guest) == content
            # When all of it is there it is copied: all but Nova's copy of the image.
            family.wait_until(lambda: disks(clone) == all_are("qcow2", 2), 180)
            stop_and_start(clone)
            assert disks(clone) == all_are("qcow2", 2)
            with family.talk(clone) as guest:
                assert digest(guest) == content
            # It is a server as any other there, and can be a parent.
            with family.forked(clone, count=1) as second:
                [grandchild] = family.clones_of(second)
                with family.talk(grandchild) as guest:
                    assert digest(guest) == content
            family.wait_until(lambda: disks(clone) == all_are("qcow2", 2), 60)
        finally:
            release(parent, fork)
            family.delete(clone)


@pytest.mark.parametrize("population", ["lazy", "eager"])
def test_suspended_clone_whose_host_reboots(population: str) -> None:
    """Its memory is on its host's disk then, but still a mapping of its image's, even if nothing
    else of the clone is."""
    with family.placed("host1-parent", "host1") as parent, contextlib.ExitStack() as stack:
        with family.scheduled_on("host2"):
            fork = stack.enter_context(family.forked(parent, population=population))
        [clone] = family.clones_of(fork)
        with family.talk(clone) as guest:
            content = write(guest, 1)
            before = guest.call("state")
        if population == "eager":
            family.wait_until(lambda: disks(clone) == all_are("qcow2", 2), 60)
        family.act(clone, "suspend")
        family.wait_for_status(clone, "SUSPENDED")
        family.reboot("host2")
        family.act(clone, "resume")
        family.wait_for_status(clone)
        with family.talk(clone) as guest:
            after = guest.call("state")
            assert (after["boot_id"], after["digest"]) == (before["boot_id"], before["digest"])
            assert after["tick"] > before["tick"]
            assert digest(guest) == content


@pytest.mark.parametrize("host", [QCOW2_HOST, RAW_HOST])
def test_ephemeral_and_swap_disks(flavor: str, host: str) -> None:
    own = "raw" if host == RAW_HOST else "qcow2"
    with family.placed(f"disks-{own}", host, flavor) as parent:
        with family.talk(parent) as guest:
            before = {target: write(guest, seed, target) for seed, target in enumerate(OFFSETS)}
        plain = disks(parent)
        assert plain == all_are(own, 1 if own == "raw" else 2, *OFFSETS)
        with family.forked(parent, count=2) as fork:
            with family.talk(parent) as guest:
                theirs = {
                    target: write(guest, seed, target) for seed, target in enumerate(OFFSETS, 10)
                }
            for number, clone in enumerate(family.clones_of(fork), 2):
                with family.talk(clone) as guest:
                    assert {target: digest(guest, target) for target in OFFSETS} == before
                    now = {
                        target: write(guest, seed, target)
                        for seed, target in enumerate(OFFSETS, number * 10)
                    }
                reboot_hard(clone)
                with family.talk(clone) as guest:
                    assert {target: digest(guest, target) for target in OFFSETS} == now
                assert all(set(disk.formats) == {"qcow2"} for disk in disks(clone).values())
        family.wait_until(lambda: disks(parent) == plain, 60)
        assert files(parent) == ["disk", "disk.eph0", "disk.swap"]
        reboot_hard(parent)
        with family.talk(parent) as guest:
            assert {target: digest(guest, target) for target in OFFSETS} == theirs


def test_clone_has_a_config_drive_of_its_own() -> None:
    with family.placed("configured", QCOW2_HOST, config_drive=True) as parent:
        with family.talk(parent) as guest:
            content = write(guest, 1)
        with family.forked(parent, count=2) as fork:
            for clone in fork["clones"]:
                server = clone["server_id"]
                assert family.compute().get_server(server).has_config_drive
                for restart in (None, reboot_hard):
                    if restart is not None:
                        restart(server)
                    with family.talk(server) as guest:
                        assert digest(guest) == content
                    told = hosts.attach(family.host_of(server)).run(_config_drive, server)
                    assert told["uuid"] == server
                    assert told["name"] == clone["name"]
        told = hosts.attach(QCOW2_HOST).run(_config_drive, parent)
        assert told["uuid"] == parent


def _config_drive(server: str) -> dict[str, Any]:
    """On its host: meta_data.json on the CD in the server's drive, by its domain."""
    source = console.description(server).find("devices/disk[@device='cdrom']/source")
    assert source is not None
    file = source.get("file")
    assert file == str(INSTANCES / server / CONFIG_DRIVE)
    command = ["isoinfo", "-R", "-i", file, "-x", "/openstack/latest/meta_data.json"]
    done = subprocess.run(command, check=True, capture_output=True)
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("host", [QCOW2_HOST, RAW_HOST])
def test_forks_leave_no_layers(host: str) -> None:
    with family.placed("often", host) as parent:
        plain = disks(parent)
        with family.talk(parent) as guest:
            for seed in range(5):
                with family.forked(parent, count=0, checkpoint=True):
                    content = write(guest, seed)
                family.wait_until(lambda: disks(parent) == plain, 60)
        with contextlib.ExitStack() as forks:
            for alive in range(1, 6):
                forks.enter_context(family.forked(parent, count=0, checkpoint=True))
                assert disks(parent)["vda"].layers == plain["vda"].layers + alive
        family.wait_until(lambda: disks(parent) == plain, 60)
        assert files(parent) == ["disk"]
        with family.talk(parent) as guest:
            assert digest(guest) == content
