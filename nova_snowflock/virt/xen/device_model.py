# SPDX-License-Identifier: Apache-2.0
"""The QEMU that emulates the devices of an HVM guest: its state, and what it writes to memory.

It is asked for what libxl asks it for when it saves a guest (tools/libs/light/libxl_dom_save.c and
libxl_dom_suspend.c of Xen 4.17).
"""

from collections.abc import Iterator
import contextlib

from oslo_log import log as logging

from nova_snowflock import exception
from nova_snowflock.virt.xen import qmp
from nova_snowflock.virt.xen import state

LOG = logging.getLogger(__name__)

# PCI's codes of classes of devices.
_NETWORK = 0x0200
_VGA = 0x0300


class DeviceModel:
    """Every call raises MonitorError if QEMU refuses, or has ended."""

    def __init__(self, monitor: qmp.Monitor) -> None:
        self._qemu = monitor

    def examine(self) -> None:
        """Look whether the guest's state is all where it is taken from.

        A kernel with drivers for Xen has QEMU plug out emulated disks and network interfaces
        (docs/misc/hvm-emulated-unplug.pandoc), and does so again where it is resumed.

        :raises CannotFork: it is not; the guest has such devices yet, or odd video memory
        """
        for bus in self._qemu.command("query-pci"):
            for device in bus["devices"]:
                kind = device["class_info"]["class"]
                if kind == _NETWORK:
                    raise exception.CannotFork(
                        "it has a network interface that is emulated: its kernel has no drivers "
                        "for Xen's"
                    )
                if kind == _VGA:
                    _check_video_memory(device["regions"])
        names = [
            device["inserted"]["file"]
            for device in self._qemu.command("query-block")
            if "inserted" in device and not device["inserted"]["ro"]
        ]
        if len({*names}) < len(names):
            raise exception.CannotFork(
                "it has a disk that is emulated: its kernel has no drivers for Xen's"
            )

    @contextlib.contextmanager
    def logged(self) -> Iterator[None]:
        """Have Xen be told what QEMU writes to the guest's memory."""
        self._log(True)
        try:
            yield
        finally:
            try:
                self._log(False)
            except exception.MonitorError as error:
                LOG.warning("A device model goes on telling Xen what it writes: %s", error)

    def _log(self, enable: bool) -> None:
        self._qemu.command("xen-set-global-dirty-log", {"enable": enable})

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Have it write no more. The guest must be suspended: nobody answers it."""
        try:
            self._qemu.command("stop")
            yield
        finally:
            self.resume()

    def save(self, path: str) -> None:
        """Have it write its state to a file. It must be stopped."""
        self._qemu.command("xen-save-devices-state", {"filename": path, "live": False})

    def resume(self) -> None:
        """Let it go on. Idempotent."""
        self._qemu.command("cont")


def _check_video_memory(regions: list[dict[str, int]]) -> None:
    for region in regions:
        first, last = region["address"], region["address"] + region["size"] - 1
        if region["bar"] == 0 and not all(
            address // state.PAGE_SIZE in state.DEVICE_FRAMES for address in (first, last)
        ):
            raise exception.CannotFork(f"it has its video memory at {first:#x}")
