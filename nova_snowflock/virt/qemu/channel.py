# SPDX-License-Identifier: Apache-2.0
"""The port of a guest's agent (virtio-serial)."""

import os
import socket

import libvirt

from nova_snowflock.guest import protocol
from nova_snowflock.virt import agent_port
from nova_snowflock.virt import libvirt_xml

_TIMEOUT = 2.0


def opened(connection: libvirt.virConnect) -> list[str]:
    """UUIDs of the domains whose guest has it open."""
    found = []
    for domain in connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
        try:
            description = libvirt_xml.parse(domain.XMLDesc())
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:  # it has ended since
                raise
        else:
            if agent_port.is_open(description):
                found.append(domain.UUIDString())
    return found


def connect(domain: libvirt.virDomain) -> socket.socket:
    """A connection to it; QEMU has one at a time, and lets others wait.

    :raises OSError: it has no such port, or has ended
    """
    path = agent_port.socket_path(libvirt_xml.parse(domain.XMLDesc()))
    if path is None:
        raise FileNotFoundError(f"The guest {domain.name()} has no port {protocol.PORT}")
    # The name of a socket has 108 bytes at most: too few for where libvirt puts it.
    directory, name = os.path.split(path)
    parent = os.open(directory, os.O_PATH | os.O_DIRECTORY)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # A QEMU that hangs does not take it, and others shall not wait for that.
    connection.settimeout(_TIMEOUT)
    try:
        connection.connect(f"/proc/self/fd/{parent}/{name}")
    except BaseException:
        connection.close()
        raise
    finally:
        os.close(parent)
    connection.settimeout(None)
    return connection
