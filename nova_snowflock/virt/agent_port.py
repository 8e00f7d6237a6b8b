# SPDX-License-Identifier: Apache-2.0
"""The port of a guest's agent (virtio-serial) in a domain's XML."""

from lxml import etree

from nova_snowflock.guest import protocol

_TARGET = f"devices/channel/target[@name='{protocol.PORT}']"


def ensure(root: etree._Element) -> None:
    """Have a domain that is about to be started have one."""
    devices = root.find("devices")
    if devices is not None and root.find(_TARGET) is None:
        channel = etree.SubElement(devices, "channel", type="unix")
        etree.SubElement(channel, "target", type="virtio", name=protocol.PORT)


def is_open(root: etree._Element) -> bool:
    """Whether the guest of a domain that runs has it open."""
    return root.find(f"{_TARGET}[@state='connected']") is not None


def socket_path(root: etree._Element) -> str | None:
    """The UNIX socket of the port of a domain that runs, if it has one."""
    source = root.find(f"{_TARGET}/..[@type='unix']/source")
    return None if source is None else source.get("path")
