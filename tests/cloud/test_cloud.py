# SPDX-License-Identifier: Apache-2.0
"""The embedded cloud: servers on each of its hosts, and its repair."""

import contextlib
import json
import os
import pathlib
import signal
import stat
import subprocess
import time
from typing import Any

import libvirt
import pytest

from devstack.embedded import cloud as embedded
from devstack.embedded import hosts
from devstack.embedded import identity
from devstack.embedded import image
from devstack.embedded import network
from devstack.embedded import openstack
from devstack.embedded import processes
from devstack.embedded import settings
from tests.cloud import console
from tests.cloud import family

pytestmark = pytest.mark.usefixtures("cloud")


def cli(*arguments: str, user: str = "admin") -> Any:
    """What the command line says, as the file that `source` takes sets it up."""
    words = ["bash", "-c", f'source {identity.OPENRC} {user}; exec openstack "$@"', "openstack"]
    done = subprocess.run([*words, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout) if "json" in arguments else done.stdout


def domains() -> list[str]:
    """On a host: its domains' UUIDs."""
    with libvirt.open("qemu:///system") as connection:
        return [domain.UUIDString() for domain in connection.listAllDomains()]


def test_command_line_boots_a_server() -> None:
    created = cli(
        *("server", "create", "--image", image.NAME, "--flavor", "tiny", "--nic", "none"),
        *("--host", "host1", "--wait", "-f", "json", "test-cli"),
    )
    try:
        assert created["status"] == "ACTIVE"
        with console.connect(created["id"], "host1") as guest:
            first = guest.call("tick")["tick"]
            assert guest.call("tick")["tick"] >= first
        assert "workload: ready" in cli("console", "log", "show", "test-cli")
    finally:
        cli("server", "delete", "--wait", "test-cli")
    assert created["id"] not in hosts.attach("host1").run(domains)


def test_each_host_boots_servers_and_forgets_them() -> None:
    with contextlib.ExitStack() as stack:
        servers = {
            host: stack.enter_context(family.placed(f"test-on-{host}", host))
            for host in settings.HOSTS
        }
        for host, identifier in servers.items():
            assert identifier in hosts.attach(host).run(domains)
    for host, identifier in servers.items():
        assert identifier not in hosts.attach(host).run(domains)
        instances = settings.STATE / "hosts" / host / "nova/instances"
        assert not (instances / identifier).exists()


@pytest.mark.parametrize(
    "service",
    [openstack.CONDUCTOR, hosts.nova_compute("host2")],
    ids=lambda service: str(service.name),
)
def test_up_repairs_a_service(service: processes.Service) -> None:
    before = {other.name: other.pid() for other in embedded.services()}
    family.kill(service)
    embedded.up(print)
    assert service.is_ready()
    after = {other.name: other.pid() for other in embedded.services()}
    assert {name for name in after if after[name] != before[name]} == {service.name}


def test_up_repairs_a_host_and_its_servers() -> None:
    with family.placed("test-on-host3", "host3") as identifier:
        family.reboot("host3")
        # As after any host's reboot, nova starts what ran there.
        deadline = time.monotonic() + 60
        while identifier not in hosts.attach("host3").run(domains):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        with console.connect(identifier, "host3") as guest:
            assert guest.call("tick")["tick"] > 0


def test_up_repairs_libvirtd() -> None:
    host = hosts.attach("host2")
    host.run(kill_libvirtd)
    embedded.up(print)
    host.run(domains)


def kill_libvirtd() -> None:
    """On a host."""
    os.kill(int(pathlib.Path("/run/libvirtd.pid").read_text()), signal.SIGKILL)


def test_nobody_else_reaches_it() -> None:
    for file in (*settings.ETC.rglob("*"), settings.STATE / "passwords.json", identity.CLOUDS):
        if file.is_file():
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    # No service has a socket in this machine's own network namespace.
    ours = {os.stat("/proc/self/ns/net").st_ino}
    for service in embedded.services():
        for pid in service.processes():
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                inside = os.stat(f"/proc/{pid}/ns/net").st_ino not in ours
                # What holds a host's namespaces is outside of them.
                assert inside or pid == service.pid(), f"{service.name}: {pid}"
    assert network.CLIENT_LINK in network.links(None)
