# SPDX-License-Identifier: Apache-2.0
"""Where the Xen machine keeps what, and how large it is."""

import os
import pathlib

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
FILES = pathlib.Path(__file__).resolve().parent / "files"

STATE = pathlib.Path(os.environ.get("SNOWFLOCK_XEN") or "/var/lib/snowflock-xen")
"""All that machines keep is below this directory. Those of another one are others."""

CACHE = (
    pathlib.Path(os.environ.get("SNOWFLOCK_CACHE") or pathlib.Path.home() / ".cache/nova-snowflock")
    / "xen"
)
"""What takes long to make and is the same for all machines. May be removed while none is made."""

XEN = "4.17"
"""Which Xen: Debian 12's. Its packages have this in their names."""

# In MiB. What dom0 does not have is for guests, but for some 100 MiB of the hypervisor's own.
MEMORY = 3072
DOM0_MEMORY = 1536
CPUS = 2
# Whenever a processor does FXRSTOR, QEMU (7.2, and 10.0) writes to the flags of the first one, and
# takes no lock (target/i386/tcg/sysemu/fpu_helper.c, cpu_clear_ignne). If that one is about to
# enter or leave a guest, what it has just set is undone, and the guest ends by a triple fault. So
# dom0 has the first processor, and guests the others.
GUEST_CPUS = f"1-{CPUS - 1}"
BACKGROUND_RATE = 4
"""MB/s at which memory is to be fetched in the background: an emulated processor does little more
in all, and guests wait for pages meanwhile."""
