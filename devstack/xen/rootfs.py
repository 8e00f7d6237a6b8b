# SPDX-License-Identifier: Apache-2.0
"""dom0's disk, kernel and initramfs, and Debian's Xen.

Packages are extracted rather than installed: what their scripts would do for a machine that is
looked after for years, a dom0 of some minutes does without, and the rest is little.
"""

from collections.abc import Callable, Iterator
import dataclasses
import functools
import gzip
import hashlib
import pathlib
import shutil
import subprocess
import tempfile

from devstack.xen import commands
from devstack.xen import locks
from devstack.xen import packages
from devstack.xen import settings

PACKAGES = (
    *("base-files", "base-passwd", "bash", "bsdutils", "busybox-static", "coreutils", "dash"),
    *("diffutils", "findutils", "grep", "gzip", "hostname", "libc-bin", "login", "mawk", "mount"),
    *("netbase", "procps", "sed", "tar", "util-linux"),
    *("bridge-utils", "e2fsprogs", "iproute2", "kmod", "linux-image-amd64", "openssh-server"),
    *("qemu-system-xen", "qemu-utils", "xen-utils-common", "xenstore-utils"),
    *(f"xen-hypervisor-{settings.XEN}-amd64", f"xen-utils-{settings.XEN}"),
    *("libvirt-clients", "libvirt-daemon", "libvirt-daemon-driver-xen"),
    # The product runs in dom0 with the checkout's virtual environment, and compiles a helper.
    *("gcc", "libc6-dev", "libxen-dev", "make", "python3"),
)
MERGED = ("bin", "lib", "lib32", "lib64", "libx32", "sbin")
"""What is a link to its namesake in /usr."""

# Half of the disk, and nothing that a dom0 of ours reads.
UNWANTED = (
    *(f"usr/share/{name}" for name in ("doc", "info", "iso-codes", "lintian", "locale", "man")),
    *(f"usr/lib/modules/*/kernel/{name}" for name in ("sound", "drivers/gpu", "drivers/media")),
    *(f"usr/lib/modules/*/kernel/drivers/{name}" for name in ("infiniband", "iio", "staging")),
    *(f"usr/lib/modules/*/kernel/drivers/net/{name}" for name in ("ethernet", "wireless")),
    # libvirtd starts each driver that it finds. These look for what is not there, or would put
    # dom0's interfaces and firewall in order.
    *(
        f"usr/lib/x86_64-linux-gnu/libvirt/connection-driver/libvirt_driver_{name}.so"
        for name in ("interface", "network", "nodedev", "nwfilter", "qemu")
    ),
)
SIZE = 8192
"""Of the disk, in MiB. Most of it is a hole in a file."""

INITRAMFS = ("virtio_pci", "virtio_blk", "ext4", "crc32c_generic")
"""Kernel modules that it takes to reach the disk."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a machine consists of, as files: all are read only."""

    directory: pathlib.Path

    @property
    def disk(self) -> pathlib.Path:
        """A raw ext4 file system."""
        return self.directory / "disk"

    @property
    def kernel(self) -> pathlib.Path:
        return self.directory / "vmlinuz"

    @property
    def initramfs(self) -> pathlib.Path:
        return self.directory / "initrd"

    @property
    def hypervisor(self) -> pathlib.Path:
        """An ELF file."""
        return self.directory / "xen"

    @property
    def configuration(self) -> pathlib.Path:
        """With what the hypervisor was built."""
        return self.directory / "xen.config"

    @property
    def version(self) -> str:
        """Of Debian's package of the hypervisor."""
        return (self.directory / "xen.version").read_text().strip()

    @property
    def key(self) -> pathlib.Path:
        """With which root logs in."""
        return self.directory / "key"

    @property
    def host_key(self) -> str:
        """By which the machine is known: a public key."""
        return (self.directory / "host_key.pub").read_text().strip()


def parts(say: Callable[[str], None]) -> Parts:
    """What was made earlier, by the same code, or is made now.

    :raises XenError: it could not be made
    """
    directory = settings.CACHE / f"dom0-{_recipe()}"
    with locks.locked(settings.CACHE):
        if not directory.exists():
            say("Making dom0's disk from Debian's packages: this takes a minute")
            # What was made of another recipe, or by half. A machine that runs keeps its own open.
            for outdated in settings.CACHE.glob("dom0*"):
                shutil.rmtree(outdated)
            with tempfile.TemporaryDirectory(dir=settings.CACHE, prefix="dom0.") as scratch:
                done = pathlib.Path(scratch, "done")
                done.mkdir()
                _build(pathlib.Path(scratch), Parts(done))
                done.rename(directory)
    return Parts(directory)


def _recipe() -> str:
    """A name for all that decides what is made, but for Debian's archive."""
    here = pathlib.Path(__file__)
    digest = hashlib.sha256()
    for path in (here, here.with_name("packages.py"), *sorted(settings.FILES.iterdir())):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _build(scratch: pathlib.Path, done: Parts) -> None:
    root = scratch / "root"
    files = packages.Archive(scratch / "apt").download(PACKAGES)
    _extract(files, root)
    _keep_boot_files(files, root, done)
    for pattern in UNWANTED:
        for path in root.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    _configure(root, done)
    _make_initramfs(root, scratch / "initramfs", done)
    commands.run(
        [
            *("mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-L", "dom0"),
            *("-d", root, done.disk, f"{SIZE}M"),
        ]
    )


