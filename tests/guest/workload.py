# SPDX-License-Identifier: Apache-2.0
"""What the test guest does: keep random data, count time, and answer questions.

This file runs inside the guest, as its first process, on a bare Debian Python. A second process
counts: it adds one every ``snowflock.tick_ms`` milliseconds and records when, so a tick that was
lost or taken twice is seen from outside.

It answers on a virtio-serial port, or on the terminal that ``snowflock.port`` names, such as
/dev/ttyS0: Nova gives its servers no such port. The protocol is one JSON object a line: ``{"id":
..., "command": ..., arguments}`` is answered by ``{"id": ..., "result": ...}`` or ``{"id": ...,
"error": ...}``. A line that is not a request (the half of one that was on its way when the guest
was forked) is dropped, and so is an answer that nobody is connected to take.
"""

from collections.abc import Iterator
import contextlib
import errno
import fcntl
import hashlib
import json
import mmap
import os
import random
import select
import socket
import struct
import time
import tty
from typing import Any, NoReturn
import zlib

PORT_NAME = "org.nova-snowflock.test.0"
PAGE = 4096
SIOCGIFADDR = 0x8915  # linux/sockios.h
GLOBAL = "00"  # net/ipv6/addrconf.c, if6_seq_show
IFA_F_TENTATIVE = 0x40  # linux/if_addr.h
MIB = 1 << 20
# What `touch` leaves for the kernel and this process to live on.
RESERVE_MIB = 48


