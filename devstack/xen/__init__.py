# SPDX-License-Identifier: Apache-2.0
"""A Xen machine, or several, on any machine: ``python -m devstack.xen up``.

QEMU emulates it, without any help of the processor. Its dom0 is Debian's, and runs libvirt's libxl
driver; this checkout is there at the path that it has here, to be read. ``python -m devstack.xen
run virsh list`` runs a program in dom0, and :meth:`devstack.xen.machine.Machine.run` does so for
tests.
"""
