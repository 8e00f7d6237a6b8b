# SPDX-License-Identifier: Apache-2.0
"""Unit tests of the host's side of guests' agents. Nova and its API are made up; guests are sockets
that say what they want."""

from nova import objects

# Before anything that says what it does with them.
objects.register_all()
