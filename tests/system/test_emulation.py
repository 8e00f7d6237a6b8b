# SPDX-License-Identifier: Apache-2.0
"""The emulated hosts and the test guest themselves."""

import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import time

import pytest

from tests import emulation
from tests.emulation import harness
from tests.guest import client as guest_client
from tests.guest import domain

GROUP = "239.255.77.1"
PORT = 7701


def receive(group: str | None, address: str, senders: int) -> set[bytes]:
    """On a host: the distinct datagrams that come in until there is one from each sender."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind((group or address, PORT))
        if group:
            membership = struct.pack("4s4s", socket.inet_aton(group), socket.inet_aton(address))
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        receiver.settimeout(10)
        received: set[bytes] = set()
        while len(received) < senders:
            received.add(receiver.recv(64))
        return received


def send(destinations: list[str], message: bytes, seconds: float) -> None:
    """On a host: a datagram to each destination, time and again: some come before a receiver."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for destination in destinations:
                sender.sendto(message, (destination, PORT))
            time.sleep(0.05)


def raise_os_error(path: str) -> None:
    raise FileNotFoundError(2, "gone", path)


def nap() -> None:
    time.sleep(2)


def environment() -> dict[str, object]:
    """On a host: what it is and what it shows of the machine."""
    return {
        "name": socket.gethostname(),
        "kvm": os.path.exists("/dev/kvm"),
        "fuse": os.path.exists("/dev/fuse"),
        "interfaces": sorted(os.listdir("/sys/class/net")),
        "libvirt": sorted(os.listdir("/run/libvirt")),
    }


def namespaces(pid: int) -> set[str]:
    return {os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("net", "mnt", "pid")}


def made_by(pid: int) -> set[str]:
    """The namespaces of the process's children, but for this one's own."""
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    made = set().union(*(namespaces(int(child)) for child in children))
    return made - namespaces(os.getpid())


def inhabitants(wanted: set[str]) -> list[int]:
    """Processes of the machine that live in any of the namespaces."""
    found = []
    for directory in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            if wanted & namespaces(int(directory.name)):
                found.append(int(directory.name))
        except (FileNotFoundError, PermissionError):
            # It has just ended, or belongs to whoever runs this machine as a container.
            continue
    return found


def test_hosts_are_apart(hosts: list[emulation.Host]) -> None:
    for number, host in enumerate(hosts, 1):
        seen = host.run(environment)
        assert seen["name"] == host.name == f"host{number}"
        assert not seen["kvm"]
        assert seen["fuse"]
        assert seen["interfaces"] == ["eth0", "lo"]
        assert "libvirt-sock" in seen["libvirt"]  # type: ignore[operator]
    assert len({path for host in hosts for path in namespaces(host.pid)}) == 3 * len(hosts)


@pytest.mark.parametrize("group", [GROUP, None], ids=["multicast", "unicast"])
def test_datagrams_pass_between_all_hosts(hosts: list[emulation.Host], group: str | None) -> None:
    receivers = [host.submit(receive, group, host.address, len(hosts)) for host in hosts]
    destinations = [group] if group else [host.address for host in hosts]
    senders = [host.submit(send, destinations, host.name.encode(), 2.0) for host in hosts]
    everyone = {host.name.encode() for host in hosts}
    assert [receiver.result() for receiver in receivers] == [everyone] * len(hosts)
    for sender in senders:
        sender.result()


def test_calls_bring_back_exceptions(hosts: list[emulation.Host]) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        hosts[1].run(raise_os_error, "/some/path")
    assert caught.value.filename == "/some/path"
    assert "on host2:" in caught.value.__notes__[0]


