# SPDX-License-Identifier: Apache-2.0
"""The compute hosts: each an emulated host with libvirtd and nova-compute."""

from collections.abc import Iterator
import contextlib
import dataclasses
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import time

from devstack.embedded import configuration
from devstack.embedded import identity
from devstack.embedded import network
from devstack.embedded import ovn
from devstack.embedded import processes
from devstack.embedded import settings
from tests import emulation
from tests.emulation import agent
from tests.emulation import harness


def directory(name: str) -> pathlib.Path:
    return settings.STATE / "hosts" / name


@dataclasses.dataclass(frozen=True)
class Host(processes.Service):
    """What holds a host's namespaces. All that runs there ends with it."""

    def processes(self) -> Iterator[int]:
        """All that runs on the host, but nova-compute."""
        yield from super().processes()
        with contextlib.suppress(processes.CloudError, OSError, ProcessLookupError):
            others = set(nova_compute(self.name).processes()) | set(super().processes())
            for pid in processes.inhabitants(namespace(self.name)):
                if pid not in others:
                    yield pid


def kept(name: str) -> dict[str, pathlib.Path]:
    """Directories of a host that outlive it, as on a disk, and where they are."""
    return {
        configuration.NOVA_STATE: directory(name) / "nova",
        "/etc/libvirt": directory(name) / "libvirt",
        "/var/lib/libvirt": directory(name) / "guests",
        "/var/log/libvirt": settings.LOG / name,
        str(ovn.LOG): settings.LOG / name,
    }


def service(name: str) -> Host:
    binds = [f"--bind={source}:{target}" for target, source in kept(name).items()]
    return Host(
        name,
        [
            *("unshare", *harness.NAMESPACES, "--fork", "--kill-child", "--mount-proc"),
            *(sys.executable, "-m", "tests.emulation.agent", name, str(socket(name)), *binds),
        ],
        ready=lambda: answers(name),
        environment={"PYTHONPATH": str(settings.REPOSITORY)},
        # The kernel ends all that is inside.
        end_by=signal.SIGKILL,
    )


def socket(name: str) -> pathlib.Path:
    return settings.RUN / f"{name}.sock"


def start(name: str) -> bool:
    for source in kept(name).values():
        source.mkdir(parents=True, exist_ok=True)
    (directory(name) / "nova/instances").mkdir(exist_ok=True)
    if service(name).pid() is not None:
        return False
    socket(name).unlink(missing_ok=True)
    return service(name).start()


def attach(name: str) -> emulation.Host:
    """The running host, to run functions and programs there.

    :raises CloudError: it does not run
    """
    pid = service(name).pid()
    if pid is None:
        raise processes.CloudError(f"{name} is not up")
    children = pathlib.Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    if not children:
        raise processes.CloudError(f"{name} is not up yet")
    return emulation.Host(name, settings.underlay_address(name), int(children[0]), socket(name))


def namespace(name: str) -> pathlib.Path:
    """The host's network namespace."""
    return pathlib.Path(f"/proc/{attach(name).pid}/ns/net")


def answers(name: str) -> bool:
    try:
        return attach(name).run(os.getpid) > 0
    except (emulation.EmulationError, processes.CloudError):
        return False


def repair(name: str) -> bool:
    """Connect the host, and start its switch and libvirtd, if need be; whether any was."""
    host = attach(name)
    network.join(name, host.pid)
    switch = host.run(ovn.start_switch, name, settings.underlay_address(name))
    return host.run(start_libvirtd) or switch


@dataclasses.dataclass(frozen=True)
class NovaCompute(processes.Service):
    """nova-compute in a host. `host` is the host's name."""

    host: str = ""

    def _launch(self) -> None:
        nonce = secrets.token_hex(8)
        environment = os.environ | self.environment | {"SNOWFLOCK_CLOUD_START": nonce}
        attach(self.host).run(launch, list(self.argv), environment, str(self.log))
        # The host has its own numbers for its processes; and for a moment after its start, a
        # process shows no environment.
        deadline = time.monotonic() + 10.0
        while not (found := _started_with(nonce)):
            if time.monotonic() > deadline:
                raise processes.CloudError(f"{self.name} did not start.\n{self.last_words()}")
            time.sleep(processes.LOOK_AGAIN / 10)
        self._remember(found)

    def _end_remains(self) -> None:
        """Nothing: memory servers and memtaps outlive it, and privileged helpers end with it."""


def _started_with(nonce: str) -> int | None:
    """The process that has the word in its environment."""
    for pid in processes.pids():
        with contextlib.suppress(OSError, ProcessLookupError):
            if nonce.encode() in pathlib.Path(f"/proc/{pid}/environ").read_bytes():
                return pid
    return None


def nova_compute(host: str) -> NovaCompute:
    config = configuration.nova_compute_file(host)
    return NovaCompute(
        f"nova-compute-{host}",
        [str(settings.BIN / "nova-compute"), f"--config-file={config}"],
        ready=lambda: reported(host, nova_compute(host)),
        environment={"MALLOC_ARENA_MAX": "2"},
        host=host,
        look_again=0.5,
    )


def reported(host: str, service: processes.Service) -> bool:
    """Whether nova counts on the host, and not only on what it heard before the last start of its
    nova-compute.
    """
    report = identity.last_report(host)
    return report is not None and report > service.pid_file.stat().st_mtime


# What follows runs on the host.


def start_libvirtd() -> bool:
    """Start libvirtd if it does not run; whether it did not."""
    if agent.libvirtd_runs():
        return False
    agent.start_libvirtd()
    return True


def launch(argv: list[str], environment: dict[str, str], log: str) -> None:
    with open(log, "ab") as file:
        subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            start_new_session=True,
            cwd="/",
            env=environment,
        )
