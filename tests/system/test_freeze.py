# SPDX-License-Identifier: Apache-2.0
"""The freeze, on a real QEMU under the same sandbox that libvirt gives it."""

from collections.abc import Iterator
import contextlib
import ctypes
import hashlib
import json
import os
import pathlib
import platform
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import pytest

from nova_snowflock import exception
from nova_snowflock.virt.qemu import freeze
from nova_snowflock.virt.qemu import monitor
from nova_snowflock.virt.qemu import procfs
from nova_snowflock.virt.qemu import ptrace
from tests.guest import domain

MEMORY = 128 << 20
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


class Qemu:
    """A guest without libvirt, counting in memory."""

    def __init__(self, directory: pathlib.Path) -> None:
        path = directory / "qmp"
        self.process = subprocess.Popen(
            [
                *("qemu-system-x86_64", "-machine", "pc-q35-7.2,dump-guest-core=off"),
                *("-accel", "tcg", "-cpu", "max", "-m", f"{MEMORY >> 20}", "-nodefaults"),
                *("-display", "none", "-device", "VGA", "-sandbox", SANDBOX),
                *("-serial", f"file:{directory}/console"),
                *("-qmp", f"unix:{path},server=on,wait=off"),
                *("-kernel", f"{domain.IMAGE}/vmlinuz", "-initrd", f"{domain.IMAGE}/initrd.gz"),
                *("-append", "console=ttyS0 snowflock.fill=8 snowflock.tick_ms=10"),
            ]
        )
        self._socket = socket.socket(socket.AF_UNIX)
        while True:
            try:
                self._socket.connect(os.fspath(path))
                break
            except OSError:
                assert self.process.poll() is None
                time.sleep(0.01)
        self._lines = self._socket.makefile("rw")
        self._lines.readline()
        self.command("qmp_capabilities")
        answer = self.human("gpa2hva 0")
        self.address = int(answer.rpartition("0x")[2], 16)
        assert monitor.parse_ram_blocks(self.human("info ramblock"))[0].size == MEMORY

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return [(self.address, MEMORY)]

    def command(self, name: str, **arguments: Any) -> Any:
        self._lines.write(json.dumps({"execute": name, "arguments": arguments}) + "\n")
        self._lines.flush()
        while "return" not in (reply := json.loads(self._lines.readline())):
            assert "event" in reply, reply
        return reply["return"]

    def human(self, line: str) -> str:
        return str(self.command("human-monitor-command", **{"command-line": line})).strip()

    def digest(self, pid: int) -> str:
        """Return a digest of the guest's memory as the process ``pid`` has it."""
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as file:
            return hashlib.blake2b(os.pread(file.fileno(), MEMORY, self.address)).hexdigest()

    def goes_on(self) -> bool:
        """Say whether guest and monitor run: the guest's memory changes within 10 s."""
        before = self.digest(self.pid)
        deadline = time.monotonic() + 10
        while self.command("query-status")["running"] and time.monotonic() < deadline:
            if self.digest(self.pid) != before:
                return True
        return False

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._lines.close()
        self._socket.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Qemu]:
    guest = Qemu(tmp_path_factory.mktemp("qemu"))
    time.sleep(2)  # it writes to its memory by then
    yield guest
    guest.close()


@pytest.fixture
def qemu(shared: Qemu) -> Qemu:
    """A guest that runs, and that the test leaves running."""
    assert shared.goes_on()
    return shared


@pytest.fixture
def doomed(tmp_path: pathlib.Path) -> Iterator[Qemu]:
    """A guest that the test may kill."""
    guest = Qemu(tmp_path)
    yield guest
    guest.close()


def children_of_this_process() -> set[int]:
    tasks = pathlib.Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


def status(pid: int, key: str) -> str:
    for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return line.partition(":")[2].strip()
    raise KeyError(key)


def wait_for_state(pid: int, letter: str) -> None:
    deadline = time.monotonic() + 5
    while not status(pid, "State").startswith(letter):
        assert time.monotonic() < deadline, status(pid, "State")
        time.sleep(0.001)


def frozen_of(qemu: Qemu) -> procfs.Process:
    qemu.command("stop")
    with freeze.Freezer(qemu.pid, qemu.ranges) as freezer:
        frozen = freezer.freeze()
        freezer.settle()
    qemu.command("cont")
    return frozen


@pytest.fixture
def frozen(qemu: Qemu) -> Iterator[procfs.Process]:
    process = frozen_of(qemu)
    yield process
    process.kill()


def test_memory_is_what_it_was_and_the_guest_goes_on(qemu: Qemu) -> None:
    qemu.command("stop")
    before = qemu.digest(qemu.pid)
    steps: list[str] = []
    with freeze.Freezer(qemu.pid, qemu.ranges) as freezer:
        frozen = freezer.freeze(steps.append)
        freezer.settle()
    try:
        assert qemu.digest(qemu.pid) == before
        qemu.command("cont")
        assert qemu.goes_on()
        assert qemu.digest(qemu.pid) != before
        assert qemu.digest(frozen.pid) == before
        assert steps == ["attach", "dofork", "clone", "dontfork", "detach"]
    finally:
        frozen.kill()
    assert not frozen.alive()


