# SPDX-License-Identifier: Apache-2.0
"""What is made of what the device model of an HVM guest says of itself."""

from collections.abc import Mapping
import contextlib
from typing import Any

import pytest

from nova_snowflock import exception
from nova_snowflock.virt.xen import device_model
from nova_snowflock.virt.xen import qmp

FRAME_BUFFER = {"bar": 0, "address": 0xF0000000, "size": 16 << 20, "type": "memory"}


class Monitor(qmp.Monitor):
    """That of a QEMU with these devices, which notes what else it is asked."""

    def __init__(self, devices: list[Any], drives: list[Any]) -> None:
        super().__init__(7)
        self.devices, self.drives = devices, drives
        self.refused: str | None = None
        self.asked: list[tuple[str, Mapping[str, Any] | None]] = []

    def command(self, name: str, arguments: Mapping[str, Any] | None = None) -> Any:
        if name == "query-pci":
            return [{"bus": 0, "devices": self.devices}]
        if name == "query-block":
            return self.drives
        self.asked.append((name, arguments))
        if name == self.refused:
            raise exception.MonitorError(f"QEMU refused {name}")
        return {}


def pci(kind: int, *regions: dict[str, Any]) -> dict[str, Any]:
    return {"class_info": {"class": kind}, "regions": list(regions)}


def drive(file: str, read_only: bool = False) -> dict[str, Any]:
    return {"inserted": {"file": file, "ro": read_only}}


def test_guest_that_has_left_its_emulated_devices() -> None:
    devices = [pci(0x0101), pci(0xFF80), pci(0x0300, FRAME_BUFFER)]
    drives = [
        {"device": "ide0-cd1"},
        drive("/a"),
        drive("/b"),
        drive("/c", True),
        drive("/c", True),
    ]
    device_model.DeviceModel(Monitor(devices, drives)).examine()


@pytest.mark.parametrize(
    ("devices", "drives", "reason"),
    [
        ([pci(0x0200)], [], "network interface that is emulated"),
        ([], [drive("/a"), drive("/b"), drive("/a")], "disk that is emulated"),
        ([pci(0x0300, {**FRAME_BUFFER, "address": 0xE0000000})], [], "memory at 0xe0000000"),
        ([pci(0x0300, {**FRAME_BUFFER, "address": -1})], [], "memory at -0x1"),
        ([pci(0x0300, {**FRAME_BUFFER, "size": 512 << 20})], [], "memory at 0xf0000000"),
    ],
)
def test_guest_that_uses_what_is_emulated(
    devices: list[Any], drives: list[Any], reason: str
) -> None:
    with pytest.raises(exception.CannotFork, match=reason):
        device_model.DeviceModel(Monitor(devices, drives)).examine()


def test_writes_are_logged_no_longer_than_needed() -> None:
    monitor = Monitor([], [])
    with contextlib.suppress(ZeroDivisionError), device_model.DeviceModel(monitor).logged():
        assert monitor.asked == [("xen-set-global-dirty-log", {"enable": True})]
        raise ZeroDivisionError
    assert monitor.asked[1:] == [("xen-set-global-dirty-log", {"enable": False})]


def test_what_was_captured_is_kept_if_writes_are_logged_yet() -> None:
    monitor = Monitor([], [])
    with device_model.DeviceModel(monitor).logged():
        monitor.refused = "xen-set-global-dirty-log"
    assert len(monitor.asked) == 2


@pytest.mark.parametrize("refused", [None, "stop", "xen-save-devices-state"])
def test_it_goes_on(refused: str | None) -> None:
    monitor = Monitor([], [])
    monitor.refused = refused
    model = device_model.DeviceModel(monitor)
    fails = pytest.raises(exception.MonitorError) if refused else contextlib.nullcontext()
    with fails, model.stopped():
        model.save("/image/devices")
    saved = ("xen-save-devices-state", {"filename": "/image/devices", "live": False})
    asked = [("stop", None), *([] if refused == "stop" else [saved]), ("cont", None)]
    assert monitor.asked == asked
