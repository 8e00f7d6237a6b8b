# SPDX-License-Identifier: Apache-2.0
"""VM fork for OpenStack Nova.

Three planes, each of which can be tested without the one above it: :mod:`nova_snowflock.api` (in
nova-api), :mod:`nova_snowflock.virt` (in nova-compute) and :mod:`nova_snowflock.memtap` (processes
of its own, which carry the memory). Beside them, :mod:`nova_snowflock.guest` is for guests.
"""
