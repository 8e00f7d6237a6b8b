# SPDX-License-Identifier: Apache-2.0
"""Real networks: neutron's, by OVN and Open vSwitch on each host; and clones on them."""

from collections.abc import Iterator
import contextlib
import secrets
from typing import Any

import pytest

from devstack.embedded import hosts
from devstack.embedded import identity
from devstack.embedded import image
from devstack.embedded import settings
from tests.cloud import family
from tests.cloud import senders

pytestmark = pytest.mark.usefixtures("cloud")


@pytest.fixture(autouse=True)
def nothing_remains(cloud: None) -> Iterator[None]:
    with family.nothing_left():
        yield


@pytest.fixture(scope="module")
def flavor(cloud: None) -> Iterator[str]:
    """A flavor whose servers' clones keep their parent's interfaces."""
    admin = family.compute("admin")
    made = admin.create_flavor(name=f"none-{secrets.token_hex(2)}", ram=256, vcpus=1, disk=1)
    admin.create_flavor_extra_specs(made, {"snowflock:identity": "none"})
    yield made.name
    admin.delete_flavor(made)


@contextlib.contextmanager
def parent_on(*networks: str, **options: Any) -> Iterator[str]:
    """A server on host1, whose interfaces have their addresses."""
    options["networks"] = family.on(*networks)
    with family.placed(f"net-{secrets.token_hex(2)}", "host1", **options) as parent:
        family.wait_until(lambda: addresses(parent) == assigned(parent), 60)
        yield parent


@contextlib.contextmanager
def network(**options: Any) -> Iterator[str]:
    """The name of a network of the demo project.

    :param options: of its subnet of IPv4
    """
    neutron = identity.client("demo").network
    made = neutron.create_network(name=f"net-{secrets.token_hex(2)}")
    try:
        neutron.create_subnet(network_id=made.id, ip_version=4, cidr="10.99.0.0/24", **options)
        yield made.name
    finally:
        neutron.delete_network(made)


def addresses(server: str) -> set[str]:
    """Those that a server's guest has."""
    with family.talk(server) as guest:
        return set(guest.call("addresses"))


def assigned(server: str) -> set[str]:
    """Those that neutron gave to a server."""
    return {ip["ip_address"] for port in family.ports(server) for ip in port.fixed_ips}


def macs(server: str) -> set[str]:
    with family.talk(server) as guest:
        return set(guest.call("interfaces").values())


def is_itself(clone: str) -> bool:
    """Whether a guest has the addresses, MACs included, of its own ports and no others."""
    own = {port.mac_address for port in family.ports(clone)}
    return macs(clone) == own and addresses(clone) == assigned(clone)


def become(clone: str) -> None:
    """Have a guest take the addresses of its own port, as somebody in it could."""
    [port] = family.ports(clone)
    prefix = settings.PROVIDER.prefixlen
    with family.talk(clone) as guest:
        for words in (
            "link set eth0 down",
            f"link set eth0 address {port.mac_address}",
            "link set eth0 up",
            "address flush dev eth0",
            f"address add {family.address(clone)}/{prefix} dev eth0",
        ):
            assert guest.call("run", argv=["ip", *words.split()]) == 0


def test_servers_reach_each_other_and_the_world() -> None:
    neutron = identity.client("demo").network
    with (
        family.placed("net-a", "host1", networks=family.on("private")) as first,
        family.placed("net-b", "host2", networks=family.on("private")) as second,
        family.placed("net-c", "host3", networks=family.on("public")) as third,
    ):
        assert family.answers_ping(family.address(third), 60)
        assert not family.answers_ping(family.address(first, "private"), 1)
        public = neutron.find_network("public").id
        floating = neutron.create_ip(floating_network_id=public, port_id=family.ports(first)[0].id)
        try:
            assert family.answers_ping(floating.floating_ip_address)
        finally:
            neutron.delete_ip(floating)
        with family.talk(first) as guest:
            family.wait_until(
                lambda: guest.call("reaches", address=family.address(second, "private")), 30
            )
            assert guest.call("reaches", address=str(settings.PROVIDER_GATEWAY))


