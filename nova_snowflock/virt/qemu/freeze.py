# SPDX-License-Identifier: Apache-2.0
"""Freeze a process: make it clone itself, copy on write, into one that never runs.

ptrace(2) makes the thread group leader of a running process call madvise(MADV_DOFORK) on the
ranges that shall be kept, clone(2), and madvise(MADV_DONTFORK) again. The clone holds the memory
as it was at that moment; the kernel copies a page only when the original writes to it.

The order in which things happen to the clone makes sure that it never runs the original's code:

* until it is settled, it stands behind a system call whose return address is on a stack that is
  not mapped: without its tracer it dies;
* settled, it has no open files, is not dumpable, blocks every signal, and is stopped in front of
  a pause(2). SIGCONT only moves it into pause(2). SIGKILL alone ends it.

With CLONE_PARENT the clone's parent and exit signal are the original's (kernel/fork.c,
copy_process()): whoever reaps a QEMU (init, for libvirt's) reaps its clone.

Should the tracing process be killed while the original is inside an injected call, the original
is lost too: nothing else can put its registers back. That is the about 3 ms of :meth:`freeze`.
"""

from collections import abc
import concurrent.futures
import contextlib
import ctypes
import dataclasses
import errno
import os
import platform
import select
import signal
import time
from typing import Self, TypeVar

from nova_snowflock import exception
from nova_snowflock.virt.qemu import x86_64

_T = TypeVar("_T")

# include/uapi/linux/ptrace.h
_CONT = 7
_SINGLESTEP = 9
_GETREGS = 12
_SETREGS = 13
_DETACH = 17
_SETOPTIONS = 0x4200
_GETEVENTMSG = 0x4201
_SEIZE = 0x4206
_INTERRUPT = 0x4207
_GETSIGMASK = 0x420A
_SETSIGMASK = 0x420B
_EVENT_CLONE = 3
_EVENT_STOP = 128
_O_TRACECLONE = 1 << _EVENT_CLONE
_O_EXITKILL = 1 << 20
_O_SUSPEND_SECCOMP = 1 << 21

_WALL = 0x40000000  # include/uapi/linux/wait.h
_CLONE_PARENT = 0x8000  # include/uapi/linux/sched.h
_MADV_DONTFORK = 10  # include/uapi/asm-generic/mman-common.h
_MADV_DOFORK = 11
_PR_SET_DUMPABLE = 4  # include/uapi/linux/prctl.h
_CAP_SYS_PTRACE = 19  # include/uapi/linux/capability.h
_CAP_SYS_ADMIN = 21

#: Not null, which clone(2) takes as "the same stack", and never mapped (vm.mmap_min_addr).
_NO_STACK = 8
_ALL_SIGNALS = 2**64 - 1
#: The trap of a single step must get through: the kernel resets what a process does on a trap
#: that it blocks.
_ALL_BUT_TRAP = _ALL_SIGNALS & ~(1 << (signal.SIGTRAP - 1))

#: When memory runs out the frozen memory goes before any guest that runs.
_OOM_SCORE_ADJ = 900
_KILL_TIMEOUT = 30.0

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


@dataclasses.dataclass(frozen=True)
class Process:
    """A process, told from a later one that has its pid.

    ``start_time`` is field 22 of /proc/PID/stat: clock ticks since boot.
    """

    pid: int
    start_time: int

    @classmethod
    def find(cls, pid: int) -> "Process":
        """Return the process that has this pid now; ProcessLookupError if there is none."""
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                stat = file.read()
        except FileNotFoundError as error:
            raise ProcessLookupError(errno.ESRCH, f"No process {pid}") from error
        # The name, field 2, may hold anything, even a parenthesis.
        return cls(pid, int(stat[stat.rindex(b")") + 2 :].split()[19]))

    def alive(self) -> bool:
        """Say whether it exists and has not exited."""
        with self._open() as pidfd:
            return pidfd is not None and not _exited(pidfd)

    def kill(self) -> None:
        """End it and wait until its memory is free. Does nothing if it is gone already."""
        with self._open() as pidfd:
            if pidfd is None:
                return
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            if not _exited(pidfd, _KILL_TIMEOUT):
                raise exception.SnowFlockError(
                    f"Process {self.pid} does not end {_KILL_TIMEOUT:.0f} s after SIGKILL"
                )
            # It is ours to reap if QEMU was our child, not if init or another process started it.
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)

    @contextlib.contextmanager
    def _open(self) -> abc.Iterator[int | None]:
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            yield None
            return
        try:
            # Only now: from here on the pid cannot change hands unseen.
            yield pidfd if Process.find(self.pid) == self else None
        except ProcessLookupError:
            yield None
        finally:
            os.close(pidfd)


