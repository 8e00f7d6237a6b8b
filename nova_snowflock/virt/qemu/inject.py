# SPDX-License-Identifier: Apache-2.0
"""Having a running process make a system call."""

import concurrent.futures
import os

from nova_snowflock import exception
from nova_snowflock.virt.qemu import procfs
from nova_snowflock.virt.qemu import ptrace
from nova_snowflock.virt.qemu import x86_64


def find_gadget(pid: int) -> int:
    """The address of x86_64.GADGET in the process.

    :raises CannotFork: it has none
    """
    with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
        for mapping in procfs.maps(pid):
            if mapping.mode != "r-xp" or not mapping.path or mapping.path.startswith("["):
                continue
            code = os.pread(memory.fileno(), mapping.end - mapping.start, mapping.start)
            offset = code.find(x86_64.GADGET)
            if offset >= 0:
                return mapping.start + offset
    raise exception.CannotFork(f"QEMU process {pid} has no system call instruction to borrow")


def system_call(pid: int, number: int, *arguments: int) -> int:
    """The result of a system call that the process is made to make.

    :raises OSError: the call failed, or tracing the process is refused
    :raises CannotFork: the process has no system call instruction
    """
    tracee = ptrace.Tracee(pid, find_gadget(pid))

    def run() -> int:
        tracee.attach()
        with tracee.borrowed():
            return tracee.call(number, *arguments)

    # ptrace(2) knows the thread that attached, not the process.
    with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="inject") as thread:
        try:
            return thread.submit(run).result()
        except ptrace.Died as error:
            raise ProcessLookupError(f"Process {pid} has ended") from error
