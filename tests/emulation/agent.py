# SPDX-License-Identifier: Apache-2.0
"""The process inside an emulated host that starts its libvirtd and runs functions there.

Started as the first process of the host's PID namespace. A call is one connection to its socket: a
pickled (function, arguments, keyword arguments) in, a pickled (failed, result or exception) out.
"""

import argparse
from collections.abc import Sequence
import multiprocessing.connection as mpc
import os
import pathlib
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import time
import traceback
import uuid

import libvirt

PRIVATE = (
    # /run holds sockets and PID files; the others are libvirt's and nova-snowflock's own.
    "/run",
    "/etc/libvirt",
    "/var/cache/libvirt",
    "/var/lib/libvirt",
    "/var/lib/nova-snowflock",
    "/var/log/libvirt",
)
# /dev/kvm is not among them: where KVM opens but cannot run guests, as in a nested virtual machine
# without support for it, libvirtd would probe it for 90 s at each start.
DEVICES = ("full", "fuse", "null", "random", "tty", "urandom", "zero", "net/tun")

LIBVIRTD_CONF = """\
auth_unix_ro = "none"
auth_unix_rw = "none"
log_outputs = "2:file:/var/log/libvirt/libvirtd.log"
"""
# There is no virtlogd and no security module here, and the hosts would share control groups. As
# everywhere on Debian, QEMU runs as a user of its own.
QEMU_CONF = """\
stdio_handler = "file"
security_driver = "none"
cgroup_controllers = []
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True)


def make_private() -> None:
    """Give this host directories, devices and a /sys of its own."""
    for directory in PRIVATE:
        os.makedirs(directory, exist_ok=True)
        mode = os.stat(directory).st_mode & 0o7777
        run("mount", "-t", "tmpfs", "-o", f"mode={mode:o}", "tmpfs", directory)
    # /sys shows the network interfaces of the namespace that mounted it.
    run("mount", "-t", "sysfs", "sysfs", "/sys")

    devices = pathlib.Path("/run/dev")
    devices.mkdir()
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(devices))
    for name in DEVICES:
        source, target = pathlib.Path("/dev", name), devices / name
        if not source.exists():
            continue
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            target.mkdir()
        else:
            target.touch()
        run("mount", "--bind", str(source), str(target))
    for name, file in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        (devices / name).symlink_to(f"/proc/self/{file}")
    # QEMU makes a pseudo terminal for a guest's console.
    (devices / "pts").mkdir()
    run(
        "mount",
        "-t",
        "devpts",
        "-o",
        "newinstance,mode=620,ptmxmode=666",
        "devpts",
        f"{devices}/pts",
    )
    (devices / "ptmx").touch()
    # Not a symlink: libvirt may leave one out of the /dev that it makes for a QEMU.
    run("mount", "--bind", f"{devices}/pts/ptmx", f"{devices}/ptmx")
    (devices / "shm").mkdir()
    run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", str(devices / "shm"))
    (devices / "hugepages").mkdir()
    run("mount", "-t", "hugetlbfs", "hugetlbfs", str(devices / "hugepages"))
    run("mount", "--move", str(devices), "/dev")
    devices.rmdir()


def bind(directories: Sequence[str]) -> None:
    """Have directories of the machine in this host: "SOURCE:TARGET" each."""
    for directory in directories:
        source, target = directory.split(":")
        os.makedirs(target, exist_ok=True)
        run("mount", "--bind", source, target)


def install_libvirt() -> None:
    """Make the directories of Debian's package, and this host's configuration."""
    state = pathlib.Path("/var/lib/libvirt")
    for name, mode in (("boot", 0o711), ("images", 0o711), ("qemu", 0o750), ("sanlock", 0o700)):
        (state / name).mkdir(mode, exist_ok=True)
    shutil.chown(state / "qemu", "libvirt-qemu", "libvirt-qemu")
    # libvirt would take the machine's, and the hosts for one.
    identity = uuid.uuid5(uuid.NAMESPACE_DNS, socket.gethostname())
    configuration = f'{LIBVIRTD_CONF}host_uuid = "{identity}"\n'
    pathlib.Path("/etc/libvirt/libvirtd.conf").write_text(configuration)
    pathlib.Path("/etc/libvirt/qemu.conf").write_text(QEMU_CONF)


def libvirtd_runs() -> bool:
    try:
        libvirt.open("qemu:///system").close()
    except libvirt.libvirtError:
        return False
    return True


def start_libvirtd() -> None:
    daemon = subprocess.Popen(["/usr/sbin/libvirtd"])
    deadline = time.monotonic() + 60
    while True:
        try:
            connection = libvirt.open("qemu:///system")
            break
        except libvirt.libvirtError:
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    # The first question about QEMU makes libvirtd probe it for most of a second, which is to be
    # part of nobody's first domain.
    with connection:
        connection.getDomainCapabilities(None, "x86_64", None, "qemu")


def threads() -> str:
    """Where this process's threads are."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return "\n".join(
        f"{names.get(ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
    )


def evaluate(request: bytes) -> bytes:
    """Run a pickled call; its pickled outcome."""
    try:
        function, arguments, keywords = pickle.loads(request)
        return pickle.dumps((False, function(*arguments, **keywords)))
    except BaseException as error:
        error.add_note(f"on {socket.gethostname()}:\n{traceback.format_exc()}")
        failure = error
    try:
        outcome = pickle.dumps((True, failure))
        # Not every exception can be made again from what it keeps.
        pickle.loads(outcome)
    except Exception:
        outcome = pickle.dumps((True, RuntimeError("".join(traceback.format_exception(failure)))))
    return outcome


def answer(caller: socket.socket) -> None:
    with mpc.Connection(caller.detach()) as connection:
        connection.send_bytes(evaluate(connection.recv_bytes()))


def serve(path: str, directories: Sequence[str]) -> None:
    # The socket comes first: the host's own /run will hide its directory.
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(path)
        listener.listen(64)
        make_private()
        bind(directories)
        install_libvirt()
        start_libvirtd()
        # libvirt's Python binding prints errors, besides raising them.
        libvirt.registerErrorHandler(lambda *_: None, None)
        while True:
            caller, _ = listener.accept()
            threading.Thread(target=answer, args=[caller], daemon=True).start()


def end_with(lifeline: int) -> None:
    """End this process, hence the host, when the harness closes its end of the pipe."""
    os.read(lifeline, 1)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", help="the host's")
    parser.add_argument("socket", help="path of the socket on which it takes calls")
    parser.add_argument("--lifeline", type=int, help="a pipe whose end is the host's end")
    parser.add_argument("--bind", action="append", default=[], metavar="SOURCE:TARGET")
    options = parser.parse_args()

    socket.sethostname(options.name)
    agent = os.fork()
    if agent == 0:
        if options.lifeline is not None:
            os.close(options.lifeline)
        serve(options.socket, options.bind)
    if options.lifeline is not None:
        threading.Thread(target=end_with, args=[options.lifeline], daemon=True).start()
    # The first process of a PID namespace is the parent of its orphans.
    while os.wait()[0] != agent:
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
