# SPDX-License-Identifier: Apache-2.0
"""``snowflock-guest``: the agent; with ``install`` it installs itself, with ``call`` it asks.

What it installs is for the guest that it runs in, or for the file system of another (``--root``).
"""

from __future__ import annotations

import argparse
import glob
import os
import site
import sys
import sysconfig
from typing import Any

LIBRARY = "/usr/local/lib/snowflock"
BUNDLE = LIBRARY + "/snowflock-guest.pyz"
SHARED = "/usr/local/share/snowflock"
CONFIG = "/etc/snowflock"
HOOKS = ("prefork", "clone", "parent")

# Isolated: the agent is root, and no business of what the environment says of Python.
_WRAPPER = '#!/bin/sh\nexec python3 -I {bundle}{call} "$@"\n'

# The loader knows where the rest of this package is, in a bundle or not.
_LOADER: Any = __spec__.loader
_HERE = os.path.dirname(__file__)

_FILES = (
    "files/cloud-init.yaml",
    "files/guest.conf",
    "files/snowflock-guest.busybox",
    "files/snowflock-guest.openrc",
    "files/snowflock-guest.service",
    "bindings/Example.java",
    "bindings/example.c",
    "bindings/example.cpp",
    "bindings/snowflock.c",
    "bindings/snowflock.h",
)


def main() -> int:
    """Entry point of ``snowflock-guest`` and of the bundle."""
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command == "call":
        from nova_snowflock.guest import command as shell

        return shell.main(sys.argv[2:])
    if command == "install":
        return _install_main(sys.argv[2:])
    import nova_snowflock.guest.__main__ as agent

    return agent.main()


def _install_main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="snowflock-guest install",
        description="Put the agent, its service and the programs' API into this system.",
    )
    parser.add_argument(
        "--root",
        metavar="<directory>",
        default="/",
        help="Where the file system is that it is put into",
    )
    arguments = parser.parse_args(argv)
    if not os.path.isdir(arguments.root):
        parser.error(f"{arguments.root} is no directory")
    try:
        for sentence in install(arguments.root):
            print(sentence)
    except OSError as error:
        print(f"snowflock-guest: {error}", file=sys.stderr)
        return 1
    return 0


def install(root: str) -> list[str]:
    """Install it, or a new version of it. Returns sentences about what is left to be done.

    :param root: where the file system of the guest is
    :raises OSError: a file could not be written
    """
    _write(root, BUNDLE, _bundle(), 0o755)
    for name, call in (("snowflock-guest", ""), ("snowflock", " call")):
        wrapper = _WRAPPER.format(bundle=BUNDLE, call=call)
        _write(root, f"/usr/local/bin/{name}", wrapper.encode(), 0o755)
    for directory in _python_directories(root):
        _write(root, f"{directory}/snowflock-guest.pth", BUNDLE.encode() + b"\n", 0o644)
    for name in _FILES:
        _write(root, f"{SHARED}/{os.path.basename(name)}", read(name), 0o644)
    for hook in HOOKS:
        _make_directory(_under(root, f"{CONFIG}/{hook}.d"))
    if not os.path.lexists(_under(root, f"{CONFIG}/guest.conf")):
        _write(root, f"{CONFIG}/guest.conf", read("files/guest.conf"), 0o644)
    return _install_service(root)


def read(name: str) -> bytes:
    """A file of this package, wherever the package is.

    :raises OSError: there is none
    """
    data: bytes = _LOADER.get_data(os.path.join(_HERE, *name.split("/")))
    return data


def _bundle() -> bytes:
    archive = getattr(_LOADER, "archive", None)
    if archive is None:
        from nova_snowflock.guest import bundle

        return bundle.build()
    with open(archive, "rb") as file:
        return file.read()


def _python_directories(root: str) -> list[str]:
    """Where the guest's Python looks for .pth files."""
    if os.path.realpath(root) != "/":
        # Its Python need not be the one that runs here.
        found = glob.glob(f"{glob.escape(root)}/usr/lib/python3*/*-packages")
        if found:
            return sorted(f"/{os.path.relpath(path, root)}" for path in found)
    return (site.getsitepackages() or [sysconfig.get_paths()["purelib"]])[:1]


def _install_service(root: str) -> list[str]:
    if os.path.isdir(_under(root, "/etc/systemd")):
        unit = "/etc/systemd/system/snowflock-guest.service"
        _write(root, unit, read("files/snowflock-guest.service"), 0o644)
        wants = "/etc/systemd/system/multi-user.target.wants/snowflock-guest.service"
        _link(root, wants, unit)
        return ["It starts at the next boot, or with: systemctl start snowflock-guest"]
    if os.path.isdir(_under(root, "/etc/init.d")) and (
        os.path.lexists(_under(root, "/sbin/openrc-run"))
        or os.path.isdir(_under(root, "/etc/runlevels"))
    ):
        script = "/etc/init.d/snowflock-guest"
        _write(root, script, read("files/snowflock-guest.openrc"), 0o755)
        _link(root, "/etc/runlevels/default/snowflock-guest", script)
        return ["It starts at the next boot, or with: rc-service snowflock-guest start"]
    example = f"{SHARED}/snowflock-guest.busybox"
    return [f"There is neither systemd nor OpenRC here: {example} says how it may be started."]


def _under(root: str, path: str) -> str:
    return os.path.join(root, path.lstrip("/"))


def _make_directory(path: str) -> None:
    """As 0755, whatever the umask is; directories that are there stay as they are."""
    if not os.path.isdir(path):
        _make_directory(os.path.dirname(path))
        os.mkdir(path)
        os.chmod(path, 0o755)


def _write(root: str, path: str, data: bytes, mode: int) -> None:
    """At once: the agent may be running from what is replaced."""
    path = _under(root, path)
    _make_directory(os.path.dirname(path))
    new = f"{path}.new"
    with open(new, "wb") as file:
        file.write(data)
        os.fchmod(file.fileno(), mode)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _link(root: str, path: str, target: str) -> None:
    path = _under(root, path)
    _make_directory(os.path.dirname(path))
    new = f"{path}.new"
    if os.path.lexists(new):
        os.unlink(new)
    os.symlink(target, new)
    os.replace(new, path)


if __name__ == "__main__":
    sys.exit(main())
