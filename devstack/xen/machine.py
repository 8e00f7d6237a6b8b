# SPDX-License-Identifier: Apache-2.0
"""A machine: start it, run programs in its dom0, and end it."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import pathlib
import shlex
import shutil
import socket
import subprocess
import time

from devstack.embedded import processes
from devstack.embedded import settings as embedded
from devstack.xen import commands
from devstack.xen import emulator
from devstack.xen import hypervisor
from devstack.xen import locks
from devstack.xen import rootfs
from devstack.xen import settings

NAME = "dom0"
READY = "dom0: ready"
TIMED_OUT = (124, 137)
"""Exit statuses of timeout(1)."""
# Without a cache: what is edited here is to be seen there at once.
MOUNT_OPTIONS = "trans=virtio,version=9p2000.L,msize=512000,cache=none,ro"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Daemon(processes.Service):
    """One whose files are with a machine's."""

    machine: "Machine"

    @property
    def log(self) -> pathlib.Path:
        return self.machine.directory / f"{self.name}.log"

    @property
    def pid_file(self) -> pathlib.Path:
        return self.machine.directory / f"{self.name}.pid"


class Emulator(Daemon):
    """QEMU, whose log is that of the machine's console."""

    @property
    def log(self) -> pathlib.Path:
        return self.machine.log

    def last_words(self) -> str:
        # A kernel that dies says why before all else.
        lines = self.log.read_text(errors="replace").splitlines()
        return "\n".join([*filter(None, lines), f"(in {self.log})"][-40:])