def _exited(pidfd: int, timeout: float = 0.0) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def refusal(pid: int) -> str | None:
    """Return why this process may not freeze the process ``pid``, or None. Does not disturb it."""
    if platform.machine() != x86_64.MACHINE:
        return f"freezing is not supported on {platform.machine()}, only on {x86_64.MACHINE}"
    own = _status("self")
    capabilities = int(own["CapEff"], 16)
    for number, name in ((_CAP_SYS_PTRACE, "CAP_SYS_PTRACE"), (_CAP_SYS_ADMIN, "CAP_SYS_ADMIN")):
        if not capabilities >> number & 1:
            return f"tracing QEMU is not permitted: this process lacks {name}"
    # kernel/ptrace.c, check_ptrace_options(): who is under seccomp cannot suspend another's.
    if own.get("Seccomp", "0") != "0":
        return "tracing QEMU is not permitted: this process is itself under seccomp"
    try:
        tracer = _status(str(pid))["TracerPid"]
        # Opening takes the same right as attaching (PTRACE_MODE_ATTACH), Yama and LSMs included.
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY))
    except FileNotFoundError:
        return f"QEMU process {pid} is gone"
    except PermissionError:
        return f"tracing QEMU process {pid} is not permitted: see Yama and other security modules"
    if tracer != "0":
        return f"QEMU process {pid} is being traced by process {tracer}"
    return None


def _status(pid: str) -> dict[str, str]:
    with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in file)}


class _Died(Exception):
    """The traced process ended."""


class _Tracee:
    """A process this thread traces. Every method raises _Died when it has ended."""

    def __init__(self, pid: int, gadget: int) -> None:
        self.pid = pid
        self._gadget = gadget
        self._late: list[int] = []
        #: The process that a clone(2) it made has started.
        self.child: _Tracee | None = None

    def trace(self, request: int, address: int = 0, data: int = 0) -> None:
        if _libc.ptrace(request, self.pid, address, data) == -1:
            number = ctypes.get_errno()
            if number == errno.ESRCH:
                raise _Died
            raise OSError(number, os.strerror(number))

    def wait(self) -> int:
        """Return the wait status of its next stop."""
        _, status = os.waitpid(self.pid, _WALL)
        if not os.WIFSTOPPED(status):
            raise _Died
        return status

    def attach(self) -> None:
        """Attach and stop it between two instructions or in a system call that restarts."""
        self.trace(_SEIZE, 0, _O_TRACECLONE | _O_SUSPEND_SECCOMP)
        self.trace(_INTERRUPT)
        while (status := self.wait()) >> 16 != _EVENT_STOP:
            # A signal came first, and stopping for it has used up the interrupt.
            self.trace(_INTERRUPT)
            self.trace(_CONT, 0, os.WSTOPSIG(status))
        if os.WSTOPSIG(status) != signal.SIGTRAP:
            self.trace(_DETACH)
            raise OSError(errno.EBUSY, f"it is stopped by signal {os.WSTOPSIG(status)}")

    @contextlib.contextmanager
    def borrowed(self) -> abc.Iterator[None]:
        """Have its registers and signal mask back, and be detached, afterwards."""
        base = self.registers()
        mask = ctypes.c_uint64()
        self.trace(_GETSIGMASK, ctypes.sizeof(mask), ctypes.addressof(mask))
        # No handler may run before everything is back, and no signal interrupt clone(2).
        self.mask(_ALL_BUT_TRAP)
        try:
            yield
        finally:
            self.trace(_SETREGS, 0, ctypes.addressof(base))
            self.mask(mask.value)
            self.trace(_DETACH)
            for number in self._late:
                os.kill(self.pid, number)

    def registers(self) -> x86_64.Registers:
        registers = x86_64.Registers()
        self.trace(_GETREGS, 0, ctypes.addressof(registers))
        return registers

    def mask(self, signals: int) -> None:
        value = ctypes.c_uint64(signals)
        self.trace(_SETSIGMASK, ctypes.sizeof(value), ctypes.addressof(value))

    def aim(self, number: int, *arguments: int) -> None:
        """Have it make this system call when it goes on."""
        registers = x86_64.call(self.registers(), self._gadget, number, *arguments)
        self.trace(_SETREGS, 0, ctypes.addressof(registers))

    def call(self, number: int, *arguments: int) -> int:
        """Have it make one system call and return the result; OSError if that is an error."""
        self.aim(number, *arguments)
        while True:
            self.trace(_SINGLESTEP)
            status = self.wait()
            event = status >> 16
            if event == _EVENT_CLONE:
                pid = ctypes.c_ulong()
                self.trace(_GETEVENTMSG, 0, ctypes.addressof(pid))
                self.child = _Tracee(pid.value, self._gadget)
            elif not event and os.WSTOPSIG(status) == signal.SIGTRAP:
                break
            elif not event:
                # Only SIGSTOP passes the mask. It counts again when everything is back.
                self._late.append(os.WSTOPSIG(status))
        result = x86_64.result(self.registers())
        if -4096 < result < 0:
            raise OSError(-result, os.strerror(-result))
        return result


