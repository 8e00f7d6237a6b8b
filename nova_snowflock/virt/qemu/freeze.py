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

from collections.abc import Callable, Sequence
import concurrent.futures
import contextlib
import errno
import os
import platform
import signal
from typing import Self, TypeVar

from nova_snowflock import exception
from nova_snowflock.virt.qemu import inject
from nova_snowflock.virt.qemu import procfs
from nova_snowflock.virt.qemu import ptrace
from nova_snowflock.virt.qemu import x86_64

_T = TypeVar("_T")

_CLONE_PARENT = 0x8000  # include/uapi/linux/sched.h
_MADV_DONTFORK = 10  # include/uapi/asm-generic/mman-common.h
_MADV_DOFORK = 11
_PR_SET_DUMPABLE = 4  # include/uapi/linux/prctl.h
_CAP_SYS_PTRACE = 19  # include/uapi/linux/capability.h
_CAP_SYS_ADMIN = 21

# Not null, which clone(2) takes as "the same stack", and never mapped (vm.mmap_min_addr).
_NO_STACK = 8
# When memory runs out the frozen memory goes before any guest that runs.
_OOM_SCORE_ADJ = 900


def refusal(pid: int) -> str | None:
    """Why this process may not freeze the process ``pid``, or None. Does not disturb it."""
    if platform.machine() != x86_64.MACHINE:
        return f"freezing is not supported on {platform.machine()}, only on {x86_64.MACHINE}"
    own = procfs.status("self")
    capabilities = int(own["CapEff"], 16)
    for number, name in ((_CAP_SYS_PTRACE, "CAP_SYS_PTRACE"), (_CAP_SYS_ADMIN, "CAP_SYS_ADMIN")):
        if not capabilities >> number & 1:
            return f"tracing QEMU is not permitted: this process lacks {name}"
    # kernel/ptrace.c, check_ptrace_options(): who is under seccomp cannot suspend another's.
    if own.get("Seccomp", "0") != "0":
        return "tracing QEMU is not permitted: this process is itself under seccomp"
    try:
        tracer = procfs.status(pid)["TracerPid"]
        # Opening takes the same right as attaching (PTRACE_MODE_ATTACH), Yama and LSMs included.
        os.close(os.open(f"/proc/{pid}/mem", os.O_RDONLY))
    except FileNotFoundError:
        return f"QEMU process {pid} is gone"
    except PermissionError:
        return f"tracing QEMU process {pid} is not permitted: see Yama and other security modules"
    if tracer != "0":
        return f"QEMU process {pid} is being traced by process {tracer}"
    return None


class Freezer:
    """Freezes one running process, once. Use as a context manager.

    No guest code may run during :meth:`freeze`; afterwards it may. :meth:`settle` completes the
    frozen process. Leaving the context without it removes that.
    """

    def __init__(self, pid: int, ranges: Sequence[tuple[int, int]]) -> None:
        """Find out whether the freeze is possible; it stops the process for a moment, as that does.

        :param ranges: (address, bytes) of mappings that the process excludes from forks and that
            the frozen process shall have
        :raises CannotFork: it is not possible; the message says why
        """
        reason = refusal(pid)
        if reason is not None:
            raise exception.CannotFork(reason)
        self._ranges = tuple(ranges)
        self._process = procfs.Process.find(pid)
        self._tracee = ptrace.Tracee(pid, inject.find_gadget(pid))
        # ptrace(2) knows the thread that attached, not the process. A thread of its own is also
        # never interrupted by a Python signal handler, and lets go of everything when it ends.
        self._thread = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="freeze")
        try:
            self._thread.submit(self._rehearse).result()
        except (OSError, ptrace.Died) as error:
            self.close()
            raise exception.CannotFork(f"tracing QEMU process {pid} failed: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of everything; end the frozen process unless it is settled. Idempotent."""
        with contextlib.suppress(RuntimeError):  # closed before
            self._thread.submit(self._discard).result()
        self._thread.shutdown()

    def freeze(self, lap: Callable[[str], None] = lambda _: None) -> procfs.Process:
        """The frozen process.

        :param lap: told the name of each step when it is done
        :raises FreezeFailed: there is none, and the process runs on
        """
        return self._run(lambda: self._freeze(lap))

    def settle(self) -> None:
        """Make the frozen process one that outlives this one.

        :raises FreezeFailed: it is gone
        """
        self._run(self._settle)

    def _run(self, step: Callable[[], _T]) -> _T:
        def guarded() -> _T:
            try:
                return step()
            except BaseException:
                self._discard()
                raise

        try:
            return self._thread.submit(guarded).result()
        except ptrace.Died as error:
            raise exception.FreezeFailed(
                f"QEMU process {self._process.pid} died while it was being frozen"
            ) from error
        except OSError as error:
            raise exception.FreezeFailed(
                f"Freezing QEMU process {self._process.pid} failed: {error.strerror}"
            ) from error

    def _rehearse(self) -> None:
        self._tracee.attach()
        self._tracee.detach()

    def _freeze(self, lap: Callable[[str], None]) -> procfs.Process:
        tracee = self._tracee
        if not self._process.alive():
            raise ptrace.Died
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
        return procfs.Process.find(tracee.child.pid)

    def _settle(self) -> None:
        child = self._tracee.child
        if child is None:
            raise ValueError("settle() without a freeze() before")
        child.adopt()
        child.call(x86_64.NR_CLOSE_RANGE, 0, 2**32 - 1, 0)
        # No core dump, and no access for other guests' QEMUs, which have the same user.
        child.call(x86_64.NR_PRCTL, _PR_SET_DUMPABLE, 0, 0, 0, 0)
        with open(f"/proc/{child.pid}/oom_score_adj", "w", encoding="ascii") as file:
            file.write(str(_OOM_SCORE_ADJ))
        child.aim(x86_64.NR_PAUSE)
        child.mask(ptrace.ALL_SIGNALS)
        child.detach(signal.SIGSTOP)
        self._tracee.child = None

    def _discard(self) -> None:
        """End the frozen process if this thread still holds it."""
        child, self._tracee.child = self._tracee.child, None
        if child is not None:
            child.kill()
