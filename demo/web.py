# SPDX-License-Identifier: Apache-2.0
"""A website that is served from a guest's memory, and those who ask it from the world outside.

``python -m demo.web ADDRESS`` asks once, and says what it was answered. ``python -m demo.web --stay
ADDRESS`` asks over one connection, again and again, and fails if that breaks. It says ``asking``
when it has its first answer, and at the end of a line on standard input how many it had, and how
long it waited for one at most.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import http.client
import json
import select
import subprocess
import sys
import time
from typing import Any

from demo import checks
from devstack.embedded import network
from devstack.embedded import processes
from devstack.embedded import settings

INTERVAL = 0.2
# More than an answer takes on a busy machine, less than anyone would wait for the demo.
PATIENCE = 60

SERVER = """
import hashlib
import json
import os
import socket
import threading
import time

data = os.urandom(1 << 20)

def serve(connection):
    requests = connection.makefile("rb")
    while requests.readline():
        while requests.readline().strip():
            pass  # a header
        page = json.dumps({
            "name": socket.gethostname(),
            "digest": hashlib.blake2b(data, digest_size=32).hexdigest(),
            "time": time.time(),
            "random": os.urandom(16).hex(),
        }).encode()
        head = "HTTP/1.1 200 OK\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(page)
        connection.sendall(head.encode() + page)

listener = socket.create_server(("", 80))
while True:
    threading.Thread(target=serve, args=[listener.accept()[0]], daemon=True).start()
"""
"""For :class:`tests.cloud.agents.Program`."""


@dataclasses.dataclass
class Customer:
    """How one fared who stayed."""

    answers: int = 0
    slowest: float = 0.0


@contextlib.contextmanager
def customer(address: str) -> Iterator[Customer]:
    """Somebody outside who asks all the time; what it says is there when the context has ended.

    :raises CheckFailed: its connection broke, or another machine answered
    """
    found = Customer()
    with _outside("--stay", address) as asking:
        assert asking.stdout is not None
        is_served = asking.stdout.readline() == "asking\n"
        if is_served:
            yield found
        said, problem = asking.communicate("enough\n", timeout=2 * PATIENCE)
    checks.check(is_served and asking.returncode == 0, f"{address} serves no more: {problem}")
    found.answers, found.slowest = json.loads(said)


def ask(address: str) -> dict[str, Any]:
    """What an address answers to somebody outside who asks once.

    :raises CheckFailed: nothing
    """
    with _outside(address) as asking:
        said, problem = asking.communicate(timeout=2 * PATIENCE)
    checks.check(asking.returncode == 0, f"{address} does not answer: {problem}")
    return dict(json.loads(said))


def _outside(*arguments: str) -> subprocess.Popen[str]:
    """This module as a program in the world outside."""
    return subprocess.Popen(
        [*processes.enter(network.OUTSIDE), sys.executable, "-m", "demo.web", *arguments],
        cwd=settings.REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def main() -> None:
    connection = http.client.HTTPConnection(sys.argv[-1], timeout=PATIENCE)
    connection.connect()
    connection.auto_open = 0  # should it break, it is not made anew

    def get() -> dict[str, Any]:
        connection.request("GET", "/")
        return dict(json.load(connection.getresponse()))

    first = get()
    if "--stay" not in sys.argv:
        print(json.dumps(first))
        return
    print("asking", flush=True)
    answers, slowest = 1, 0.0
    while not select.select([sys.stdin], [], [], INTERVAL)[0]:
        asked = time.monotonic()
        answer = get()
        slowest = max(slowest, time.monotonic() - asked)
        answers += 1
        for what in ("name", "digest"):
            if answer[what] != first[what]:
                raise RuntimeError(f"the {what} is {answer[what]}, and was {first[what]}")
    print(json.dumps([answers, slowest]))


if __name__ == "__main__":
    main()
