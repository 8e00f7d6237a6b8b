# SPDX-License-Identifier: Apache-2.0
"""How QEMU emulates the machine.

QEMU is the boot loader as well: Xen is a kernel of the multiboot kind, and dom0's kernel and
initramfs are its modules.
"""

import dataclasses
import pathlib

from devstack.xen import rootfs
from devstack.xen import settings

# What QEMU emulates of this processor and Xen trips over, is left out.
PROCESSOR = "EPYC,-smap,-monitor,-rdtscp,-avx,-avx2,-xsave"
# Each message of the hypervisor's takes a guest some 20 ms.
XEN_PARAMETERS = (
    *("console=com1", "com1=115200", "loglvl=warning", "guest_loglvl=warning"),
    f"dom0_mem={settings.DOM0_MEMORY}M,max:{settings.DOM0_MEMORY}M",
    *("dom0_max_vcpus=1", "dom0_vcpus_pin"),
)
KERNEL_PARAMETERS = ("console=hvc0", "quiet", "panic=-1", "mitigations=off", "net.ifnames=0")
CHECKOUT = "checkout"
"""By which dom0 mounts it."""


@dataclasses.dataclass(frozen=True)
class Link:
    """dom0's interface: QEMU's network behind it, dom0's address there, and where its sshd is
    reached from this machine."""

    netdev: str
    address: str
    host: str
    port: int
    mac: str = "52:54:00:12:34:56"
    namespace: pathlib.Path | None = None


ADDRESS = "10.0.2.15/24"
"""dom0's, in a network that QEMU makes for it."""


def alone(port: int) -> Link:
    """From this machine alone, by this port of it, and to nowhere."""
    netdev = f"user,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22"
    return Link(netdev, ADDRESS, "127.0.0.1", port)


@dataclasses.dataclass(frozen=True)
class Own:
    """What one machine has that others have not."""

    name: str
    disk: pathlib.Path
    console: pathlib.Path
    link: Link


def argv(parts: rootfs.Parts, xen: pathlib.Path, own: Own) -> list[str]:
    """The command that is the machine; dom0's parts are these, and its hypervisor is that."""
    link = own.link
    dom0 = (
        *KERNEL_PARAMETERS,
        *(f"snowflock.name={own.name}", f"snowflock.address={link.address}"),
    )
    return [
        "qemu-system-x86_64",
        *("-name", "snowflock-xen"),
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-machine", "pc", "-accel", "tcg,thread=multi", "-cpu", PROCESSOR),
        *("-smp", str(settings.CPUS), "-m", str(settings.MEMORY)),
        *("-kernel", str(xen), "-append", " ".join(XEN_PARAMETERS)),
        *("-initrd", f"{parts.kernel} {' '.join(dom0)},{parts.initramfs}"),
        *("-drive", f"file={own.disk},if=none,id=disk,cache=unsafe"),
        *("-device", "virtio-blk-pci,drive=disk"),
        *("-fsdev", f"local,id=fs,path={settings.REPOSITORY},security_model=none,readonly=on"),
        *("-device", f"virtio-9p-pci,fsdev=fs,mount_tag={CHECKOUT}"),
        *("-chardev", f"file,id=console,path={own.console},append=on"),
        *("-serial", "chardev:console"),
        *("-netdev", f"{link.netdev},id=net"),
        *("-device", f"virtio-net-pci,netdev=net,romfile=,mac={link.mac}"),
    ]
