# SPDX-License-Identifier: Apache-2.0
"""The monitor of a guest's QEMU, by one that only talks like it."""

from collections.abc import Callable, Iterator
import contextlib
import os
import pathlib
import socket
import threading

import pytest

from nova_snowflock import exception
from nova_snowflock.virt.xen import qmp

GREETING = b'{"QMP": {}}\n'
DONE = b'{"return": {}}\n'
EVENT = b'{"event": "RESUME"}\n'


@pytest.fixture
def says(tmp_path: pathlib.Path) -> Iterator[Callable[..., qmp.Monitor]]:
    """Makes a monitor that says these lines, one after each that it hears."""
    with contextlib.ExitStack() as stack:

        def make(greeting: bytes, *answers: bytes) -> qmp.Monitor:
            listener = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            listener.bind(str(tmp_path / "qmp-libxenstat-7"))
            listener.listen()

            def serve() -> None:
                connection, _ = listener.accept()
                with connection, connection.makefile("rwb", buffering=0) as stream:
                    stream.write(greeting)
                    for answer in answers:
                        stream.readline()
                        stream.write(answer)

            thread = threading.Thread(target=serve)
            thread.start()
            stack.callback(thread.join)
            return qmp.Monitor(7, str(tmp_path))

        yield make


def test_command(says: Callable[..., qmp.Monitor]) -> None:
    monitor = says(EVENT + GREETING, DONE, EVENT + b'{"return": [1]}\n')
    assert monitor.command("query-x", {"a": 1}) == [1]


def test_pid(says: Callable[..., qmp.Monitor]) -> None:
    assert says(GREETING, DONE).pid() == os.getpid()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GREETING, DONE, b'{"error": {"class": "X", "desc": "No such"}}\n'], "No such"),
        ([GREETING, DONE, b""], "said b''"),
        ([GREETING, DONE, b"nonsense\n"], "said b'nonsense"),
        ([GREETING, DONE, b"[]\n"], "said b'\\[\\]"),
        ([b""], "said b''"),
    ],
)
def test_failures(says: Callable[..., qmp.Monitor], lines: list[bytes], message: str) -> None:
    with pytest.raises(exception.MonitorError, match=message):
        says(*lines).command("query-x")


def test_no_qemu(tmp_path: pathlib.Path) -> None:
    with pytest.raises(exception.MonitorError, match="qmp-libxenstat-7"):
        qmp.Monitor(7, str(tmp_path)).command("query-x")
