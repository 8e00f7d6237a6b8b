# SPDX-License-Identifier: Apache-2.0
"""Disks of guests that QEMU serves, whichever hypervisor runs them: layers, forks and merges."""