def test_clones_have_addresses_of_their_own() -> None:
    """Nothing of theirs is ever seen under their parent's, which answers all the time."""
    with parent_on("public") as parent:
        [port] = family.ports(parent)
        theirs = {port.mac_address, family.address(parent)}
        with (
            family.scheduled_on("host2", "host3"),
            senders.watched("host2", "host3") as seen,
            family.forked(parent, count=3) as fork,
        ):
            clones = family.clones_of(fork)
            own = {family.address(clone) for clone in clones}
            own |= {family.ports(clone)[0].mac_address for clone in clones}
            assert len(own - theirs) == 6
            for clone in clones:
                assert family.answers_ping(family.address(clone))
                family.wait_until(lambda clone=clone: is_itself(clone), 30)  # type: ignore[misc]
            assert family.answers_ping(family.address(parent), 1)
            assert is_itself(parent)
        assert own <= seen
        assert not theirs & seen


def test_clone_of_a_clone_with_several_interfaces() -> None:
    """One of the networks has IPv6, too."""
    with parent_on("public", "private") as parent, family.forked(parent) as fork:
        [clone] = family.clones_of(fork)
        assert sum(":" in address for address in assigned(clone)) == 1
        family.wait_until(lambda: is_itself(clone), 30)
        with family.forked(clone) as second:
            [grandchild] = family.clones_of(second)
            family.wait_until(lambda: is_itself(grandchild), 30)
            assert family.answers_ping(family.address(grandchild))
            assert is_itself(clone)
        family.compute().reboot_server(clone, "HARD")
        family.wait_for(clone)
        family.wait_until(lambda: is_itself(clone), 30)


def test_network_without_dhcp() -> None:
    """The clone's own config drive has its addresses, for who looks there when it is plugged in."""
    service = identity.client("demo").image
    # A CD drive for which the guest has a driver.
    drive = {"hw_cdrom_bus": "scsi", "hw_scsi_model": "virtio-scsi"}
    configured = service.create_image(
        name=f"net-{secrets.token_hex(2)}",
        filename=str(image.DISK),
        disk_format="qcow2",
        container_format="bare",
        min_disk=1,
        **drive,
    )
    try:
        with (
            network(enable_dhcp=False) as name,
            parent_on(name, image_id=configured.id, config_drive=True) as parent,
            family.forked(parent, count=2) as fork,
        ):
            for clone in family.clones_of(fork):
                family.wait_until(lambda clone=clone: is_itself(clone), 30)  # type: ignore[misc]
                with family.talk(clone) as guest:
                    assert guest.call("reaches", address=family.address(parent, name))
    finally:
        service.delete_image(configured)


def test_clone_that_is_forked_and_suspended_at_once() -> None:
    """Its guest may not have let go of its parent's interface yet."""
    with parent_on("public") as parent, family.forked(parent) as fork:
        [clone] = family.clones_of(fork)
        with family.forked(clone) as second:
            [grandchild] = family.clones_of(second)
            family.act(grandchild, "suspend")
            family.wait_for_status(grandchild, "SUSPENDED")
            family.act(grandchild, "resume")
            family.wait_for_status(grandchild)
            for server in (clone, grandchild):
                family.wait_until(lambda server=server: is_itself(server), 30)  # type: ignore[misc]
                assert family.answers_ping(family.address(server))


