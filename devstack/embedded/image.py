# SPDX-License-Identifier: Apache-2.0
"""The test image: a disk that boots the test guest (tests/guest).

Its first partition is FAT and holds syslinux, the kernel and the initramfs; its second is ext4, and
the guest's to write to.
"""

import os
import pathlib
import subprocess
import tempfile
from typing import Any

from devstack.embedded import identity
from devstack.embedded import processes
from devstack.embedded import settings

NAME = "snowflock-test"
GUEST = pathlib.Path(os.environ.get("SNOWFLOCK_GUEST", settings.REPOSITORY / "build/guest"))
PARTS = ("vmlinuz", "initrd.gz")
DISK = GUEST / "disk.qcow2"

MIB = 1 << 20
SIZE = 512 * MIB
BOOT = 40 * MIB
DATA = SIZE - BOOT - 2 * MIB

# Partitions begin at 1 MiB. 6: FAT16 with logical block addresses is e, which syslinux knows.
TABLE = f"""\
label: dos
label-id: 0x534e4f57
start={MIB // 512}, size={BOOT // 512}, type=e, bootable
start={(MIB + BOOT) // 512}, size={DATA // 512}, type=83
"""
# The workload answers on the console: the one way into a server that any Nova gives. What a kernel
# does against the flaws of real processors takes an emulated one most of its time.
SYSLINUX = """\
DEFAULT test
LABEL test
  LINUX vmlinuz
  INITRD initrd.gz
  APPEND {parameters}
"""
PARAMETERS = "console=ttyS0 quiet panic=-1 mitigations=off snowflock.port=/dev/ttyS0"
MBR = pathlib.Path("/usr/lib/syslinux/mbr/mbr.bin")


def build(disk: pathlib.Path = DISK, parameters: str = PARAMETERS) -> None:
    """Make the disk, unless there is one that is newer than what is on it.

    :param parameters: the kernel's

    :raises CloudError: the guest has not been built, or a tool failed
    """
    missing = [part for part in PARTS if not (GUEST / part).exists()]
    if missing:
        raise processes.CloudError(f"{GUEST} has no {', '.join(missing)}: `make guest` builds it")
    sources = [*(GUEST / part for part in PARTS), pathlib.Path(__file__)]
    if disk.exists() and all(disk.stat().st_mtime > s.stat().st_mtime for s in sources):
        return
    with tempfile.TemporaryDirectory(dir=GUEST) as scratch:
        here = pathlib.Path(scratch)
        boot, data, raw, packed = (here / name for name in ("boot", "data", "raw", "packed"))
        (here / "syslinux.cfg").write_text(SYSLINUX.format(parameters=parameters))
        _sparse(boot, BOOT)
        _run("mkfs.fat", "-F", "16", "-n", "BOOT", "-i", "534e4f57", boot)
        files = [here / "syslinux.cfg", *(GUEST / part for part in PARTS)]
        _run("mcopy", "-i", boot, *files, "::")
        _run("syslinux", "--install", boot)
        _sparse(data, DATA)
        _run("mkfs.ext4", "-q", "-L", "data", "-m", "0", data)

        _sparse(raw, SIZE)
        _run("sfdisk", "--quiet", raw, input=TABLE)
        _write(raw, 0, MBR.read_bytes()[:440])
        for part, offset in ((boot, MIB), (data, MIB + BOOT)):
            _run(
                "dd",
                f"if={part}",
                f"of={raw}",
                "bs=1M",
                f"seek={offset // MIB}",
                "conv=notrunc,sparse",
                "status=none",
            )
        _run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", raw, packed)
        packed.rename(disk)


def version() -> int:
    """Another one for each disk that was built."""
    return DISK.stat().st_mtime_ns


def upload() -> None:
    """Have the disk in glance, in place of one that was built earlier."""
    replace(NAME, DISK, "qcow2", min_disk=1, hw_rng_model="virtio")


def replace(name: str, file: pathlib.Path, disk_format: str, **properties: Any) -> str:
    """Have a file in glance, for all, in place of what had that name; its ID.

    :param properties: more of those of openstacksdk's ``create_image``
    """
    service = identity.client().image
    for image in service.images(name=name):
        service.delete_image(image)
    created = service.create_image(
        name=name,
        filename=str(file),
        disk_format=disk_format,
        visibility="public",
        **{"container_format": "bare", **properties},
    )
    return str(created.id)


def _sparse(path: pathlib.Path, size: int) -> None:
    with path.open("wb") as file:
        file.truncate(size)


def _write(path: pathlib.Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(content)


def _run(*argv: str | pathlib.Path, input: str | None = None) -> None:
    # Debian keeps some of these from the paths of ordinary users.
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    done = subprocess.run(
        [str(word) for word in argv],
        input=input,
        env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise processes.CloudError(f"{argv[0]} failed: {done.stdout.strip()}")
