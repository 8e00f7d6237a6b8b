# SPDX-License-Identifier: Apache-2.0
"""The sending side: the memory server, one process for each fork image, on the parent's host."""
