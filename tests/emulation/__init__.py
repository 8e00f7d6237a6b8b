# SPDX-License-Identifier: Apache-2.0
"""Several compute hosts on one machine.

A host is a set of namespaces (mount, network, process, host name, IPC) with a libvirtd of its own,
joined to the others by a veth and a bridge over which IP multicast passes. Nothing in the product
knows.

Each host's processes descend from one that lives as long as a pipe of the harness is open, and the
kernel ends them all with it. So however the harness ends, no process, mount, interface or namespace
stays behind.
"""

from tests.emulation.harness import EmulationError
from tests.emulation.harness import Host
from tests.emulation.harness import attach
from tests.emulation.harness import hosts

__all__ = ["EmulationError", "Host", "attach", "hosts"]
