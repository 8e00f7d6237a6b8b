# SPDX-License-Identifier: Apache-2.0
"""The Xen back end on real Xen: a machine that QEMU emulates (devstack.xen)."""