def test_call_that_does_not_return(
    hosts: list[emulation.Host], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails, and says where the host hangs."""
    monkeypatch.setattr(harness, "CALL_TIMEOUT", 0.5)
    with pytest.raises(emulation.EmulationError, match=r"host1 does not answer:[^$]+in nap"):
        hosts[0].run(nap)


def test_programs_end_with_their_process(hosts: list[emulation.Host]) -> None:
    with hosts[0].popen(["ip", "-brief", "address"], stdout=subprocess.PIPE, text=True) as program:
        assert "10.77.0.1/24" in program.communicate()[0]
    for moment in range(20):
        program = hosts[0].popen(["sleep", "1000"])
        time.sleep(moment * 0.001)
        program.terminate()
        program.wait()
    deadline = time.monotonic() + 10
    while hosts[0].run(running, "sleep") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not hosts[0].run(running, "sleep")


def running(program: str) -> bool:
    """On a host: whether any of its processes runs the program.

    One that has ended does not: it waits for whoever adopted it, outside of the host.
    """
    listing = subprocess.run(["ps", "-e", "-o", "stat=,comm="], capture_output=True, text=True)
    processes = [line.split(maxsplit=1) for line in listing.stdout.splitlines()]
    return any(name == program and state[0] != "Z" for state, name in processes)


def test_guest(hosts: list[emulation.Host]) -> None:
    domain.boot(hosts[0], "guest")
    try:
        with domain.client(hosts[0], "guest") as guest:
            first = guest.call("state")
            with pytest.raises(guest_client.GuestError, match="no command _data"):
                guest.call("_data")
            page = guest.call("read", offset=0)
            written = guest.call("write", seed=1, pages=3)
            assert guest.call("touch", mib=16) == {"mib": 16}
            assert guest.call("job", passes=1)["checksum"] > 1
        assert first["bytes"] == 64 << 20
        assert bytes.fromhex(page) != bytes(4096)
        assert len(set(written["pages"])) == 3

        # Another client, after one that left in the middle of a line and of an answer.
        with domain.client(hosts[0], "guest") as guest:
            guest._socket.sendall(b'{"id": 1, "command": "history"}\n{"id": 2, "comm')
        with domain.client(hosts[0], "guest") as guest:
            second = guest.call("state")
            history = guest.call("history", count=2000)
        assert second["tick"] > first["tick"]
        assert second["digest"] == written["digest"] != first["digest"]
        assert second["boot_id"] == first["boot_id"]
        numbers = [tick for tick, _ in history]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        times = [moment for _, moment in history]
        assert times == sorted(set(times))
    finally:
        domain.destroy(hosts[0], "guest")


def test_nothing_remains() -> None:
    others = made_by(os.getpid())
    with emulation.hosts(2, name="short-lived") as hosts:
        domain.boot(hosts[0], "guest")
        pending = hosts[1].submit(time.sleep, 1000)
        wanted = made_by(os.getpid()) - others
        # The bridge's process; for each host the parent of its first process, the two of its agent
        # and libvirtd; and QEMU.
        assert len(inhabitants(wanted)) >= 1 + 2 * 4 + 1
        with pytest.raises(emulation.EmulationError, match="up already"):
            emulation.hosts(1, name="short-lived").__enter__()
    assert inhabitants(wanted) == []
    assert not (harness.RUN / "snowflock-emulation.short-lived").exists()
    with pytest.raises(emulation.EmulationError, match="host1 has ended"):
        hosts[0].run(os.getpid)
    with pytest.raises(emulation.EmulationError, match="host2 has ended"):
        pending.result()


def test_hosts_that_do_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    others = made_by(os.getpid())
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(emulation.EmulationError), emulation.hosts(2, name="still-born"):
        pytest.fail("hosts without agents are up")
    assert made_by(os.getpid()) == others
    assert not (harness.RUN / "snowflock-emulation.still-born").exists()


OWNER = """
import signal, time
from tests import emulation
from tests.guest import domain
# It is ignored by what a shell starts in the background, as these tests may be.
signal.signal(signal.SIGINT, signal.default_int_handler)
with emulation.hosts(2, name="orphans") as hosts:
    domain.boot(hosts[1], "guest")
    print("up", flush=True)
    # Python acts on a signal that comes just before a system call when that has ended.
    while True:
        time.sleep(0.1)
"""


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_remains_of_a_harness_that_is_ended(end: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, cwd=harness.REPOSITORY, text=True
    ) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "up\n"
        wanted = made_by(owner.pid)
        assert len(inhabitants(wanted)) >= 1 + 2 * 4 + 1
        owner.send_signal(end)
    deadline = time.monotonic() + 10
    while inhabitants(wanted) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert inhabitants(wanted) == []
    harness.sweep()
    assert not (harness.RUN / "snowflock-emulation.orphans").exists()


def test_command_line() -> None:
    command = [sys.executable, "-m", "tests.emulation"]
    subprocess.run(
        [*command, "up", "--hosts", "1", "--mtu", "9000", "--name", "cli"],
        cwd=harness.REPOSITORY,
        check=True,
    )
    try:
        wanted = namespaces(emulation.attach("cli")[0].pid)
        shown = subprocess.run(
            [*command, "execute", "--name", "cli", "host1", "ip", "link", "show", "eth0"],
            cwd=harness.REPOSITORY,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        assert " mtu 9000 " in shown
    finally:
        for _ in range(2):
            subprocess.run([*command, "down", "--name", "cli"], cwd=harness.REPOSITORY, check=True)
    assert inhabitants(wanted) == []
    with pytest.raises(emulation.EmulationError, match="no hosts named cli"):
        emulation.attach("cli")
