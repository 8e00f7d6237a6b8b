# SPDX-License-Identifier: Apache-2.0
"""The data plane: a memory server on the parent's host, a memtap on each clone host.

Both are processes of their own and import neither nova nor libvirt.
"""

PAGE_SIZE = 4096
"""Bytes in a page: the unit of the image's files, of presence and of requests."""
