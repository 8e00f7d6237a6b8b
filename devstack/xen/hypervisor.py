# SPDX-License-Identifier: Apache-2.0
"""A hypervisor that pages and shares guests' memory: Debian's source, another configuration."""

from collections.abc import Callable
import hashlib
import os
import pathlib
import shutil
import tempfile

from devstack.xen import commands
from devstack.xen import locks
from devstack.xen import packages
from devstack.xen import rootfs
from devstack.xen import settings

CONFIGURATION = settings.FILES / "paging.config"


def paging(parts: rootfs.Parts, say: Callable[[str], None]) -> pathlib.Path:
    """An ELF file, of the version of what is in these parts if its source can be had.

    Any of Xen's `settings.XEN` fits dom0's programs.

    :raises XenError: it could not be built
    """
    configuration = parts.configuration.read_text() + CONFIGURATION.read_text()
    digest = hashlib.sha256(configuration.encode()).hexdigest()
    built = settings.CACHE / f"xen-{parts.version}-{digest[:16]}"
    with locks.locked(settings.CACHE):
        if not built.exists():
            for half in settings.CACHE.glob("xen.*"):
                shutil.rmtree(half)
            say("Building a hypervisor that pages: this takes some minutes")
            with tempfile.TemporaryDirectory(dir=settings.CACHE, prefix="xen.") as scratch:
                _build(pathlib.Path(scratch), parts.version, configuration).rename(built)
    return built


def _build(scratch: pathlib.Path, version: str, configuration: str) -> pathlib.Path:
    archive = packages.Archive(scratch / "apt")
    tree = archive.source("xen", version, scratch / "source") / "xen"
    (tree / ".config").write_text(configuration)
    for target in ("olddefconfig", "build"):
        commands.run(["make", "-C", tree, f"-j{os.cpu_count()}", target])
    return tree / "xen"
