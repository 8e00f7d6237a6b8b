# SPDX-License-Identifier: Apache-2.0
"""Everything about a freeze that depends on the processor: x86-64.

Another architecture is supported by a module with the same names: :data:`MACHINE`,
:data:`GADGET`, the ``NR_*`` numbers, :class:`Registers`, :func:`call` and :func:`result`.
"""

import ctypes

MACHINE = "x86_64"
"""As uname(2) calls it."""

GADGET = b"\x0f\x05\xc3"
"""``syscall; ret``, as in libc's getpid(). The ``ret`` matters only for the child of clone(2):
should its tracer die before it is settled, it returns through a stack that is not there."""

# arch/x86/entry/syscalls/syscall_64.tbl
NR_MADVISE = 28
NR_PAUSE = 34
NR_CLONE = 56
NR_PRCTL = 157
NR_CLOSE_RANGE = 436

_NO_SYSCALL = 2**64 - 1
_MASK = 2**64 - 1


# fmt: off
_NAMES = (
    "r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx",
    "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base",
    "ds", "es", "fs", "gs",
)
# fmt: on


class Registers(ctypes.Structure):
    """``struct user_regs_struct`` of arch/x86/include/asm/user_64.h, for PTRACE_GETREGS."""

    _fields_ = [(name, ctypes.c_uint64) for name in _NAMES]


_ARGUMENTS = ("rdi", "rsi", "rdx", "r10", "r8", "r9")


def call(base: Registers, gadget: int, number: int, *arguments: int) -> Registers:
    """Registers with which a process makes a system call next.

    :param base: what it has now
    :param gadget: address of :data:`GADGET` in it
    :param number: one of ``NR_*``
    """
    registers = Registers.from_buffer_copy(base)
    registers.rip = gadget
    registers.rax = number
    # Or the kernel takes the interrupted system call's restart code in rax for ours to handle.
    registers.orig_rax = _NO_SYSCALL
    for name, value in zip(_ARGUMENTS, arguments, strict=False):
        setattr(registers, name, value & _MASK)
    return registers


def result(registers: Registers) -> int:
    """What the system call returned: a value, or -errno."""
    return ctypes.c_int64(registers.rax).value
