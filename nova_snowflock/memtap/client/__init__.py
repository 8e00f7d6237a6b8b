# SPDX-License-Identifier: Apache-2.0
"""The receiving side: memtap, one process for each fork image on each clone host."""
