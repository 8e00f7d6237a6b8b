# SPDX-License-Identifier: Apache-2.0
"""IP address and port in one text: ``192.0.2.1:5710``, ``[2001:db8::1]:5710``."""

import ipaddress
import re

Address = tuple[str, int]
"""IP address and port, as sockets take them."""

_ENDPOINT = re.compile(r"(?:\[(?P<ipv6>[^]]+)]|(?P<ipv4>[^]:[]+)):(?P<port>[0-9]{1,5})")


def parse(text: str) -> Address:
    """The address in ``text``. Port 0, which lets a server choose one, is an address too.

    :raises ValueError: ``text`` is not that; a host's name is not taken
    """
    match = _ENDPOINT.fullmatch(text)
    if match is None or int(match["port"]) > 65535:
        raise ValueError(f"{text!r} is not an IP address and port")
    if match["ipv6"]:
        return str(ipaddress.IPv6Address(match["ipv6"])), int(match["port"])
    return str(ipaddress.IPv4Address(match["ipv4"])), int(match["port"])


def format(address: Address) -> str:
    """The text that :func:`parse` takes."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