def test_frozen_process_holds_nothing_but_memory(frozen: procfs.Process) -> None:
    wait_for_state(frozen.pid, "T")
    assert os.listdir(f"/proc/{frozen.pid}/fd") == []
    assert status(frozen.pid, "TracerPid") == "0"
    assert status(frozen.pid, "Threads") == "1"
    assert pathlib.Path(f"/proc/{frozen.pid}/oom_score_adj").read_text() == "900\n"
    # Not dumpable: its files are root's, whoever QEMU runs as.
    assert pathlib.Path(f"/proc/{frozen.pid}/mem").stat().st_uid == 0


def test_no_signal_but_kill_makes_it_run_or_end(qemu: Qemu, frozen: procfs.Process) -> None:
    wait_for_state(frozen.pid, "T")
    before = qemu.digest(frozen.pid)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        os.kill(frozen.pid, number)
    os.kill(frozen.pid, signal.SIGCONT)
    wait_for_state(frozen.pid, "S")
    # arch/x86/entry/syscalls/syscall_64.tbl: 34 is pause
    assert pathlib.Path(f"/proc/{frozen.pid}/syscall").read_text().split()[0] == "34"
    assert frozen.alive()
    assert qemu.digest(frozen.pid) == before
    assert qemu.goes_on()


def test_ranges_stay_excluded_from_other_forks(qemu: Qemu, frozen: procfs.Process) -> None:
    def excluded(pid: int) -> bool:
        smaps = pathlib.Path(f"/proc/{pid}/smaps").read_text()
        mapping = smaps[smaps.index(f"{qemu.address:x}-") :]
        flags = mapping[mapping.index("VmFlags:") :].partition("\n")[0].split()
        return "dc" in flags

    assert excluded(qemu.pid)


def test_many_freezes_leave_nothing(qemu: Qemu) -> None:
    before = children_of_this_process(), len(os.listdir("/proc/self/fd"))
    threads = len(os.listdir("/proc/self/task"))
    mappings = pathlib.Path(f"/proc/{qemu.pid}/maps").read_text().count("\n")
    for _ in range(200):
        frozen_of(qemu).kill()
    assert (children_of_this_process(), len(os.listdir("/proc/self/fd"))) == before
    assert len(os.listdir("/proc/self/task")) == threads
    assert pathlib.Path(f"/proc/{qemu.pid}/maps").read_text().count("\n") <= mappings + 8
    assert status(qemu.pid, "TracerPid") == "0"
    assert qemu.goes_on()


def test_signals_while_it_is_frozen_arrive_once_and_late(qemu: Qemu) -> None:
    """SIGSTOP passes every mask: it must neither spoil the freeze nor get lost."""
    qemu.command("stop")
    stop = ptrace.Tracee.aim
    sent: list[int] = []

    def aim(tracee: ptrace.Tracee, number: int, *arguments: int) -> None:
        stop(tracee, number, *arguments)
        if not sent:
            sent.append(number)
            os.kill(qemu.pid, signal.SIGSTOP)

    with pytest.MonkeyPatch.context() as patch, freeze.Freezer(qemu.pid, qemu.ranges) as freezer:
        patch.setattr(ptrace.Tracee, "aim", aim)
        frozen = freezer.freeze()
        freezer.settle()
    assert sent
    wait_for_state(qemu.pid, "T")
    os.kill(qemu.pid, signal.SIGCONT)
    qemu.command("cont")
    assert qemu.digest(frozen.pid) is not None
    frozen.kill()
    assert qemu.goes_on()


def test_stopped_process_is_refused(qemu: Qemu) -> None:
    os.kill(qemu.pid, signal.SIGSTOP)
    wait_for_state(qemu.pid, "T")
    with pytest.raises(exception.CannotFork, match="stopped by signal 19"):
        freeze.Freezer(qemu.pid, qemu.ranges)
    os.kill(qemu.pid, signal.SIGCONT)
    assert status(qemu.pid, "TracerPid") == "0"
    assert qemu.goes_on()


def test_wrong_range_fails_and_the_guest_goes_on(qemu: Qemu) -> None:
    children = children_of_this_process()
    with (
        freeze.Freezer(qemu.pid, [*qemu.ranges, (0x1000, 0x1000)]) as freezer,
        pytest.raises(exception.FreezeFailed, match="Cannot allocate memory"),
    ):
        freezer.freeze()
    assert children_of_this_process() == children
    assert qemu.goes_on()


