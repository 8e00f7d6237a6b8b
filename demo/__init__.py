# SPDX-License-Identifier: Apache-2.0
"""``make demo``: one running guest becomes eight, on three emulated hosts."""
