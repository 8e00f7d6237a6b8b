# SPDX-License-Identifier: Apache-2.0
"""The machine as a compute host of the embedded cloud.

Its dom0 is in the cloud's management network, and runs nova-compute from the checkout.
"""

from collections.abc import Callable
import pathlib
import tempfile
import uuid

from devstack.embedded import configuration
from devstack.embedded import hosts
from devstack.embedded import image
from devstack.embedded import network
from devstack.embedded import openstack
from devstack.embedded import settings as embedded
from devstack.xen import commands
from devstack.xen import emulator
from devstack.xen import machine
from devstack.xen import settings
from tests.xen import dom0

HOST = embedded.XEN_HOST
IMAGE = "snowflock-test-xen"
"""Of servers there: the test guest's kernel and initramfs, and a disk that is the guest's."""
COMMAND_LINE = "console=hvc0 quiet panic=-1 mitigations=off snowflock.port=/dev/hvc0"
_PID = "/run/nova-compute.pid"


def link() -> emulator.Link:
    address = embedded.management_address(HOST)
    return emulator.Link(
        netdev=f"tap,ifname={HOST},script=no,downscript=no",
        address=f"{address}/{embedded.MANAGEMENT_PREFIX}",
        host=address,
        port=22,
        # What QEMU gives is the same for all machines.
        mac=f"52:54:00:78:00:{embedded.number(HOST):02x}",
        namespace=network.NAMESPACE,
    )


class NovaCompute(machine.Daemon):
    """nova-compute in dom0. Its process here is the connection that shows what it says."""

    def is_ready(self) -> bool:
        return self.pid() is not None and hosts.reported(HOST, self)

    def _end_remains(self) -> None:
        end = f"kill $(cat {_PID}) && while kill -0 $(cat {_PID}); do sleep 0.5; done"
        machine.run(["sh", "-c", end])
        super()._end_remains()


def nova_compute() -> NovaCompute:
    program = embedded.BIN / "nova-compute"
    config = configuration.nova_compute_file(HOST)
    run = f"echo $$ >{_PID}; exec {program} --config-file={config}"
    return NovaCompute(
        "nova-compute",
        machine.command(["sh", "-c", run]),
        look_again=1.0,
        # An emulated processor is busy for minutes with what Nova imports.
        patience=600.0,
    )


def join(*, paging: bool, say: Callable[[str], None]) -> None:
    """Start the machine in the cloud unless it runs, and nova-compute there.

    :raises XenError: there is no cloud, or the machine could not be started in it
    :raises CloudError: nova-compute does not work; the message has its last words
    """
    if not network.exists():
        raise commands.XenError("there is no cloud: `python -m devstack.embedded up` starts it")
    network.add_tap(HOST)
    machine.up(paging=paging, name=HOST, link=link(), say=say)
    service = nova_compute()
    if service.pid() is None:
        dom0.build_helper()
        _configure()
        _upload_image()
        say("Starting nova-compute: this takes some minutes")
        service.start()
    service.wait()
    openstack.discover_hosts()


def _configure() -> None:
    file = configuration.nova_compute_file(HOST)
    embedded.write(file, configuration.render(_options()))
    machine.put(file, str(file))
    # By which Nova knows the host again, if it is another machine than it was in this cloud.
    known = hosts.directory(HOST) / "compute_id"
    if not known.exists():
        embedded.write(known, f"{uuid.uuid4()}\n")
    machine.put(known, f"{configuration.NOVA_STATE}/{known.name}")
    for argv in (
        ["mkdir", "--parents", f"{configuration.NOVA_STATE}/instances"],
        ["ip", "route", "replace", "224.0.0.0/4", "dev", "eth0"],
    ):
        machine.run(argv, check=True)


def _options() -> configuration.Options:
    common = configuration.nova_compute(HOST)
    return {
        **common,
        "DEFAULT": {
            **common["DEFAULT"],
            "compute_driver": "snowflock.SnowFlockXenDriver",
            # dom0's own, and Xen's.
            "reserved_host_memory_mb": settings.DOM0_MEMORY + 256,
        },
        "libvirt": {"images_type": "qcow2", "wait_soft_reboot_seconds": 30},
        "compute": {"cpu_shared_set": settings.GUEST_CPUS},
        "vnc": {"enabled": "false"},
        "snowflock": {
            **common["snowflock"],
            "hypervisor": "xen",
            "connection_uri": "xen:///system",
            "address": embedded.management_address(HOST),
            "mtu": 1500,
        },
    }


def _upload_image() -> None:
    """Have the test guest in glance, in place of one that was built earlier."""
    ids = {}
    for part, kind, file in zip(("kernel", "ramdisk"), ("aki", "ari"), image.PARTS, strict=True):
        name = f"{IMAGE}-{part}"
        ids[f"{part}_id"] = image.replace(name, image.GUEST / file, kind, container_format=kind)
    with tempfile.TemporaryDirectory() as scratch:
        disk = pathlib.Path(scratch, "disk")
        commands.run(["mkfs.ext4", "-q", "-L", "data", disk, "64M"])
        own = {"hypervisor_type": "xen", "os_command_line": COMMAND_LINE}
        image.replace(IMAGE, disk, "raw", **own, **ids)