def _extract(files: list[pathlib.Path], root: pathlib.Path) -> None:
    (root / "usr").mkdir(parents=True)
    for name in MERGED:
        (root / "usr" / name).mkdir()
        (root / name).symlink_to(f"usr/{name}")
    for file in files:
        # dpkg-deb --extract would put directories in the place of these links.
        with subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", file], stdout=subprocess.PIPE
        ) as package:
            commands.run(
                ["tar", "--extract", "--directory", root, "--keep-directory-symlink"],
                stdin=package.stdout,
            )
        if package.returncode:
            raise commands.XenError(f"{file} cannot be read")


def _keep_boot_files(files: list[pathlib.Path], root: pathlib.Path, done: Parts) -> None:
    (kernel,) = root.glob("boot/vmlinuz-*")
    shutil.copyfile(kernel, done.kernel)
    # QEMU knows ELF files only.
    packed = (root / f"boot/xen-{settings.XEN}-amd64.gz").read_bytes()
    done.hypervisor.write_bytes(gzip.decompress(packed))
    shutil.copyfile(root / f"boot/xen-{settings.XEN}-amd64.config", done.configuration)
    (package,) = [file for file in files if file.name.startswith("xen-hypervisor-4")]
    version = commands.run(["dpkg-deb", "--field", package, "Version"])
    (done.directory / "xen.version").write_text(version)
    shutil.rmtree(root / "boot")


def _configure(root: pathlib.Path, done: Parts) -> None:
    for name, target, mode in (
        ("init", "usr/sbin/init", 0o755),
        ("sshd_config", "etc/ssh/sshd_config", 0o644),
        ("libvirtd.conf", "etc/libvirt/libvirtd.conf", 0o644),
    ):
        shutil.copyfile(settings.FILES / name, root / target)
        (root / target).chmod(mode)
    for name in ("passwd", "group"):
        shutil.copyfile(root / f"usr/share/base-passwd/{name}.master", root / f"etc/{name}")
    with (root / "etc/passwd").open("a") as accounts:
        accounts.write("sshd:*:100:65534::/run/sshd:/usr/sbin/nologin\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    (root / "usr/bin/awk").symlink_to("mawk")
    for name, target in (("run", "/run"), ("lock", "/run/lock")):
        shutil.rmtree(root / "var" / name, ignore_errors=True)
        (root / "var" / name).symlink_to(target)
    for name in ("libvirt", "xen/console"):
        (root / "var/log" / name).mkdir(parents=True, exist_ok=True)
    # Where a processor is given that QEMU emulates, libvirt finds no model without this.
    model = root / "usr/share/libvirt/cpu_map/x86_486.xml"
    model.write_text(model.read_text().replace("<feature name='vme'/>", ""))

    inside = functools.partial(_inside, root)
    inside("ldconfig")
    (version,) = (path.name for path in (root / "usr/lib/modules").iterdir())
    inside("depmod", version)
    inside("python3", "-m", "compileall", "-q", "/usr/lib/python3.11")
    host_key = root / "etc/ssh/ssh_host_ed25519_key"
    for key in (host_key, done.key):
        commands.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key.name, "-f", key])
    shutil.copyfile(host_key.with_suffix(".pub"), done.directory / "host_key.pub")
    (root / "root/.ssh").mkdir(mode=0o700)
    shutil.copyfile(done.key.with_suffix(".pub"), root / "root/.ssh/authorized_keys")


def _inside(root: pathlib.Path, *argv: str) -> str:
    return commands.run(["chroot", root, *argv])


def _make_initramfs(root: pathlib.Path, tree: pathlib.Path, done: Parts) -> None:
    for directory in ("bin", "dev", "modules", "root"):
        (tree / directory).mkdir(parents=True)
    shutil.copy(root / "bin/busybox", tree / "bin")
    shutil.copyfile(settings.FILES / "initramfs-init", tree / "init")
    (tree / "init").chmod(0o755)
    for number, module in enumerate(_modules(root)):
        name = f"{number:02}-{pathlib.Path(module).name}"
        shutil.copyfile(root / module, tree / "modules" / name)
    names = sorted(str(path.relative_to(tree)) for path in tree.rglob("*"))
    commands.run(
        [
            *("cpio", "--create", "--format=newc", "--owner=0:0", "--quiet"),
            *("--file", done.initramfs),
        ],
        cwd=tree,
        input="\n".join(names).encode(),
    )


def _modules(root: pathlib.Path) -> Iterator[str]:
    """INITRAMFS and all that they need, in the order in which to load them."""
    (version,) = (path.name for path in (root / "usr/lib/modules").iterdir())
    listing = _inside(root, "modprobe", "--all", "--show-depends", "-S", version, *INITRAMFS)
    lines = (line.split() for line in listing.splitlines())
    yield from dict.fromkeys(words[1].lstrip("/") for words in lines if words[0] == "insmod")