def allocate(mib: int) -> mmap.mmap:
    """Zeroed memory, in MiB, of this process alone."""
    return mmap.mmap(-1, mib * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


class Ticker:
    """A process that counts, and the memory it shares with this one.

    Layout: the number of ticks, then a ring of (tick, CLOCK_MONOTONIC in ns), all u64.
    """

    RING = 4096
    ENTRY = struct.Struct("=QQ")

    def __init__(self, interval: float) -> None:
        self._memory = mmap.mmap(-1, self.ENTRY.size * (self.RING + 1))
        self._pid = os.fork()
        if self._pid == 0:
            self._count(interval)

    def _count(self, interval: float) -> NoReturn:
        started = time.monotonic()
        tick = 0
        while True:
            tick += 1
            time.sleep(max(0.0, started + tick * interval - time.monotonic()))
            offset = self.ENTRY.size * (1 + tick % self.RING)
            self.ENTRY.pack_into(self._memory, offset, tick, time.monotonic_ns())
            struct.pack_into("=Q", self._memory, 0, tick)

    def now(self) -> int:
        """Number of the latest tick."""
        if os.waitpid(self._pid, os.WNOHANG) != (0, 0):
            raise RuntimeError("the ticker died")
        tick: int = struct.unpack_from("=Q", self._memory)[0]
        return tick

    def history(self, count: int) -> list[tuple[int, int]]:
        """The last ticks, oldest first, each with its monotonic time in ns; at most RING // 2.

        Half of the ring is left for the ticks that come while this reads.
        """
        last = self.now()
        first = max(1, last - min(count, self.RING // 2) + 1)
        return [
            self.ENTRY.unpack_from(self._memory, self.ENTRY.size * (1 + tick % self.RING))
            for tick in range(first, last + 1)
        ]


class Workload:
    """The commands. Every public method is one; its arguments and result are JSON values."""

    def __init__(self, fill_mib: int, tick_ms: int) -> None:
        self._data = allocate(fill_mib)
        for offset in range(0, len(self._data), MIB):
            self._data[offset : offset + MIB] = os.urandom(MIB)
        self._copy: mmap.mmap | None = None
        self._touched: list[mmap.mmap] = []
        self._ticker = Ticker(tick_ms / 1000)

    def tick(self) -> dict[str, Any]:
        """The latest tick, and the time by the guest's clock."""
        return {"tick": self._ticker.now(), "monotonic_ns": time.monotonic_ns()}

    def digest(self) -> str:
        """BLAKE2b-256 of all the data: the quickest strong hash without hardware for it."""
        return hashlib.blake2b(self._data, digest_size=32).hexdigest()

    def state(self) -> dict[str, Any]:
        """All that tells whether this is the same guest, and where it is."""
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot_id:
            return {
                **self.tick(),
                "digest": self.digest(),
                "bytes": len(self._data),
                "boot_id": boot_id.read().strip(),
            }

    def history(self, count: int = 1000) -> list[tuple[int, int]]:
        """The last ticks, oldest first, each with its monotonic time in ns; at most 2048."""
        return self._ticker.history(count)

    def read(self, offset: int, length: int = PAGE) -> str:
        """`length` bytes of the data, in hexadecimal."""
        return self._data[offset : offset + length].hex()

    def write(self, seed: int, pages: int) -> dict[str, Any]:
        """Overwrite `pages` pages of the data; the seed decides which, and with what."""
        source = random.Random(seed)
        chosen = source.sample(range(len(self._data) // PAGE), pages)
        for page in chosen:
            self._data[page * PAGE : (page + 1) * PAGE] = source.randbytes(PAGE)
        return {"pages": chosen, "digest": self.digest()}

    def touch(self, mib: int | None = None) -> dict[str, Any]:
        """Take `mib` more MiB of memory, every page with content of its own, and keep it.

        Without a number, all there is but a little to live on.
        """
        available = self.memory()["MemAvailable"] // 1024 - RESERVE_MIB
        if mib is None:
            mib = available
        if not 0 < mib <= available:
            raise MemoryError(f"{mib} MiB asked, {available} MiB available")
        block = os.urandom(2 * MIB)
        memory = allocate(mib)
        for number in range(mib):
            # A stride prime to the block's length: copies a guest has room for never coincide.
            shift = number * 4099 % MIB
            memory[number * MIB : (number + 1) * MIB] = block[shift : shift + MIB]
        self._touched.append(memory)
        return {"mib": sum(len(memory) for memory in self._touched) // MIB}

    def job(self, passes: int = 1) -> dict[str, Any]:
        """Memory-bound work: copy all the data and sum up the copy. Seconds by the guest's clock.

        The first call also takes the memory for the copy.
        """
        if self._copy is None:
            self._copy = allocate(len(self._data) // MIB)
        source, copy = memoryview(self._data), memoryview(self._copy)
        started = time.monotonic()
        checksum = 1
        for _ in range(passes):
            copy[:] = source
            checksum = zlib.adler32(copy, checksum)
        return {"seconds": time.monotonic() - started, "checksum": checksum}

    def disk_write(self, disk: str, offset: int, seed: int, length: int) -> None:
        """Write bytes that the seed decides to /dev/`disk`, past the cache; multiples of a page."""
        source = random.Random(seed)
        with self._disk(disk, os.O_WRONLY) as (fd, buffer):
            for position in range(offset, offset + length, MIB):
                with memoryview(buffer)[: min(MIB, offset + length - position)] as part:
                    part[:] = source.randbytes(len(part))
                    os.pwrite(fd, part, position)
            os.fsync(fd)

    def disk_digest(self, disk: str, offset: int, length: int) -> dict[str, Any]:
        """BLAKE2b-256 of bytes of /dev/`disk`, read past the cache, and the seconds it took."""
        digest = hashlib.blake2b(digest_size=32)
        started = time.monotonic()
        with self._disk(disk, os.O_RDONLY) as (fd, buffer):
            for position in range(offset, offset + length, MIB):
                with memoryview(buffer)[: min(MIB, offset + length - position)] as part:
                    if os.preadv(fd, [part], position) != len(part):
                        raise OSError(f"/dev/{disk} ends before {offset + length}")
                    digest.update(part)
        return {"digest": digest.hexdigest(), "seconds": time.monotonic() - started}

    def disk_read_random(
        self, disk: str, length: int, count: int, seed: int, offset: int = 0
    ) -> dict[str, float]:
        """Read `count` random pages of `length` bytes of /dev/`disk`, past the cache."""
        source = random.Random(seed)
        pages = [source.randrange(length // PAGE) for _ in range(count)]
        started = time.monotonic()
        with self._disk(disk, os.O_RDONLY) as (fd, buffer), memoryview(buffer)[:PAGE] as part:
            for page in pages:
                os.preadv(fd, [part], offset + page * PAGE)
        return {"seconds": time.monotonic() - started}

    @contextlib.contextmanager
    def _disk(self, disk: str, mode: int) -> Iterator[tuple[int, mmap.mmap]]:
        """A block device, opened to bypass the cache, and a buffer of 1 MiB that fits that."""
        fd = os.open(f"/dev/{disk}", mode | os.O_DIRECT)
        try:
            with allocate(1) as buffer:
                yield fd, buffer
        finally:
            os.close(fd)

    def file_write(self, name: str, seed: int, length: int, sync: bool = True) -> None:
        """Write bytes that the seed decides to a file on the data partition.

        Without `sync` the guest's kernel keeps them in memory for some seconds.
        """
        with open(f"/data/{name}", "wb") as file:
            file.write(random.Random(seed).randbytes(length))
            if sync:
                file.flush()
                os.fsync(file.fileno())

    def file_digest(self, name: str) -> dict[str, Any]:
        """BLAKE2b-256 of a file on the data partition."""
        with open(f"/data/{name}", "rb") as file:
            return {"digest": hashlib.blake2b(file.read(), digest_size=32).hexdigest()}

    def interfaces(self) -> dict[str, str]:
        """The MAC of each network interface but the loopback."""
        found = {}
        for name in os.listdir("/sys/class/net"):
            # It may just be unplugged.
            with (
                contextlib.suppress(OSError),
                open(f"/sys/class/net/{name}/address", encoding="ascii") as file,
            ):
                found[name] = file.read().strip()
        found.pop("lo", None)
        return found

    def addresses(self) -> list[str]:
        """The IP addresses that others can reach it at."""
        found = []
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
            for _, name in socket.if_nameindex():
                request = struct.pack("16s24x", name.encode())
                with contextlib.suppress(OSError):
                    answer = fcntl.ioctl(asking, SIOCGIFADDR, request)
                    # struct ifreq: the name, then a struct sockaddr_in.
                    found.append(socket.inet_ntoa(answer[20:24]))
        with open("/proc/net/if_inet6", encoding="ascii") as addresses:
            for address, _, _, scope, flags, _ in map(str.split, addresses):
                if scope == GLOBAL and not int(flags, 16) & IFA_F_TENTATIVE:
                    found.append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address)))
        return [address for address in found if address != "127.0.0.1"]

    def reaches(self, address: str, port: int = 7) -> bool:
        """Whether somebody at the address answers: that nobody listens there is an answer, too."""
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as asking:
            asking.settimeout(2)
            return asking.connect_ex((address, port)) in (0, errno.ECONNREFUSED)

    def run(self, argv: list[str]) -> int:
        """The exit status of a program."""
        return os.spawnvp(os.P_WAIT, argv[0], argv)

    def output(self, argv: list[str]) -> str:
        """What a program says, on either of its outputs."""
        read, write = os.pipe()
        actions = [(os.POSIX_SPAWN_DUP2, write, fd) for fd in (1, 2)]
        pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions)
        os.close(write)
        with os.fdopen(read, encoding="utf-8", errors="replace") as said:
            text = said.read()
        os.waitpid(pid, 0)
        return text

    def power_off(self) -> None:
        """End as a guest does that is asked to shut down, without an answer."""
        os.sync()
        with open("/proc/sysrq-trigger", "w", encoding="ascii") as trigger:
            trigger.write("o")

    def memory(self) -> dict[str, int]:
        """/proc/meminfo, in KiB."""
        with open("/proc/meminfo", encoding="ascii") as meminfo:
            fields = (line.split() for line in meminfo)
            return {name.rstrip(":"): int(number) for name, number, *_ in fields}


class Port:
    """A virtio-serial port, or terminal, whose other end comes and goes."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_NONBLOCK | os.O_NOCTTY)
        if os.isatty(self._fd):
            tty.setraw(self._fd)

    def _wait(self, event: int) -> int:
        poll = select.poll()
        poll.register(self._fd, event)
        ((_, events),) = poll.poll()
        return events

    def lines(self) -> Iterator[bytes]:
        """Complete lines, without their ends."""
        pending = b""
        while True:
            self._wait(select.POLLIN)
            try:
                received = os.read(self._fd, 65536)
            except BlockingIOError:
                continue
            if not received:
                # Nobody is connected, and the port has no way to wait for somebody.
                time.sleep(0.005)
                continue
            *complete, pending = (pending + received).split(b"\n")
            yield from complete

    def write(self, message: bytes) -> None:
        """Send the message to whoever is connected."""
        view = memoryview(message)
        while view:
            if self._wait(select.POLLOUT) & select.POLLHUP:
                return
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                continue


def find_port(name: str) -> str:
    """Path of the virtio-serial port that the host gave this name."""
    ports = "/sys/class/virtio-ports"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        for port in os.listdir(ports) if os.path.isdir(ports) else ():
            with open(f"{ports}/{port}/name", encoding="ascii") as file:
                if file.read().strip() == name:
                    return f"/dev/{port}"
        time.sleep(0.02)
    raise FileNotFoundError(f"no virtio-serial port is named {name}")


def answer(workload: Workload, line: bytes) -> dict[str, Any] | None:
    """The reply to a request; None if the line is none."""
    try:
        request = json.loads(line)
        identity = request.pop("id")
        command = request.pop("command")
    except (ValueError, AttributeError, KeyError, TypeError):
        return None
    try:
        if command.startswith("_"):
            raise AttributeError(f"no command {command}")
        return {"id": identity, "result": getattr(workload, command)(**request)}
    except Exception as error:
        return {"id": identity, "error": f"{type(error).__name__}: {error}"}


def parameters() -> dict[str, str]:
    """What the kernel's command line says to the workload, by name."""
    with open("/proc/cmdline", encoding="ascii") as cmdline:
        words = (word.partition("=") for word in cmdline.read().split())
        return {name: value for name, _, value in words}


def main() -> None:
    words = parameters()
    port = Port(words.get("snowflock.port") or find_port(PORT_NAME))
    fill, tick = words.get("snowflock.fill", "64"), words.get("snowflock.tick_ms", "10")
    workload = Workload(int(fill), int(tick))
    print(f"workload: ready after {time.monotonic():.2f} s", flush=True)
    for line in port.lines():
        reply = answer(workload, line)
        if reply is not None:
            port.write(json.dumps(reply).encode() + b"\n")


if __name__ == "__main__":
    main()