class Freezer:
    """Freezes one running process, once. Use as a context manager.

    ``ranges`` are (address, length in bytes) of mappings that the process excludes from forks and
    that the frozen process shall have. Making one finds out whether the freeze is possible, which
    stops the process for a moment as the freeze does; CannotFork says why it is not.

    No guest code may run during :meth:`freeze`; afterwards it may. :meth:`settle` completes the
    frozen process. Leaving the context without it removes that.
    """

    def __init__(self, pid: int, ranges: abc.Sequence[tuple[int, int]]) -> None:
        reason = refusal(pid)
        if reason is not None:
            raise exception.CannotFork(f"The guest cannot be forked: {reason}")
        self._ranges = tuple(ranges)
        #: Seconds each step of :meth:`freeze` took, in order.
        self.stages: dict[str, float] = {}
        self._process = Process.find(pid)
        self._tracee = _Tracee(pid, _find_gadget(pid))
        # ptrace(2) knows the thread that attached, not the process. A thread of its own is also
        # never interrupted by a Python signal handler, and lets go of everything when it ends.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="freeze")
        try:
            self._thread.submit(self._rehearse).result()
        except (OSError, _Died) as error:
            self.close()
            raise exception.CannotFork(
                f"The guest cannot be forked: tracing QEMU process {pid} failed: {error}"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everything; end the frozen process unless it is settled. Idempotent."""
        with contextlib.suppress(RuntimeError):  # closed before
            self._thread.submit(self._discard).result()
        self._thread.shutdown()

    def freeze(self) -> Process:
        """Return the frozen process. FreezeFailed: there is none, and the process runs on."""
        return self._run(self._freeze)

    def settle(self) -> None:
        """Make the frozen process one that outlives this one. FreezeFailed: it is gone."""
        self._run(self._settle)

    def _run(self, step: abc.Callable[[], _T]) -> _T:
        def guarded() -> _T:
            try:
                return step()
            except BaseException:
                self._discard()
                raise

        try:
            return self._thread.submit(guarded).result()
        except _Died as error:
            raise exception.FreezeFailed(
                f"QEMU process {self._process.pid} died while it was being frozen"
            ) from error
        except OSError as error:
            raise exception.FreezeFailed(
                f"Freezing QEMU process {self._process.pid} failed: {error.strerror}"
            ) from error

    def _rehearse(self) -> None:
        self._tracee.attach()
        self._tracee.trace(_DETACH)

    def _freeze(self) -> Process:
        lap = _Stopwatch(self.stages).lap
        tracee = self._tracee
        if not self._process.alive():
            raise _Died
        tracee.attach()
        lap("attach")
        with tracee.borrowed():
            try:
                for address, length in self._ranges:
                    tracee.call(x86_64.NR_MADVISE, address, length, _MADV_DOFORK)
                lap("dofork")
                tracee.call(x86_64.NR_CLONE, _CLONE_PARENT, _NO_STACK, 0, 0, 0)
                lap("clone")
            finally:
                for address, length in self._ranges:
                    tracee.call(x86_64.NR_MADVISE, address, length, _MADV_DONTFORK)
                lap("dontfork")
        lap("detach")
        if tracee.child is None:
            raise OSError(errno.ECHILD, "clone(2) made no process")
        return Process.find(tracee.child.pid)

    def _settle(self) -> None:
        child = self._tracee.child
        if child is None:
            raise ValueError("settle() without a freeze() before")
        child.wait()
        child.trace(_SETOPTIONS, 0, _O_EXITKILL | _O_SUSPEND_SECCOMP)
        child.call(x86_64.NR_CLOSE_RANGE, 0, 2**32 - 1, 0)
        # No core dump, and no access for other guests' QEMUs, which have the same user.
        child.call(x86_64.NR_PRCTL, _PR_SET_DUMPABLE, 0, 0, 0, 0)
        with open(f"/proc/{child.pid}/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(_OOM_SCORE_ADJ))
        child.aim(x86_64.NR_PAUSE)
        child.mask(_ALL_SIGNALS)
        child.trace(_DETACH, 0, signal.SIGSTOP)
        self._tracee.child = None

    def _discard(self) -> None:
        """End the frozen process if this thread still holds it."""
        child, self._tracee.child = self._tracee.child, None
        if child is None:
            return
        # It is traced by this thread, so its pid is still its own.
        os.kill(child.pid, signal.SIGKILL)
        with contextlib.suppress(_Died):
            while True:
                child.wait()


class _Stopwatch:
    def __init__(self, laps: dict[str, float]) -> None:
        self._laps = laps
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now


def _find_gadget(pid: int) -> int:
    """Return the address of x86_64.GADGET in the process."""
    with (
        open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps,
        open(f"/proc/{pid}/mem", "rb", buffering=0) as memory,
    ):
        for line in maps:
            fields = line.split(maxsplit=5)
            if fields[1] != "r-xp" or len(fields) < 6 or fields[5].startswith("["):
                continue
            start, end = (int(field, 16) for field in fields[0].split("-"))
            offset = os.pread(memory.fileno(), end - start, start).find(x86_64.GADGET)
            if offset >= 0:
                return start + offset
    raise exception.CannotFork(
        f"The guest cannot be forked: QEMU process {pid} has no system call instruction to borrow"
    )
