# SPDX-License-Identifier: Apache-2.0
"""Start, reach and end emulated hosts."""

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import contextlib
import fcntl
import json
import multiprocessing.connection as mpc
import os
import pathlib
import pickle
import secrets
import shutil
import subprocess
import sys
import time
from typing import Any, ParamSpec, TypeVar, cast

from tests.emulation import agent

P = ParamSpec("P")
T = TypeVar("T")

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
RUN = pathlib.Path("/run")
PREFIX = "snowflock-emulation."
NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")
# Longer than anything that is asked of a host; what hangs shall not take the whole run with it.
CALL_TIMEOUT = 300.0

# Says on the file of that number that it runs, and becomes the program of the further arguments.
_TELL = 'fd=$1; printf . >&$fd; exec {fd}>&-; shift; exec "$@"'


class EmulationError(Exception):
    """An emulated host could not be started, or has ended."""


class Host:
    """One emulated host.

    `name` is its host name, `address` that of its interface eth0 on the hosts' network, and `pid`
    its first process, as seen from outside.
    """

    def __init__(self, name: str, address: str, pid: int, socket: pathlib.Path) -> None:
        self.name = name
        self.address = address
        self.pid = pid
        self._socket = socket
        self._executor = concurrent.futures.ThreadPoolExecutor(64, thread_name_prefix=name)

    def __repr__(self) -> str:
        return f"<Host {self.name} {self.address}>"

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `function` on the host and return its result, or raise what it raised.

        It runs in a thread of the host's long-lived agent, which must be able to import it (from a
        module, not from ``__main__``); arguments and result must be picklable.

        :raises EmulationError: the host has ended, or does not answer; then with what it does.
        """
        try:
            return cast(T, self._call(CALL_TIMEOUT, function, args, kwargs))
        except TimeoutError:
            doing: object = "its agent hangs, too"
            with contextlib.suppress(TimeoutError):
                doing = self._call(5.0, agent.threads, (), {})
        raise EmulationError(f"{self.name} does not answer:\n{doing}")

    def _call(self, timeout: float, *call: object) -> object:
        """:raises TimeoutError: it does not answer in so many seconds"""
        try:
            with mpc.Client(str(self._socket), family="AF_UNIX") as connection:
                connection.send_bytes(pickle.dumps(call))
                outcome = connection.recv_bytes() if connection.poll(timeout) else None
        except (EOFError, OSError) as error:
            raise EmulationError(f"{self.name} has ended: {error!r}") from error
        if outcome is None:
            raise TimeoutError
        failed, result = pickle.loads(outcome)
        if failed:
            raise result
        return result

    def submit(
        self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs
    ) -> concurrent.futures.Future[T]:
        """:meth:`run` in the background."""
        return self._executor.submit(lambda: self.run(function, *args, **kwargs))

    def popen(self, argv: list[str], **kwargs: Any) -> subprocess.Popen[Any]:
        """Start a program on the host, in the caller's working directory.

        Whatever signal ends the process that this returns, the program is killed with it.
        """
        enter = _enter(self.pid, *NAMESPACES, f"--wdns={os.getcwd()}")
        # The kernel tells nobody of a parent that had died before it was asked to: this waits.
        asked, tell = os.pipe()
        bind = ["setpriv", "--pdeathsig", "KILL", "bash", "-c", _TELL, "bash", str(tell)]
        with open(asked, "rb") as answer:
            try:
                process = subprocess.Popen([*enter, *bind, *argv], pass_fds=[tell], **kwargs)
            finally:
                os.close(tell)
            answer.read(1)
        return process

    def path(self, path: str) -> pathlib.Path:
        """Where an absolute path of the host is found from outside."""
        return pathlib.Path(f"/proc/{self.pid}/root", path.lstrip("/"))

    def close(self) -> None:
        """Wait for the calls that :meth:`submit` has under way."""
        self._executor.shutdown(cancel_futures=True)


@contextlib.contextmanager
def hosts(count: int = 3, *, mtu: int = 1500, name: str | None = None) -> Iterator[list[Host]]:
    """`count` hosts, host1 at 10.77.0.1 and so on, for as long as the context lasts.

    `mtu` is that of their network, in bytes; `name` is for :func:`attach`. Any number of these may
    exist side by side: they share no name, interface, address or file.

    :raises EmulationError: a host could not be started; none remains.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(_state(name or f"{os.getpid()}-{secrets.token_hex(3)}"))

        # All that follows lives until the last copy of `keep` is closed: here, or by the kernel.
        lifeline, keep = os.pipe()
        processes: list[subprocess.Popen[bytes]] = []
        members: list[Host] = []

        def end() -> None:
            os.close(lifeline)
            os.close(keep)
            for process in processes:
                process.wait()
            for host in members:
                host.close()

        stack.callback(end)

        # One that only holds the bridge's namespace open.
        processes.append(_start(directory, "switch", ["--net"], ["cat"], stdin=lifeline))
        for number in range(1, count + 1):
            processes.append(_start_agent(directory, f"host{number}", lifeline))
        switch, *pids = [_first_child(process) for process in processes]
        for number, pid in enumerate(pids, 1):
            socket = directory / f"host{number}.sock"
            members.append(Host(f"host{number}", f"10.77.0.{number}", pid, socket))
        _join(switch, members, mtu)
        for host in members:
            _wait_until_up(host, directory / f"{host.name}.log")
        (directory / "hosts.json").write_text(
            json.dumps([(host.name, host.address, host.pid) for host in members])
        )
        yield members


