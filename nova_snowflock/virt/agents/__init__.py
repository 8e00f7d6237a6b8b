# SPDX-License-Identifier: Apache-2.0
"""The host's side of what guests' agents say: who they are, and forks that they ask for.

A guest's agent is whatever the guest makes of it. What it says is checked, it is heard only so
often, and it speaks for its own server only.
"""