@dataclasses.dataclass(frozen=True)
class Machine:
    """The machine of a number: there are as many as are used."""

    number: int = 1

    @property
    def directory(self) -> pathlib.Path:
        """All that it keeps."""
        return settings.STATE / str(self.number)

    @property
    def log(self) -> pathlib.Path:
        """Of its console."""
        return self.directory / "console.log"

    @property
    def pages(self) -> bool:
        """Whether the hypervisor is the one that can."""
        return self._paging.exists()

    @property
    def _paging(self) -> pathlib.Path:
        return self.directory / "paging"

    @property
    def _reached(self) -> pathlib.Path:
        """Host and port of dom0's sshd."""
        return self.directory / "reached"

    @property
    def _socket(self) -> pathlib.Path:
        return self.directory / "ssh"

    def running(self, argv: Sequence[str] = (), namespace: pathlib.Path | None = None) -> Emulator:
        """The machine as it was started last."""
        return Emulator(
            "machine",
            argv,
            namespace=namespace,
            ready=lambda: READY in self.log.read_text(errors="replace"),
            look_again=0.3,
            patience=300.0,
            machine=self,
        )

    def connection(self) -> Daemon:
        """What keeps a connection that all programs share: to make one takes dom0 seconds."""
        ask = [*self._ssh(), "-O", "check", NAME]
        return Daemon(
            "connection",
            [*self._ssh(), "-M", "-N", NAME],
            ready=lambda: not subprocess.run(ask, capture_output=True, check=False).returncode,
            machine=self,
        )

    def _ssh(self) -> list[str]:
        reached = self._reached
        host, port = reached.read_text().split() if reached.exists() else ("127.0.0.1", "0")
        options = {
            "User": "root",
            "HostName": host,
            "Port": port,
            "HostKeyAlias": NAME,
            "UserKnownHostsFile": self.directory / "known_hosts",
            "IdentityFile": self.directory / "key",
            "IdentitiesOnly": "yes",
            "BatchMode": "yes",
            "ControlPath": self._socket,
            "LogLevel": "ERROR",
        }
        return ["ssh", "-F", "none", *(f"-o{name}={value}" for name, value in options.items())]

    def up(
        self,
        *,
        paging: bool = False,
        name: str = NAME,
        link: emulator.Link | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Start the machine unless it runs, and wait for libvirt to answer in its dom0.

        With `paging`, its hypervisor can page guests' memory, which Debian's cannot. Without, any
        will do that runs. `name` is dom0's; `link` is as :func:`emulator.alone` says, if not given.

        :raises XenError: it could not be made, dom0 has failed, or runs on the other hypervisor or
            in another network
        """
        with locks.locked(self.directory):
            if self.running().pid() is None:
                self._start(paging, name, link or emulator.alone(_free_port()), say)
            elif paging and not self.pages:
                raise commands.XenError(
                    "the machine that runs has Debian's hypervisor: `down` first"
                )
            elif link is not None and self._reached.read_text() != _where(link):
                raise commands.XenError("the machine that runs is in another network: `down` first")
            try:
                self.running().wait()
                if self.connection().pid() is None:
                    # ssh does not take over one that its owner left.
                    self._socket.unlink(missing_ok=True)
                    self.connection().start()
                self.connection().wait()
            except processes.CloudError as error:
                raise commands.XenError(str(error)) from None
            self._mount_checkout()

    def _start(
        self, paging: bool, name: str, link: emulator.Link, say: Callable[[str], None]
    ) -> None:
        self.connection().stop()
        overlay = self.directory / "disk.qcow2"
        for file in (self.log, overlay, self._paging):
            file.unlink(missing_ok=True)
        parts = rootfs.parts(say)
        self.log.touch()
        if paging:
            self._paging.touch()
        commands.run(
            ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", parts.disk, overlay]
        )
        for name_of_file, text in (
            ("key", parts.key.read_text()),
            ("known_hosts", f"{NAME} {parts.host_key}\n"),
            (self._reached.name, _where(link)),
        ):
            embedded.write(self.directory / name_of_file, text)
        chosen = hypervisor.paging(parts, say) if paging else parts.hypervisor
        say("Starting the machine")
        own = emulator.Own(name, overlay, self.log, link)
        self.running(emulator.argv(parts, chosen, own), link.namespace).start()

    def _mount_checkout(self) -> None:
        """Where it is on this machine. Programs find themselves there, and cannot write."""
        where = str(settings.REPOSITORY)
        if self.run(["mountpoint", "--quiet", where]).returncode:
            for argv in (
                ["mkdir", "--parents", where],
                ["mount", "-t", "9p", "-o", MOUNT_OPTIONS, emulator.CHECKOUT, where],
            ):
                self.run(argv, check=True)

    def down(self) -> None:
        """End the machine and remove all that it kept."""
        if not self.directory.exists():
            return
        with locks.locked(self.directory):
            self.connection().stop()
            self.running().stop()
            shutil.rmtree(self.directory)
        with contextlib.suppress(OSError):  # others are there
            settings.STATE.rmdir()

    def is_up(self) -> bool:
        """Whether libvirt has answered, and programs can be run."""
        return self.running().is_ready() and self.connection().is_ready()

    def run(
        self,
        argv: Sequence[str],
        *,
        input: str | None = None,
        timeout: float = 120.0,
        check: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in dom0, as root, for `timeout` seconds at most.

        :raises XenError: no machine runs; or with `check`, the program failed
        :raises subprocess.TimeoutExpired: it took too long, and has been ended
        """
        started = time.monotonic()
        done = subprocess.run(
            self.command(["timeout", "--kill-after=5", str(timeout), *argv]),
            input=input,
            stdin=subprocess.DEVNULL if input is None else None,
            capture_output=True,
            text=True,
            errors="replace",
            # If it is the machine that hangs.
            timeout=timeout + 30.0,
            check=False,
        )
        if done.returncode in TIMED_OUT and time.monotonic() - started >= timeout:
            raise subprocess.TimeoutExpired(argv, timeout, done.stdout, done.stderr)
        if check and done.returncode:
            raise commands.XenError(
                f"{shlex.join(argv)} ended with status {done.returncode} in dom0:\n{done.stderr}"
            )
        return done

    def command(self, argv: Sequence[str]) -> list[str]:
        """What is run here to run a program in dom0; ssh's 255 says that dom0 is not reached.

        :raises XenError: no machine runs
        """
        if self.running().pid() is None:
            raise commands.XenError("no Xen machine runs: `python -m devstack.xen up` starts it")
        return [*self._ssh(), NAME, shlex.join(argv)]

    def put(self, local: pathlib.Path, remote: str) -> None:
        """Copy a file into dom0, with its mode, and make the directories that this takes.

        :raises XenError: it could not be written
        """
        mode = f"--mode={local.stat().st_mode & 0o777:o}"
        with local.open("rb") as content:
            commands.run(self.command(["install", "-D", mode, "/dev/stdin", remote]), stdin=content)

    @contextlib.contextmanager
    def forwarded(self, local: pathlib.Path, remote: str) -> Iterator[None]:
        """Have whoever connects to the local UNIX socket reach that of dom0.

        :raises XenError: no machine runs, or there is such a file
        """
        options = [*self._ssh(), "-L", f"{local}:{remote}"]
        commands.run([*options, "-O", "forward", NAME])
        try:
            yield
        finally:
            subprocess.run([*options, "-O", "cancel", NAME], capture_output=True, check=False)
            local.unlink(missing_ok=True)


def _where(link: emulator.Link) -> str:
    return f"{link.host} {link.port}"


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
