# SPDX-License-Identifier: Apache-2.0
"""What the guest's administrator has chosen: /etc/snowflock/guest.conf."""

from __future__ import annotations

import configparser
from typing import Any, NamedTuple

from nova_snowflock.guest import protocol

PATH = "/etc/snowflock/guest.conf"

_SECTION = "guest"
_CHOICES = {
    "ssh_host_keys": ("regenerate", "keep"),
    "hostname": ("set", "keep"),
    "machine_id": ("set", "keep"),
}


class InvalidSettings(Exception):
    """The file is not what it must be. The message says where."""


class Settings(NamedTuple):
    """What a clone does of itself.

    ``port`` is the name of the virtio-serial port, or a path of what is used in its place;
    ``hook_seconds`` is for all hooks of an event together.
    """

    port: str = protocol.PORT
    ssh_host_keys: str = "regenerate"
    hostname: str = "set"
    machine_id: str = "set"
    hook_seconds: float = 60.0


def read(path: str = PATH) -> Settings:
    """The settings; the defaults if there is no file.

    :raises InvalidSettings: the file cannot be read, or something in it is not known
    """
    parser = configparser.ConfigParser(interpolation=None)
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
    except FileNotFoundError:
        return Settings()
    except (OSError, UnicodeDecodeError, configparser.Error) as error:
        raise InvalidSettings(f"{path}: {error}") from error
    strange = [name for name in parser.sections() if name != _SECTION]
    if strange:
        raise InvalidSettings(f"{path}: there is no section [{strange[0]}], only [{_SECTION}]")
    given = dict(parser[_SECTION]) if parser.has_section(_SECTION) else {}
    chosen: dict[str, Any] = {}
    for name, value in given.items():
        if name == "port":
            chosen[name] = value or protocol.PORT
        elif name == "hook_seconds":
            chosen[name] = _seconds(path, value)
        elif name in _CHOICES:
            if value not in _CHOICES[name]:
                known = " or ".join(_CHOICES[name])
                raise InvalidSettings(f"{path}: {name} must be {known}, not {value!r}")
            chosen[name] = value
        else:
            raise InvalidSettings(f"{path}: there is no option {name}")
    return Settings(**chosen)


def _seconds(path: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = 0
    # NaN is no number of seconds either.
    if not 0 < seconds <= 86400:
        raise InvalidSettings(
            f"{path}: hook_seconds must be a number of seconds, at most a day, not {value!r}"
        )
    return seconds
