# SPDX-License-Identifier: Apache-2.0
"""Daemons: start, find again, wait for, and end them.

A daemon leads a session, whose number is in a file, together with what tells it from a later
process of the same number: when it started, and since which boot. Processes that it leaves behind
are members of the session still.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import time

from devstack.embedded import settings

LOOK_AGAIN = 0.1


class CloudError(Exception):
    """The cloud could not be brought up or down; the message says what to look at."""


@dataclasses.dataclass(frozen=True)
class Service:
    """One daemon.

    `ready` says whether it does its work; asked only while it runs. `patience` is how long it may
    take until then, and until it has ended, in seconds. `namespace` is a file of a network
    namespace; `look_again` the seconds between questions whether it is ready.
    """

    name: str
    argv: Sequence[str]
    ready: Callable[[], bool] = lambda: True
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    namespace: pathlib.Path | None = None
    end_by: signal.Signals = signal.SIGTERM
    look_again: float = LOOK_AGAIN
    patience: float = 120.0

    @property
    def log(self) -> pathlib.Path:
        return settings.LOG / f"{self.name}.log"

    @property
    def pid_file(self) -> pathlib.Path:
        return settings.RUN / f"{self.name}.pid"

    def pid(self) -> int | None:
        """The daemon's process, if it runs."""
        leader = self._leader()
        if leader and (process := inspect(leader.pid)) and process == leader:
            return leader.pid
        return None

    def _leader(self) -> "Process | None":
        """The process that was started last, whether it runs or not."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            pid, started, boot = self.pid_file.read_text().split()
            if boot == boot_id():
                return Process(int(pid), int(pid), int(started))
        return None

    def _remember(self, pid: int) -> None:
        process = inspect(pid)
        if process:
            settings.write(self.pid_file, f"{pid} {process.started} {boot_id()}\n")

    def is_ready(self) -> bool:
        return self.pid() is not None and self.ready()

    def start(self) -> bool:
        """Start the daemon unless it runs; whether it did not. It need not be ready then."""
        if self.pid() is not None:
            return False
        self._end_remains()
        self._launch()
        return True

    def _launch(self) -> None:
        argv = [*enter(self.namespace), *self.argv]
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                cwd="/",
                env=os.environ | self.environment,
            )
        self._remember(process.pid)

    def wait(self) -> None:
        """Until the daemon is ready.

        :raises CloudError: it has ended, or takes too long
        """
        deadline = time.monotonic() + self.patience
        while not self.is_ready():
            if self.pid() is None:
                raise CloudError(f"{self.name} has ended. Its last words:\n{self.last_words()}")
            if time.monotonic() > deadline:
                raise CloudError(
                    f"{self.name} is not ready after {self.patience:.0f} s. Its last words:\n"
                    f"{self.last_words()}"
                )
            time.sleep(self.look_again)

    def last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([*lines[-15:], f"(more in {self.log})"])

    def stop(self) -> None:
        """End the daemon and all that it started."""
        pid = self.pid()
        if pid is not None:
            kill(pid, self.end_by)
            deadline = time.monotonic() + min(self.patience, 20.0)
            while self.pid() is not None:
                if time.monotonic() > deadline:
                    kill(pid)
                time.sleep(LOOK_AGAIN)
        self._end_remains()
        self.pid_file.unlink(missing_ok=True)

    def kill(self) -> None:
        """End the daemon and all that it started, at once."""
        for process in list(self.processes()):
            kill(process)
        self._end_remains()
        self.pid_file.unlink(missing_ok=True)

    def _end_remains(self) -> None:
        while remains := list(self.processes()):
            for process in remains:
                kill(process, signal.SIGKILL)
            time.sleep(LOOK_AGAIN / 10)

    def processes(self) -> Iterator[int]:
        """All that the daemon consists of, and what one that is gone left behind."""
        leader = self._leader()
        if leader is None:
            return
        alive = inspect(leader.pid)
        if alive and alive != leader:
            # Another has its number by now, so no member of the session is left.
            return
        for pid in pids():
            process = inspect(pid)
            if process and process.session == leader.pid:
                yield pid


@dataclasses.dataclass(frozen=True)
class Process:
    """A process that runs; `started` is in clock ticks since the machine's boot."""

    pid: int
    session: int
    started: int


def enter(namespace: pathlib.Path | None) -> list[str]:
    return ["nsenter", f"--net={namespace}", "--"] if namespace else []


def kill(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def pids() -> Iterator[int]:
    """All processes of the machine that can be seen from here."""
    return (int(name) for name in os.listdir("/proc") if name.isdecimal())


def inspect(pid: int) -> Process | None:
    """The process of that number; None if there is none, or if it has ended."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (OSError, ProcessLookupError):
        return None
    # Behind the program's name, which may hold anything: state, parent, group, session, ...
    fields = stat.rpartition(")")[2].split()
    if fields[0] in "ZX":
        return None
    return Process(pid, int(fields[3]), int(fields[19]))


def boot_id() -> str:
    return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def inhabitants(namespace: pathlib.Path) -> Iterator[int]:
    """Processes in the network namespace."""
    wanted = namespace.stat().st_ino
    for pid in pids():
        with contextlib.suppress(OSError, ProcessLookupError):
            if os.stat(f"/proc/{pid}/ns/net").st_ino == wanted:
                yield pid


def run(
    argv: Sequence[str],
    *,
    log: str,
    environment: Mapping[str, str] | None = None,
    namespace: pathlib.Path | None = None,
) -> None:
    """Run a program to its end; what it says is appended to the log of that name.

    However this process ends, the program ends with it: nothing is made by half and then gone on
    with behind the back of the next `up`.

    :raises CloudError: it failed
    """
    path = settings.LOG / f"{log}.log"
    with path.open("ab") as file:
        done = subprocess.run(
            [*enter(namespace), "setpriv", "--pdeathsig", "KILL", *argv],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd="/",
            env=os.environ | (environment or {}),
            check=False,
        )
    if done.returncode:
        last = "\n".join(path.read_text(errors="replace").splitlines()[-15:])
        raise CloudError(
            f"{' '.join(argv)} ended with status {done.returncode}:\n{last}\n(more in {path})"
        )


def memory(pid: int) -> int:
    """What the process has in memory, its share of what it shares included, in KiB."""
    try:
        lines = pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (OSError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
