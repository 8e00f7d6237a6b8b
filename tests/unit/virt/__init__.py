# SPDX-License-Identifier: Apache-2.0
"""Unit tests of the compute plane. ``fixtures`` holds what a real guest's libvirt and QEMU said."""

import lzma
import pathlib

_FIXTURES = pathlib.Path(__file__).parent / "fixtures"


def text(name: str) -> str:
    """Return a fixture that is text."""
    return (_FIXTURES / name).read_text(encoding="utf-8")


def device_state() -> bytes:
    """Return what xen-save-devices-state wrote for the guest in ``live.xml`` (QEMU 7.2)."""
    return lzma.decompress((_FIXTURES / "device-state.bin.xz").read_bytes())