def attach(name: str) -> list[Host]:
    """The hosts that another process keeps under this name.

    :raises EmulationError: there are none, or they are not up yet.
    """
    directory = RUN / (PREFIX + name)
    try:
        members = json.loads((directory / "hosts.json").read_text())
    except FileNotFoundError:
        raise EmulationError(f"no hosts named {name} are up") from None
    return [Host(host, address, pid, directory / f"{host}.sock") for host, address, pid in members]


def sweep() -> None:
    """Remove the files of harnesses that were killed; the kernel has ended all the rest."""
    with _locked(RUN):
        for directory in RUN.glob(PREFIX + "*"):
            with contextlib.suppress(BlockingIOError), _locked(directory, fcntl.LOCK_NB):
                shutil.rmtree(directory)


@contextlib.contextmanager
def _locked(directory: pathlib.Path, flags: int = 0) -> Iterator[None]:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _state(name: str) -> Iterator[pathlib.Path]:
    """A new directory for an instance, locked by its owner. One that nobody locks is stale."""
    sweep()
    directory = RUN / (PREFIX + name)
    with contextlib.ExitStack() as stack:
        with _locked(RUN):
            try:
                directory.mkdir(mode=0o700)
            except FileExistsError:
                raise EmulationError(f"hosts named {name} are up already") from None
            stack.enter_context(_locked(directory))
            stack.callback(_remove, directory)
        yield directory


def _remove(directory: pathlib.Path) -> None:
    # Not while another harness sweeps.
    with _locked(RUN):
        shutil.rmtree(directory)


def _start(
    directory: pathlib.Path, name: str, namespaces: Sequence[str], argv: list[str], **kwargs: Any
) -> subprocess.Popen[bytes]:
    """Start a program in new namespaces, as the only child of the process that this returns.

    What it says goes to a file in the instance's directory.
    """
    with (directory / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            ["unshare", *namespaces, "--fork", *argv],
            stdout=log,
            stderr=log,
            # Ctrl-C is for the harness, which may want to use its hosts before it ends them.
            start_new_session=True,
            **kwargs,
        )


def _start_agent(directory: pathlib.Path, name: str, lifeline: int) -> subprocess.Popen[bytes]:
    return _start(
        directory,
        name,
        [*NAMESPACES, "--mount-proc"],
        [
            *(sys.executable, "-m", "tests.emulation.agent"),
            *(name, str(directory / f"{name}.sock"), f"--lifeline={lifeline}"),
        ],
        stdin=subprocess.DEVNULL,
        pass_fds=[lifeline],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )


def _first_child(process: subprocess.Popen[bytes]) -> int:
    """The child of `unshare`; once there is one, its namespaces are there as well."""
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        if pids := children.read_text().split():
            return int(pids[0])
        time.sleep(0.002)
    raise EmulationError(f"{process.args!r} ended with status {process.returncode}")


def _wait_until_up(host: Host, log: pathlib.Path) -> None:
    while host.path("/").exists():
        with contextlib.suppress(EmulationError):
            host.run(os.getpid)
            return
        time.sleep(0.02)
    raise EmulationError(f"{host.name} did not start: {log.read_text()}")


def _enter(pid: int, *namespaces: str) -> list[str]:
    # Its root as well: that of its mount namespace is another where all this runs in a chroot.
    return ["nsenter", f"--target={pid}", "--root", *namespaces, "--"]


def _ip(pid: int, *commands: str) -> None:
    """Run `ip` commands in the network namespace of a process."""
    argv = [*_enter(pid, "--net"), "ip", "-batch", "-"]
    batch = "\n".join(commands)
    done = subprocess.run(argv, input=batch, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EmulationError(f"{done.stderr.strip()}, in:\n{batch}")


def _join(switch: int, members: list[Host], mtu: int) -> None:
    """Connect the hosts by a bridge in a network namespace of its own."""
    _ip(
        switch,
        # It floods multicast: it would otherwise need somebody to ask the hosts what they receive.
        "link add br0 type bridge mcast_snooping 0",
        f"link set br0 mtu {mtu} up",
    )
    for host in members:
        ends = f"{host.name} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {host.pid}"
        _ip(switch, f"link add {ends}", f"link set {host.name} master br0 up")
        _ip(
            host.pid,
            "link set lo up",
            f"address add {host.address}/24 dev eth0",
            "link set eth0 up",
            "route add 224.0.0.0/4 dev eth0",
        )
