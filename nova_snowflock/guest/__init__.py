# SPDX-License-Identifier: Apache-2.0
"""Inside a guest: SnowFlock's API for its programs, and the agent that they ask.

A program forks the machine it runs on, and goes on in all of them::

    from nova_snowflock import guest

    ticket = guest.request_ticket(8)
    number = guest.clone(ticket)
    if number:
        guest.exit(0, compute(number, ticket.n))
    for clone in guest.join(ticket):
        print(clone.clone_id, clone.status, clone.result)

:mod:`nova_snowflock.guest.workers` does this for a function and a list. Everything in this package
runs on Python 3.9 and needs nothing else.
"""

from nova_snowflock.guest.client import Busy
from nova_snowflock.guest.client import Checkpoint
from nova_snowflock.guest.client import Failed
from nova_snowflock.guest.client import Fork
from nova_snowflock.guest.client import Forked
from nova_snowflock.guest.client import HeldTicket
from nova_snowflock.guest.client import Info
from nova_snowflock.guest.client import Invalid
from nova_snowflock.guest.client import Joined
from nova_snowflock.guest.client import NoAgent
from nova_snowflock.guest.client import Offline
from nova_snowflock.guest.client import Refused
from nova_snowflock.guest.client import SnowFlockError
from nova_snowflock.guest.client import Ticket
from nova_snowflock.guest.client import checkpoint_parent
from nova_snowflock.guest.client import clone
from nova_snowflock.guest.client import create_clones
from nova_snowflock.guest.client import exit
from nova_snowflock.guest.client import fork
from nova_snowflock.guest.client import info
from nova_snowflock.guest.client import join
from nova_snowflock.guest.client import kill
from nova_snowflock.guest.client import release
from nova_snowflock.guest.client import request_ticket

__all__ = [
    "Busy",
    "Checkpoint",
    "Failed",
    "Fork",
    "Forked",
    "HeldTicket",
    "Info",
    "Invalid",
    "Joined",
    "NoAgent",
    "Offline",
    "Refused",
    "SnowFlockError",
    "Ticket",
    "checkpoint_parent",
    "clone",
    "create_clones",
    "exit",
    "fork",
    "info",
    "join",
    "kill",
    "release",
    "request_ticket",
]
