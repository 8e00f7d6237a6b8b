# SPDX-License-Identifier: Apache-2.0
"""Build the test guest.

``python3 build.py KERNEL_PACKAGE OUTPUT`` makes OUTPUT/vmlinuz and OUTPUT/initrd.gz. The guest is a
Debian cloud kernel and an initramfs that holds busybox, the kernel modules of virtio, the agent
(not started), and as much of this machine's Python (Debian's own) as that and the workload import,
compiled.
"""

from collections.abc import Sequence
import gzip
import json
import os
import pathlib
import py_compile
import re
import shutil
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
AGENT = HERE.parent.parent / "nova_snowflock"
# Where Debian's Python looks for more.
PACKAGES = "/usr/lib/python3/dist-packages"
MODULES = (
    "virtio_pci",
    "virtio_console",
    "virtio_balloon",
    "virtio_rng",
    "virtio_blk",
    "virtio_net",
    # For config drives.
    "virtio_scsi",
    "sr_mod",
    "isofs",
)
# Loaded by guests of Xen only.
XEN_MODULES = ("xen_blkfront", "xen_netfront")
# Importing hashlib takes OpenSSL along if it finds it: 5 MiB for hashes that Python itself has.
UNWANTED = ("_hashlib",)
# As installed (nova_snowflock/guest/bundled.py), but that this Python has no runpy.
PROGRAMS = {"snowflock-guest": "__main__", "snowflock": "command"}
PROGRAM = """\
#!/bin/sh
exec python3 -c 'import sys; from nova_snowflock.guest import {0}; sys.exit({0}.main())' "$@"
"""
IMPORTED = """
import encodings.ascii, json, sys
sys.modules.update(dict.fromkeys(sys.argv[3:]))
sys.path[:0] = sys.argv[1:3]
sys.dont_write_bytecode = True
import workload
import nova_snowflock.guest.__main__, nova_snowflock.guest.command, nova_snowflock.guest.workers
files = [
    getattr(module, "__file__", None)
    for name, module in sys.modules.items()
    if not name.startswith(("workload", "nova_snowflock"))
]
json.dump([file for file in files if file], sys.stdout)
"""


def kernel_modules(tree: pathlib.Path, names: Sequence[str]) -> list[pathlib.Path]:
    """Paths of modules and all that they need, in the order in which to load them."""
    paths = {path.stem.replace("-", "_"): path for path in tree.rglob("*.ko")}
    ordered: dict[str, pathlib.Path] = {}

    def add(name: str) -> None:
        if name in ordered:
            return
        # The .modinfo section: NUL-terminated "key=value" strings.
        found = re.search(rb"\0depends=([^\0]*)\0", paths[name].read_bytes())
        for needed in found[1].decode().split(",") if found and found[1] else ():
            add(needed.replace("-", "_"))
        ordered[name] = paths[name]

    for name in names:
        add(name)
    return list(ordered.values())


def shared_libraries(binary: str | pathlib.Path) -> list[str]:
    """What the dynamic linker loads for a program or library, and the linker: absolute paths."""
    listing = subprocess.run(["ldd", binary], check=True, capture_output=True, text=True).stdout
    return re.findall(r"(/\S+)(?= \(0x)", listing)


def install(source: str | pathlib.Path, root: pathlib.Path, name: str | None = None) -> None:
    target = root / (name or str(source)).lstrip("/")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(os.path.realpath(source), target)
    target.chmod(0o755)


def install_python(root: pathlib.Path) -> None:
    interpreter = os.path.realpath("/usr/bin/python3")
    repository = str(AGENT.parent)
    command = [interpreter, "-I", "-S", "-c", IMPORTED, str(HERE), repository, *UNWANTED]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    install(interpreter, root, "/usr/bin/python3")
    for library in shared_libraries(interpreter):
        install(library, root)
    for file in json.loads(listing):
        if file.endswith(".so"):
            install(file, root)
            for library in shared_libraries(file):
                install(library, root)
        else:
            install_compiled(file, root, file)
    for source in (AGENT / "__init__.py", *sorted(AGENT.glob("guest/*.py"))):
        install_compiled(str(source), root, f"{PACKAGES}/{source.relative_to(AGENT.parent)}")
    for name, module in PROGRAMS.items():
        program = root / "bin" / name
        program.write_text(PROGRAM.format(module))
        program.chmod(0o755)


def install_compiled(source: str, root: pathlib.Path, name: str) -> None:
    """In place of its source, and never compared with it."""
    py_compile.compile(
        source,
        str(root / (name.lstrip("/") + "c")),
        dfile=name,
        doraise=True,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )


def pack(root: pathlib.Path) -> bytes:
    """The tree as a compressed cpio archive that depends on nothing but its content."""
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*"))
    for path in root.rglob("*"):
        os.utime(path, (0, 0), follow_symlinks=False)
    archive = subprocess.run(
        ["cpio", "--create", "--format=newc", "--owner=0:0", "--reproducible", "--quiet"],
        cwd=root,
        input="\n".join(names).encode(),
        check=True,
        capture_output=True,
    ).stdout
    return gzip.compress(archive, 9, mtime=0)


def build(package: pathlib.Path, output: pathlib.Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        kernel = pathlib.Path(scratch, "kernel")
        root = pathlib.Path(scratch, "root")
        subprocess.run(["dpkg", "--extract", package, kernel], check=True)
        for directory in ("bin", "config", "data", "dev", "proc", "run", "sys", "modules/xen"):
            (root / directory).mkdir(parents=True)
        install("/bin/busybox", root)
        install(HERE / "init", root, "/init")
        install(HERE / "net", root, "/net")
        install(HERE / "static.py", root, "/static.py")
        install(HERE / "workload.py", root, "/workload.py")
        for directory, names in (("modules", MODULES), ("modules/xen", XEN_MODULES)):
            for number, module in enumerate(kernel_modules(kernel, names)):
                install(module, root, f"/{directory}/{number:02}-{module.name}")
        install_python(root)

        output.mkdir(parents=True, exist_ok=True)
        (image,) = kernel.glob("boot/vmlinuz-*")
        shutil.copyfile(image, output / "vmlinuz")
        (output / "initrd.gz").write_bytes(pack(root))


if __name__ == "__main__":
    build(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
