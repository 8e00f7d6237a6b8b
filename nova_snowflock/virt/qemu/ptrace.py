# SPDX-License-Identifier: Apache-2.0
"""ptrace(2): making another process call the kernel, and having it back as it was."""

from collections.abc import Iterator
import contextlib
import ctypes
import errno
import os
import signal

from nova_snowflock.virt.qemu import x86_64

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

ALL_SIGNALS = 2**64 - 1
# The trap of a single step must get through: the kernel resets what a process does on a trap that
# it blocks.
_ALL_BUT_TRAP = ALL_SIGNALS & ~(1 << (signal.SIGTRAP - 1))

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


class Died(Exception):
    """The traced process has ended."""


class Tracee:
    """A process that this thread, and no other, traces.

    Every method raises Died when the process has ended, and OSError if the kernel refuses.

    :param gadget: address of :data:`x86_64.GADGET` in the process
    """

    def __init__(self, pid: int, gadget: int) -> None:
        self.pid = pid
        self._gadget = gadget
        self._late: list[int] = []
        self.child: Tracee | None = None
        """The process that a clone(2) it made has started, traced too."""

    def _trace(self, request: int, address: int = 0, data: int = 0) -> None:
        if _libc.ptrace(request, self.pid, address, data) == -1:
            number = ctypes.get_errno()
            if number == errno.ESRCH:
                raise Died
            raise OSError(number, os.strerror(number))

    def _registers(self) -> x86_64.Registers:
        registers = x86_64.Registers()
        self._trace(_GETREGS, 0, ctypes.addressof(registers))
        return registers

    def _wait(self) -> int:
        """The wait status of its next stop."""
        _, status = os.waitpid(self.pid, _WALL)
        if not os.WIFSTOPPED(status):
            raise Died
        return status

    def attach(self) -> None:
        """Attach and stop it between two instructions or in a system call that restarts."""
        self._trace(_SEIZE, 0, _O_TRACECLONE | _O_SUSPEND_SECCOMP)
        self._trace(_INTERRUPT)
        while (status := self._wait()) >> 16 != _EVENT_STOP:
            # A signal came first, and stopping for it has used up the interrupt.
            self._trace(_INTERRUPT)
            self._trace(_CONT, 0, os.WSTOPSIG(status))
        if os.WSTOPSIG(status) != signal.SIGTRAP:
            self.detach()
            raise OSError(errno.EBUSY, f"it is stopped by signal {os.WSTOPSIG(status)}")

    def adopt(self) -> None:
        """Take charge of a :attr:`child`: it is ready for calls, and ends with this thread."""
        self._wait()
        self._trace(_SETOPTIONS, 0, _O_EXITKILL | _O_SUSPEND_SECCOMP)

    def detach(self, signal_number: int = 0) -> None:
        """Let it go on, or do what a signal does."""
        self._trace(_DETACH, 0, signal_number)

    def kill(self) -> None:
        """End it, while it is traced: so its pid is still its own."""
        os.kill(self.pid, signal.SIGKILL)
        with contextlib.suppress(Died):
            while True:
                self._wait()

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[None]:
        """Have its registers and signal mask back, and be detached, afterwards."""
        base = self._registers()
        mask = ctypes.c_uint64()
        self._trace(_GETSIGMASK, ctypes.sizeof(mask), ctypes.addressof(mask))
        # No handler may run before everything is back, and no signal interrupt clone(2).
        self.mask(_ALL_BUT_TRAP)
        try:
            yield
        finally:
            self._trace(_SETREGS, 0, ctypes.addressof(base))
            self.mask(mask.value)
            self.detach()
            for number in self._late:
                os.kill(self.pid, number)

    def mask(self, signals: int) -> None:
        """Block these signals: bit 0 is signal 1."""
        value = ctypes.c_uint64(signals)
        self._trace(_SETSIGMASK, ctypes.sizeof(value), ctypes.addressof(value))

    def aim(self, number: int, *arguments: int) -> None:
        """Have it make this system call when it goes on."""
        registers = x86_64.call(self._registers(), self._gadget, number, *arguments)
        self._trace(_SETREGS, 0, ctypes.addressof(registers))

    def call(self, number: int, *arguments: int) -> int:
        """Have it make one system call.

        :raises OSError: the call failed
        """
        self.aim(number, *arguments)
        while True:
            self._trace(_SINGLESTEP)
            status = self._wait()
            event = status >> 16
            if event == _EVENT_CLONE:
                pid = ctypes.c_ulong()
                self._trace(_GETEVENTMSG, 0, ctypes.addressof(pid))
                self.child = Tracee(pid.value, self._gadget)
            elif not event and os.WSTOPSIG(status) == signal.SIGTRAP:
                break
            elif not event:
                # Only SIGSTOP passes the mask. It counts again when everything is back.
                self._late.append(os.WSTOPSIG(status))
        result = x86_64.result(self._registers())
        if -4096 < result < 0:
            raise OSError(-result, os.strerror(-result))
        return result
