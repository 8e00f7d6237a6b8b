# SPDX-License-Identifier: Apache-2.0
"""A data plane without a hypervisor: images made here, and their processes.

Every function takes and returns what can be sent to another host, so that a test calls it there as
it calls it here.
"""

import base64
from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import hashlib
import mmap
import os
import pathlib
import random
import select
import shutil
import signal
import socket
import tempfile
import time
from typing import Any, TypeVar
import uuid

from nova_snowflock import descriptor
from nova_snowflock import endpoint
from nova_snowflock import exception
from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import control
from nova_snowflock.memtap import process
from nova_snowflock.memtap import spec as process_spec
from nova_snowflock.memtap import wire

_T = TypeVar("_T")

DEADLINE = 60.0
"""Seconds that anything may take that is not forbidden to be slow."""

ZERO_PERIOD = 64
"""Pages after which :func:`content` repeats its pattern of zero pages: the last quarter of them."""


def content(pages: int, seed: int = 0) -> bytes:
    """Random pages, of which a quarter are zero."""
    data = bytearray(random.Random(seed).randbytes(pages * PAGE_SIZE))
    for page in range(pages):
        if page % ZERO_PERIOD >= ZERO_PERIOD * 3 // 4:
            data[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes(PAGE_SIZE)
    return bytes(data)


def nonzero(data: bytes) -> int:
    """How many pages of ``data`` are not zero."""
    return sum(any(data[start : start + PAGE_SIZE]) for start in range(0, len(data), PAGE_SIZE))


def write_sparse(path: str, data: bytes) -> None:
    """A file whose zero pages are holes."""
    with open(path, "wb") as file:
        file.truncate(len(data))
        for start in range(0, len(data), PAGE_SIZE):
            page = data[start : start + PAGE_SIZE]
            if any(page):
                file.seek(start)
                file.write(page)


def serve(spec: process_spec.ServerSpec, paths: Sequence[str], image: bytes | None = None) -> bytes:
    """Start a memory server of files, numbered from 1; return the descriptor.

    :param image: the descriptor of a server before this one, to serve once more
    """
    server = process.start_memory_server(spec)
    fds = [os.open(path, os.O_RDONLY) for path in paths]
    try:
        published = server.call(
            "publish",
            fds=fds,
            files=[
                {"number": number, "name": f"file{number}", "kind": "file"}
                for number in range(1, len(paths) + 1)
            ],
        )
    finally:
        for fd in fds:
            os.close(fd)
    image = image or describe(spec.image, published)
    server.call("serve", descriptor=base64.b64encode(image).decode())
    return image


def describe(image: str, published: dict[str, Any]) -> bytes:
    """The descriptor of what a memory server has published."""
    files = tuple(
        descriptor.File(
            file["number"], file["name"], file["size"], base64.b64decode(file["page_map"])
        )
        for file in published["files"]
    )
    return descriptor.Descriptor(
        image=image,
        hypervisor="none",
        hypervisor_version="0",
        machine_type="none",
        cpu="<cpu/>",
        vcpus=1,
        ram_blocks=(descriptor.RamBlock("ram", PAGE_SIZE),),
        files=files,
        servers=tuple(published["servers"]),
        group=published["group"],
        created="2026-01-01T00:00:00+00:00",
        domain="<domain/>",
        device_state=b"",
    ).encode()


def served_from(image: bytes, server: str) -> bytes:
    """The descriptor with another server in it."""
    decoded = descriptor.Descriptor.decode(image)
    return dataclasses.replace(decoded, servers=(server,)).encode()


def tap(spec: process_spec.MemtapSpec) -> None:
    """Start a memtap."""
    process.start_memtap(spec)


def client(run_directory: str) -> control.MemtapClient:
    """Whoever answers in a run directory."""
    for role in ("server", "memtap"):
        path = os.path.join(run_directory, f"{role}.sock")
        if os.path.exists(path):
            return control.MemtapClient(path)
    raise exception.ControlError(f"there is no control socket in {run_directory}")


def status(run_directory: str) -> dict[str, Any]:
    return client(run_directory).status()


def kill(run_directory: str) -> None:
    """End a process as a crash would."""
    pid = client(run_directory).peer()
    process_fd = os.pidfd_open(pid)
    signal.pidfd_send_signal(process_fd, signal.SIGKILL)
    select.select([process_fd], [], [], DEADLINE)
    os.close(process_fd)


def log(run_directory: str) -> str:
    (path,) = pathlib.Path(run_directory).glob("*.log")
    return path.read_text()


def wait_for(run_directory: str, **fields: Any) -> dict[str, Any]:
    """Wait until the status says this; a field of another is named ``pages__missing``."""

    def look() -> dict[str, Any] | None:
        now = status(run_directory)
        for name, wanted in fields.items():
            value: Any = now
            for key in name.split("__"):
                value = value[key]
            if value != wanted:
                return None
        return now

    return until(look, f"{run_directory} to say {fields}")


def until(condition: Callable[[], _T | None], what: str) -> _T:
    """Wait for a condition, and return what made it true."""
    end = time.monotonic() + DEADLINE
    while time.monotonic() < end:
        result = condition()
        if result:
            return result
        time.sleep(0.01)
    raise AssertionError(f"waited {DEADLINE:.0f} s for {what}")


def mapped(path: str) -> bytes:
    """What a clone sees: its memory is a private mapping."""
    with (
        open(path, "r+b") as file,
        mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as memory,
    ):
        return memory[:]


def read_all(path: str) -> bytes:
    """Without stopping the other threads of this process, as a fault in a mapping does."""
    with open(path, "rb", buffering=0) as file:
        return file.readall()


def digest_mapped(path: str) -> str:
    return hashlib.sha256(mapped(path)).hexdigest()


def read(path: str, offset: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        return file.read(size)


def detach(run_directory: str, **arguments: Any) -> dict[str, Any]:
    return client(run_directory).call("detach", **arguments)


def stop(run_directory: str) -> None:
    """End whatever runs there and remove the directory."""
    process.stop_memtap(run_directory)
    process.stop_memory_server(run_directory)
    shutil.rmtree(run_directory, ignore_errors=True)


def remove(directory: str) -> None:
    """End all that runs below a directory, and remove it."""
    for path in pathlib.Path(directory).glob("*/"):
        stop(str(path))
    shutil.rmtree(directory)


class Client:
    """A memtap's part of the protocol by hand, for a server that does not fragment pages."""

    def __init__(self, key: bytes, server: str, address: str = "127.0.0.1") -> None:
        self.key = key
        self.server = endpoint.parse(server)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
        self.socket.bind((address, 0))
        self.session = wire.new_session()
        self.greeting = wire.Sealer(self.session, wire.session_key(key, "hello", self.session))

    def hello(self) -> bytes:
        """A HELLO ready to be sent."""
        return self.greeting.seal(wire.HELLO, wire.encode_session(self.session))

    def welcomed(self, timeout: float = DEADLINE) -> bool:
        """Wait for a WELCOME and take it; whether one came."""
        self.socket.settimeout(timeout)
        try:
            welcome = self.socket.recv(1 << 16)
        except TimeoutError:
            return False
        sessions = self.session, wire.HEADER.unpack_from(welcome)[3]
        self.opener = wire.Opener(sessions[1], wire.session_key(self.key, "answer", *sessions))
        self.sealer = wire.Sealer(sessions[1], wire.session_key(self.key, "request", *sessions))
        payload = self.opener.open(welcome)
        assert payload is not None
        self.everyone = wire.decode_session(payload)
        return True

    def attach(self) -> None:
        self.send(self.hello())
        assert self.welcomed()

    def send(self, datagram: bytes) -> None:
        self.socket.sendto(datagram, self.server)

    def request(self, runs: Sequence[wire.Run], priority: int = wire.FAULT) -> bytes:
        """A REQUEST ready to be sent."""
        return self.sealer.seal(
            wire.REQUEST, wire.encode_request(wire.Request(0, 0, priority, runs))
        )

    def fetch(self, file: int, pages: int) -> bytes:
        """The first pages of a file."""
        self.send(self.request([wire.Run(file, 0, pages)], wire.FAULT | wire.REPAIR))
        self.socket.settimeout(DEADLINE)
        found: dict[int, bytes] = {}
        while len(found) < pages:
            datagram = self.socket.recv(1 << 16)
            payload = self.opener.open(datagram)
            assert payload is not None
            if wire.HEADER.unpack_from(datagram)[2] == wire.ZERO:
                for run in wire.decode_runs(payload):
                    found |= {run.page + n: bytes(PAGE_SIZE) for n in range(run.pages)}
                continue
            number, fragments, _, page = wire.LOCATION.unpack_from(payload)
            assert (number, fragments) == (file, 1)
            data = payload[wire.LOCATION.size :]
            for start in range(0, len(data), PAGE_SIZE):
                found[page + start // PAGE_SIZE] = data[start : start + PAGE_SIZE]
        return b"".join(found[page] for page in range(pages))

    def close(self) -> None:
        self.socket.close()


@dataclasses.dataclass
class Loopback:
    """An image whose processes all run here.

    :param directory: where they have their run directories, their files and their store
    """

    directory: pathlib.Path
    image: str = dataclasses.field(default_factory=lambda: str(uuid.uuid4()))
    key: bytes = dataclasses.field(default_factory=lambda: os.urandom(32))
    descriptor: bytes = b""

    @property
    def server(self) -> str:
        return str(self.directory / "server")

    def serve(self, *contents: bytes, **options: Any) -> dict[str, Any]:
        """Serve these files; return the server's status."""
        paths = []
        for number, data in enumerate(contents, 1):
            paths.append(str(self.directory / f"file{number}"))
            write_sparse(paths[-1], data)
        options.setdefault("address", "127.0.0.1:0")
        options.setdefault("interface", "lo")
        spec = process_spec.ServerSpec(self.image, self.key, run_directory=self.server, **options)
        self.descriptor = serve(spec, paths, self.descriptor or None)
        return status(self.server)

    def spec(self, name: str = "memtap", **options: Any) -> process_spec.MemtapSpec:
        options.setdefault("population", "lazy")
        options.setdefault("store_directory", str(self.directory))
        options.setdefault("interface", "lo")
        options.setdefault("descriptor", self.descriptor)
        options.setdefault("address", "127.0.0.1")
        return process_spec.MemtapSpec(
            self.image, self.key, run_directory=str(self.directory / name), **options
        )

    def tap(self, name: str = "memtap", **options: Any) -> str:
        """Start a memtap; return its run directory."""
        spec = self.spec(name, **options)
        tap(spec)
        return spec.run_directory

    def kill_server(self) -> str:
        """Kill the memory server; return the address it had."""
        address: str = status(self.server)["servers"][0]
        kill(self.server)
        return address

    def path(self, number: int = 1, name: str = "memtap") -> str:
        """Where a file is found in a memtap's mount."""
        return str(self.directory / name / "mount" / f"file{number}")


@contextlib.contextmanager
def loopback() -> Iterator[Loopback]:
    """A directory for an image, and the end of all that runs in it."""
    directory = pathlib.Path(tempfile.mkdtemp(prefix="snowflock-test-", dir="/run"))
    directory.chmod(0o711)
    try:
        yield Loopback(directory)
    finally:
        remove(str(directory))