def test_leaving_without_settling_removes_the_frozen_process(qemu: Qemu) -> None:
    with freeze.Freezer(qemu.pid, qemu.ranges) as freezer:
        frozen = freezer.freeze()
        assert frozen.alive()
    assert not frozen.alive()
    frozen.kill()  # which also reaps it: it is this process's child, as QEMU is
    assert not os.path.exists(f"/proc/{frozen.pid}")
    assert qemu.goes_on()


def test_frozen_process_ends_with_its_tracer_unless_settled(qemu: Qemu) -> None:
    """A freezing process that is killed leaves neither a copy that runs nor a stopped guest."""
    code = (
        "import os, sys\n"
        "from nova_snowflock.virt.qemu import freeze\n"
        "freezer = freeze.Freezer(int(sys.argv[1]), [(int(sys.argv[2]), int(sys.argv[3]))])\n"
        "print(freezer.freeze().pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    arguments = [str(value) for value in (qemu.pid, *qemu.ranges[0])]
    outcome = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True)
    assert outcome.returncode == -signal.SIGKILL
    _, waited = os.waitpid(int(outcome.stdout), 0)
    assert os.WTERMSIG(waited) == signal.SIGSEGV
    assert qemu.goes_on()


def test_reused_pid_is_not_killed(frozen: procfs.Process) -> None:
    another = procfs.Process(frozen.pid, frozen.start_time + 1)
    assert not another.alive()
    another.kill()
    assert frozen.alive()


# A freeze with one range calls ptrace() less than 60 times, its settling included.
@pytest.mark.parametrize("step", range(60))
def test_qemu_dies_at_any_step(doomed: Qemu, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    children = children_of_this_process()
    calls = []
    real = ptrace.Tracee._trace

    def trace(tracee: ptrace.Tracee, *arguments: int) -> None:
        calls.append(tracee.pid)
        if len(calls) == step + 1:
            os.kill(doomed.pid, signal.SIGKILL)
        real(tracee, *arguments)

    frozen = None
    with freeze.Freezer(doomed.pid, doomed.ranges) as freezer:
        monkeypatch.setattr(ptrace.Tracee, "_trace", trace)
        # It may have died only after it was copied.
        with contextlib.suppress(exception.FreezeFailed):
            process = freezer.freeze()
            freezer.settle()
            frozen = process
    if frozen is not None:
        assert frozen.alive()
        frozen.kill()
    else:
        assert len(calls) > step
    doomed.process.kill()
    doomed.process.wait(10)
    assert not os.path.exists(f"/proc/{doomed.pid}")
    deadline = time.monotonic() + 5
    while left := children_of_this_process() - children:
        # A copy that nobody came to know of ends by itself. It is this process's to reap.
        assert time.monotonic() < deadline, left
        for pid in left:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
        time.sleep(0.001)


def test_death_is_the_reported_cause(doomed: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ptrace.Tracee.aim

    def aim(tracee: ptrace.Tracee, *arguments: int) -> None:
        os.kill(doomed.pid, signal.SIGKILL)
        real(tracee, *arguments)

    with freeze.Freezer(doomed.pid, doomed.ranges) as freezer:
        monkeypatch.setattr(ptrace.Tracee, "aim", aim)
        with pytest.raises(exception.FreezeFailed, match=f"{doomed.pid} died"):
            freezer.freeze()


@pytest.mark.parametrize("capability", ["sys_ptrace", "sys_admin"])
def test_without_capability_it_is_refused(qemu: Qemu, capability: str) -> None:
    code = (
        "import sys\n"
        "from nova_snowflock import exception\n"
        "from nova_snowflock.virt.qemu import freeze\n"
        "print(freeze.refusal(int(sys.argv[1])))\n"
        "try:\n"
        "    freeze.Freezer(int(sys.argv[1]), [])\n"
        "except exception.CannotFork as error:\n"
        "    print(error)\n"
    )
    command = ["setpriv", f"--bounding-set=-{capability}", f"--inh-caps=-{capability}"]
    outcome = subprocess.run(
        [*command, sys.executable, "-c", code, str(qemu.pid)], capture_output=True, check=True
    )
    reason = f"tracing QEMU is not permitted: this process lacks CAP_{capability.upper()}"
    assert outcome.stdout.decode().splitlines() == [reason, reason]
    assert qemu.goes_on()


def test_process_traced_by_another_is_refused(qemu: Qemu) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    attach, detach, pid = 0x4206, 17, qemu.pid
    assert libc.ptrace(attach, pid, None, None) == 0
    try:
        reason = str(freeze.refusal(pid))
    finally:
        assert libc.ptrace(0x4207, pid, None, None) == 0
        os.waitpid(pid, 0x40000000)
        assert libc.ptrace(detach, pid, None, None) == 0
    assert "being traced by process" in reason


def test_other_architecture_is_refused(qemu: Qemu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    assert freeze.refusal(qemu.pid) == "freezing is not supported on riscv64, only on x86_64"
