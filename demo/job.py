# SPDX-License-Identifier: Apache-2.0
"""A program that forks the machine it runs on, for :class:`tests.cloud.agents.Program`.

It says what it does in JSON objects, one a line: ``stage`` and the ``seconds`` that it took.
"""

COMMON = """
import json
import os
import time

MB = 1_000_000

def load():
    "100 MB that nobody else has, as numbers."
    data = bytearray(100 * MB)
    for offset in range(0, len(data), MB):
        data[offset : offset + MB] = os.urandom(MB)
    return memoryview(data).cast("I")

def share(data, number, count):
    "The sum of one of so many shares of the data; the first is 1."
    return sum(data[(number - 1) * len(data) // count : number * len(data) // count])
"""
"""What the program has in common with those that are measured."""

PROGRAM = (
    COMMON
    + """
CLONES = 6

class Stage:
    "Say how long this took."

    def __init__(self, stage):
        self.said = {"stage": stage}

    def __enter__(self):
        self.started = time.monotonic()
        return self.said

    def __exit__(self, kind, error, traceback):
        if error is None:
            self.said["seconds"] = time.monotonic() - self.started
            print(json.dumps(self.said))

with Stage("load") as said:
    data = load()
    said["bytes"] = data.nbytes
with Stage("request_ticket") as said:
    ticket = guest.request_ticket(CLONES)
    said["n"] = ticket.n
with Stage("clone"):
    number = guest.clone(ticket)
    if number:
        started = time.monotonic()
        found = share(data, number, ticket.n)
        seconds = time.monotonic() - started
        result = {"name": os.uname().nodename, "sum": found, "seconds": seconds}
        guest.exit(0, json.dumps(result).encode())
with Stage("join") as said:
    joined = guest.join(ticket)
    said["clones"] = [
        {
            "clone_id": clone.clone_id,
            "status": clone.status,
            "error": clone.error,
            "result": json.loads(clone.result or b"null"),
        }
        for clone in joined
    ]
with Stage("alone") as said:
    said["sum"] = share(data, 1, 1)
"""
)
"""``join`` has the ``clones``, and ``alone`` what the parent gets for all of the data."""
