# SPDX-License-Identifier: Apache-2.0
"""Machines as compute hosts of the embedded cloud.

Their dom0 is in the cloud's management network, and runs nova-compute from the checkout.
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

HOSTS = embedded.XEN_HOSTS
IMAGE = "snowflock-test-xen"
"""Of servers there: the test guest's kernel and initramfs, and a disk that is the guest's."""
HVM_IMAGE = f"{IMAGE}-hvm"
"""A disk that a BIOS boots it from."""
# Four guests that count at their usual pace take all that an emulated processor has.
COMMAND_LINE = (
    "console=hvc0 quiet panic=-1 mitigations=off snowflock.port=/dev/hvc0 snowflock.tick_ms=100"
)
_PID = "/run/nova-compute.pid"


def name(xen: machine.Machine) -> str:
    """By which the cloud knows a machine."""
    return HOSTS[xen.number - 1]


def link(host: str) -> emulator.Link:
    address = embedded.management_address(host)
    return emulator.Link(
        netdev=f"tap,ifname={host},script=no,downscript=no",
        address=f"{address}/{embedded.MANAGEMENT_PREFIX}",
        host=address,
        port=22,
        # What QEMU gives is the same for all machines.
        mac=f"52:54:00:78:00:{embedded.number(host):02x}",
        namespace=network.NAMESPACE,
    )


class NovaCompute(machine.Daemon):
    """nova-compute in dom0. Its process here is the connection that shows what it says."""

    def is_ready(self) -> bool:
        return self.pid() is not None and hosts.reported(name(self.machine), self)

    def _end_remains(self) -> None:
        end = f"kill $(cat {_PID}) && while kill -0 $(cat {_PID}); do sleep 0.5; done"
        self.machine.run(["sh", "-c", end])
        super()._end_remains()


def nova_compute(xen: machine.Machine) -> NovaCompute:
    program = embedded.BIN / "nova-compute"
    config = configuration.nova_compute_file(name(xen))
    run = f"echo $$ >{_PID}; exec {program} --config-file={config}"
    return NovaCompute(
        "nova-compute",
        xen.command(["sh", "-c", run]),
        look_again=1.0,
        # An emulated processor is busy for minutes with what Nova imports.
        patience=600.0,
        machine=xen,
    )


def join(xen: machine.Machine, *, paging: bool, say: Callable[[str], None]) -> None:
    """Start a machine in the cloud unless it runs, and nova-compute there.

    :raises XenError: there is no cloud, or the machine could not be started in it
    :raises CloudError: nova-compute does not work; the message has its last words
    """
    if not network.exists():
        raise commands.XenError("there is no cloud: `python -m devstack.embedded up` starts it")
    host = name(xen)
    network.add_tap(host)
    xen.up(paging=paging, name=host, link=link(host), say=say)
    service = nova_compute(xen)
    if service.pid() is None:
        dom0.build_helper(xen)
        _configure(xen)
        _upload_images()
        say("Starting nova-compute: this takes some minutes")
        service.start()
    service.wait()
    openstack.discover_hosts()


def _configure(xen: machine.Machine) -> None:
    host = name(xen)
    file = configuration.nova_compute_file(host)
    embedded.write(file, configuration.render(_options(host)))
    xen.put(file, str(file))
    # By which Nova knows the host again, if it is another machine than it was in this cloud.
    known = hosts.directory(host) / "compute_id"
    if not known.exists():
        embedded.write(known, f"{uuid.uuid4()}\n")
    xen.put(known, f"{configuration.NOVA_STATE}/{known.name}")
    for argv in (
        ["mkdir", "--parents", f"{configuration.NOVA_STATE}/instances"],
        ["ip", "route", "replace", "224.0.0.0/4", "dev", "eth0"],
    ):
        xen.run(argv, check=True)


def _options(host: str) -> configuration.Options:
    common = configuration.nova_compute(host)
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
            "address": embedded.management_address(host),
            "mtu": 1500,
            "background_rate": settings.BACKGROUND_RATE,
        },
    }


def _upload_images() -> None:
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
    image.replace(HVM_IMAGE, image.DISK, "qcow2", hypervisor_type="xen", min_disk=1)
