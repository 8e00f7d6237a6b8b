# SPDX-License-Identifier: Apache-2.0
"""Bring the cloud up, look at it, and take it down."""

from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
import contextlib
import fcntl
import os
import shutil
import time

from devstack.embedded import configuration
from devstack.embedded import database
from devstack.embedded import hosts
from devstack.embedded import identity
from devstack.embedded import image
from devstack.embedded import messaging
from devstack.embedded import network
from devstack.embedded import openstack
from devstack.embedded import ovn
from devstack.embedded import processes
from devstack.embedded import settings

Say = Callable[[str], None]


def services() -> list[processes.Service]:
    """All daemons, in the order in which they need each other."""
    return [
        database.SERVICE,
        messaging.EPMD,
        messaging.SERVICE,
        ovn.DATABASES,
        ovn.NORTHD,
        *(hosts.service(host) for host in settings.HOSTS),
        openstack.KEYSTONE,
        openstack.GLANCE,
        openstack.PLACEMENT,
        openstack.NEUTRON,
        openstack.CONDUCTOR,
        openstack.SCHEDULER,
        openstack.NOVA,
        *(hosts.nova_compute(host) for host in settings.HOSTS),
    ]


def configured_by(name: str) -> list[processes.Service]:
    """The services that read the configuration of that name."""
    known = {
        "keystone": [openstack.KEYSTONE],
        "glance": [openstack.GLANCE],
        "placement": [openstack.PLACEMENT],
        "neutron": [openstack.NEUTRON],
        "nova": [openstack.CONDUCTOR, openstack.SCHEDULER, openstack.NOVA],
    }
    return known.get(name) or [service for service in services() if service.name == name]


def memory() -> dict[str, int]:
    """What each daemon has in memory, by name, with all that it started: MB."""
    return {
        service.name: sum(processes.memory(pid) for pid in service.processes()) // 1024
        for service in services()
    }


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """One `up` or `down` at a time."""
    settings.STATE.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(settings.STATE, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def up(say: Say) -> None:
    """Start what does not run and make what is missing.

    :raises CloudError: it cannot be done
    """
    started = time.monotonic()

    def tell(what: str) -> None:
        say(f"{time.monotonic() - started:6.1f} s  {what}")

    with locked(), futures.ThreadPoolExecutor(16) as pool:
        settings.make_directories()
        network.up()
        stop(service for name in configuration.write() for service in configured_by(name))
        messaging.configure()
        identity.write_client_files()

        def start(*wanted: processes.Service) -> None:
            new = [service for service in wanted if service.start()]
            for service in wanted:
                service.wait()
            if new:
                tell("started " + ", ".join(service.name for service in new))

        def start_host(name: str) -> None:
            new = hosts.start(name)
            hosts.service(name).wait()
            if hosts.repair(name) or new:
                tell(f"started {name}")

        def once(name: str, function: Callable[[], None]) -> None:
            if not done(name):
                function()
                settings.write(settings.DONE / name, "")
                tell(f"made {name}")

        def lay_ground() -> None:
            database.install()
            start(database.SERVICE)
            once("database-user", database.create_user)

        def start_ovn() -> None:
            ovn.create()
            start(ovn.DATABASES)
            once("ovn-listeners", ovn.listen)
            start(ovn.NORTHD)

        ground = pool.submit(lay_ground)
        broker = pool.submit(start, messaging.EPMD, messaging.SERVICE)
        virtual_network = pool.submit(start_ovn)
        machines = [pool.submit(start_host, host) for host in settings.HOSTS]
        picture = pool.submit(image.build)
        ground.result()

        def install_identity() -> None:
            once("keystone-schema", openstack.install_keystone)
            start(openstack.KEYSTONE)
            once("identity", identity.install)

        accounts = pool.submit(install_identity)
        schemas = [
            pool.submit(once, f"{name}-schema", function)
            for name, function in openstack.SCHEMAS.items()
        ]
        wait([broker, virtual_network, accounts, *schemas])
        start(
            openstack.PLACEMENT,
            openstack.GLANCE,
            openstack.NEUTRON,
            openstack.CONDUCTOR,
            openstack.SCHEDULER,
            openstack.NOVA,
        )
        wait([picture, *machines])
        contents = [
            pool.submit(once, "flavors", identity.install_flavors),
            pool.submit(once, "networks", identity.install_networks),
            pool.submit(once, f"image-{image.version()}", image.upload),
        ]
        start(*(hosts.nova_compute(host) for host in settings.HOSTS))
        wait(contents)
        if identity.unmapped_hosts():
            openstack.discover_hosts()
            tell("discovered the compute hosts")
        tell("the cloud is up")


def stop(wanted: Iterable[processes.Service]) -> None:
    """End services, all at the same time."""
    with futures.ThreadPoolExecutor(16) as pool:
        wait([pool.submit(service.stop) for service in wanted])


def wait(pending: Iterable[futures.Future[None]]) -> None:
    for future in pending:
        future.result()


def done(name: str) -> bool:
    return (settings.DONE / name).exists()


def down(say: Say) -> None:
    """End and remove all of it."""
    if not settings.STATE.exists():
        return
    with locked():
        for service in reversed(services()):
            if service.pid() is not None:
                say(f"ending {service.name}")
            service.kill()
        # What a service that is known no more may have left.
        for pid in list(network.inhabitants()):
            processes.kill(pid)
        network.down()
        shutil.rmtree(settings.STATE)
    # The next cloud has passwords and accounts of its own.
    settings.passwords.cache_clear()
    identity.client.cache_clear()