def test_clone_that_keeps_its_parents_interfaces(flavor: str) -> None:
    """Its guest is to find out by itself; until then it is not heard, and not taken for another."""
    with parent_on("public", flavor=flavor) as parent:
        theirs = {family.ports(parent)[0].mac_address, family.address(parent)}
        with (
            family.scheduled_on("host2", "host3"),
            senders.watched("host2", "host3") as seen,
            family.forked(parent) as fork,
        ):
            [clone] = family.clones_of(fork)
            assert {*macs(clone), *addresses(clone)} == theirs
            with family.talk(clone) as guest:
                assert not guest.call("reaches", address=str(settings.PROVIDER_GATEWAY))
            assert not family.answers_ping(family.address(clone), 1)
            assert family.answers_ping(family.address(parent), 1)
            become(clone)
            assert family.answers_ping(family.address(clone))
        assert not theirs & seen


def test_clone_with_the_name_and_address_that_it_is_given() -> None:
    neutron = identity.client("demo").network
    [network] = family.on("private")
    used = {ip["ip_address"] for port in neutron.ports() for ip in port.fixed_ips}
    free = next(str(ip) for ip in reversed(list(settings.PRIVATE.hosts())) if str(ip) not in used)
    with (
        parent_on("private") as parent,
        family.forked(parent, name="chosen", networks=[{**network, "fixed_ip": free}]) as fork,
    ):
        [clone] = family.clones_of(fork)
        assert free in assigned(clone)
        assert family.ports(clone)[0].dns_name == "chosen"
        family.wait_until(lambda: is_itself(clone), 30)


def test_no_port_is_left_of_many_forks() -> None:
    with parent_on("private") as parent:
        before = family.leftovers()
        for _ in range(20):
            with family.forked(parent):
                pass
        family.wait_until(lambda: family.leftovers() <= before, 90)
        for host in settings.HOSTS:
            assert hosts.answers(host)


def test_port_quota() -> None:
    """Nothing is captured, and nothing is left."""
    admin = identity.client().network
    project = identity.client().identity.find_project("demo").id
    with parent_on("private") as parent:
        used = len(list(admin.ports(project_id=project)))
        admin.update_quota(project, ports=used + 1)
        try:
            body = {"fork": {"count": 2}}
            status, message = family.refusal("POST", f"/servers/{parent}/action", body)
            assert status == 403
            assert "ports" in message
            assert family.captures(parent) == 0
            assert is_itself(parent)
        finally:
            admin.delete_quota(project)


def test_isolated_family() -> None:
    """It has a network of its own, which is gone when the family is."""
    neutron = identity.client("demo").network
    before = {network.id for network in neutron.networks()}
    with parent_on("private") as parent, parent_on("private") as stranger:
        groups = family.ports(parent)[0].security_group_ids
        with family.forked(parent, count=2, isolation="family") as fork:
            [made] = [one for one in neutron.networks() if one.id not in before]
            clones = family.clones_of(fork)
            for clone in clones:
                family.wait_until(lambda clone=clone: is_itself(clone), 30)  # type: ignore[misc]
            with family.talk(clones[0]) as guest:
                for reached in (
                    family.address(clones[1], made.name),
                    family.address(parent, "private"),
                    str(settings.PROVIDER_GATEWAY),
                ):
                    family.wait_until(lambda to=reached: guest.call("reaches", address=to), 30)  # type: ignore[misc]
            with family.talk(stranger) as guest:
                address = family.address(clones[0], made.name)
                assert not guest.call("reaches", address=address)
            more = family.fork(parent, fork_id=fork["id"])
            assert [port.network_id for port in family.ports(family.clones_of(more)[0])] == [
                made.id
            ]
        family.wait_until(lambda: {one.id for one in neutron.networks()} == before, 90)
        group = f"snowflock-{fork['id']}"
        family.wait_until(lambda: not list(neutron.security_groups(name=group)), 30)
        assert family.ports(parent)[0].security_group_ids == groups
    with family.placed("isolated", "host1") as lonely:
        status, message = family.refusal(
            "POST", f"/servers/{lonely}/action", {"fork": {"isolation": "family"}}
        )
        assert status == 409
        assert "0 network interfaces" in message
