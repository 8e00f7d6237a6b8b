# SPDX-License-Identifier: Apache-2.0
"""The QEMU back end: forks libvirt's guests, without their help.

On the parent's host an image has, in its run directory: the memory server's socket and log (see
memtap.process), and ``frozen``, the record of the process that holds its memory. On a clone's host
it has memtap's socket, log and mount.
"""

import base64
from collections.abc import Iterator, Mapping
import contextlib
import dataclasses
import datetime
import fcntl
import ipaddress
import json
import os
import shutil
import tempfile
import time
from typing import Any
import uuid

import libvirt
from lxml import etree
from oslo_config import cfg
from oslo_log import log as logging

from nova_snowflock import descriptor
from nova_snowflock import exception
from nova_snowflock.memtap import control
from nova_snowflock.memtap import process
from nova_snowflock.memtap import spec as process_spec
from nova_snowflock.virt import hypervisor
from nova_snowflock.virt.qemu import domain_xml
from nova_snowflock.virt.qemu import freeze
from nova_snowflock.virt.qemu import monitor
from nova_snowflock.virt.qemu import save_image
from nova_snowflock.virt.qemu import stream

LOG = logging.getLogger(__name__)

NAME = "qemu"
MEMORY_FILE = 1
_PAGE_SIZE = descriptor.PAGE_SIZE
_ZERO_PAGE = bytes(_PAGE_SIZE)
#: Where libvirt keeps QEMU's pid (src/qemu/qemu_conf.c, stateDir).
_LIBVIRT_STATE = "/run/libvirt/qemu"
_FROZEN = "frozen"
_SPAWNING = "spawning"
_PORTABLE = libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_MIGRATABLE


class _Refusal(Exception):
    """Why a guest cannot be forked."""


@dataclasses.dataclass(frozen=True)
class _Guest:
    """What a fork has to know of a running guest.

    ``xml`` is what clones derive from; the guest's memory is the first of ``blocks``.
    """

    domain: libvirt.virDomain
    qemu: monitor.Monitor
    pid: int
    xml: str
    cpu: str
    machine_type: str
    vcpus: int
    version: str
    blocks: tuple[monitor.RamBlock, ...]

    @property
    def writable(self) -> list[monitor.RamBlock]:
        return [block for block in self.blocks if block.address is not None]


@dataclasses.dataclass(frozen=True)
class _Preparation(hypervisor.Preparation):
    guest: _Guest
    freezer: freeze.Freezer
    device_state: monitor.DeviceState
    server: control.ControlClient
    resources: contextlib.ExitStack


class QemuHypervisor(hypervisor.Hypervisor):
    """Forks guests of one libvirt connection (``qemu:///system``), on this host."""

    def __init__(self, connection: libvirt.virConnect, conf: cfg.ConfigOpts) -> None:
        self._connection = connection
        self._conf = conf.snowflock
        self._preparations: dict[str, _Preparation] = {}
        # libvirt finds out about QEMU when it is first asked (0.4 s). No clone shall wait for that.
        connection.getVersion()

    def probe(self, domain: libvirt.virDomain) -> str | None:
        try:
            self._examine(domain)
        except _Refusal as refusal:
            return str(refusal)
        return None

    def prepare(self, domain: libvirt.virDomain, image: str, key: bytes) -> hypervisor.Preparation:
        directory = self._directory(image)
        if os.path.exists(directory):
            raise exception.CannotFork(f"The image {image} exists already on this host")
        try:
            guest = self._examine(domain)
        except _Refusal as refusal:
            raise exception.CannotFork(f"The guest cannot be forked: {refusal}") from refusal
        ranges = [(block.address, block.size) for block in guest.writable if block.address]
        with contextlib.ExitStack() as resources:
            resources.callback(self._remove, image)
            server = process.start_memory_server(self._server_spec(image, key))
            freezer = resources.enter_context(freeze.Freezer(guest.pid, ranges))
            state = resources.enter_context(monitor.DeviceState(guest.qemu))
            preparation = _Preparation(image, guest, freezer, state, server, resources.pop_all())
        self._preparations[image] = preparation
        return preparation

    def capture(self, preparation: hypervisor.Preparation) -> hypervisor.Capture:
        if not isinstance(preparation, _Preparation):
            raise TypeError("The preparation is another back end's")
        image = preparation.image
        try:
            result = self._capture(preparation)
        except (OSError, libvirt.libvirtError) as error:
            self.release(image)
            raise exception.CaptureFailed(f"The image {image} failed: {error}") from error
        except BaseException:
            self.release(image)
            raise
        # The image stays; what was only needed to make it goes.
        del self._preparations[image]
        preparation.freezer.close()
        preparation.device_state.close()
        LOG.info(
            "Image %s captured: the guest %s was stopped for %.1f ms",
            image,
            preparation.guest.domain.name(),
            result.pause * 1e3,
        )
        return result

    def _capture(self, preparation: _Preparation) -> hypervisor.Capture:
        guest, image = preparation.guest, preparation.image
        if _portable_xml(guest.domain) != guest.xml:
            raise exception.CannotFork("The guest cannot be forked: it was changed meanwhile")
        stages: dict[str, float] = {}
        frozen = self._stop(preparation, stages)
        pause = sum(stages.values())

        after: dict[str, float] = {}
        watch = _Stopwatch(after)
        self._write_record(image, frozen, guest)
        preparation.freezer.settle()
        watch.lap("settle")
        with _process_files(frozen) as (memory, pagemap):
            published = _publish(preparation.server, guest, memory, pagemap)
            watch.lap("publish")
            state = stream.compose(
                guest.machine_type,
                _clone_blocks(guest),
                _small_pages(guest, memory),
                preparation.device_state.read(),
            )
        result = descriptor.Descriptor(
            image=image,
            hypervisor=NAME,
            hypervisor_version=guest.version,
            machine_type=guest.machine_type,
            cpu=guest.cpu,
            vcpus=guest.vcpus,
            ram_blocks=_clone_blocks(guest),
            files=tuple(
                descriptor.File(
                    file["number"], file["name"], file["size"], base64.b64decode(file["page_map"])
                )
                for file in published["files"]
            ),
            servers=tuple(published["servers"]),
            group=published["group"],
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
            domain=guest.xml,
            device_state=state,
        )
        watch.lap("compose")
        _serve(preparation.server, result)
        watch.lap("serve")
        return hypervisor.Capture(result, pause, stages, after)

    def _stop(self, preparation: _Preparation, stages: dict[str, float]) -> freeze.Process:
        """Stop the guest, save and freeze it, and let it run again, whatever happens."""
        guest, freezer = preparation.guest, preparation.freezer
        watch = _Stopwatch(stages)
        try:
            guest.domain.suspend()
            watch.lap("suspend")
            preparation.device_state.save()
            watch.lap("device_state")
            frozen = freezer.freeze()
            stages.update(freezer.stages)
            watch.lap("freeze")
            stages["freeze"] -= sum(freezer.stages.values())
        finally:
            _resume(guest.domain)
        watch.lap("resume")
        return frozen

    def restart_memory_server(self, image: descriptor.Descriptor, key: bytes) -> None:
        """Serve an image again whose memory server has ended, from the same frozen process.

        Clones that wait for its pages go on. ControlError: the frozen process is gone, too, and
        the image with it, or the server cannot be started.
        """
        record = self._read_record(image.image)
        if record is None or not record.process.alive():
            raise exception.ControlError(
                f"The frozen memory of image {image.image} is not on this host any more"
            )
        server = process.start_memory_server(
            self._server_spec(image.image, key, image.servers[0], image.group)
        )
        if server.status()["state"] == "serving":
            return
        with _process_files(record.process) as (memory, pagemap):
            published = server.call("publish", (memory, pagemap), files=[record.file])
        encoded = base64.b64encode(image.file(MEMORY_FILE).page_map).decode()
        if published["files"][0]["page_map"] != encoded:
            raise exception.ControlError(
                f"The frozen memory of image {image.image} is not what its descriptor says"
            )
        _serve(server, image)

    def spawn(
        self,
        descriptor: descriptor.Descriptor,
        key: bytes,
        identity: hypervisor.Identity,
        *,
        paused: bool = False,
        population: str | None = None,
    ) -> libvirt.virDomain:
        image = descriptor.image
        memory = _check_descriptor(descriptor)
        mount = os.path.join(self._directory(image), "mount")
        xml = domain_xml.clone(
            descriptor.domain,
            identity.name,
            identity.uuid,
            os.path.join(mount, memory.name),
            memory.size,
        )
        self._check_host(descriptor)
        with (
            self._spawning(descriptor),
            process.memtap_starting(self._memtap_spec(descriptor, key, population)),
        ):
            try:
                self._restore(image, xml, descriptor.device_state, paused)
                return self._connection.lookupByUUIDString(identity.uuid)
            except libvirt.libvirtError as error:
                raise exception.SpawnFailed(
                    f"The clone {identity.name} of image {image} could not be started: {error}"
                ) from error

    def _restore(self, image: str, xml: str, incoming: bytes, paused: bool) -> None:
        # libvirt opens the file by its name, so it must have one while it does.
        with tempfile.NamedTemporaryFile(dir=self._directory(image), suffix=".save") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(save_image.header(xml, running=not paused))
            file.write(incoming)
            file.flush()
            state = libvirt.VIR_DOMAIN_SAVE_PAUSED if paused else libvirt.VIR_DOMAIN_SAVE_RUNNING
            self._connection.restoreFlags(file.name, None, state)

    def release(self, image: str) -> None:
        preparation = self._preparations.pop(image, None)
        if preparation is not None:
            preparation.resources.close()
        else:
            self._remove(image)

    def _remove(self, image: str) -> None:
        directory = self._directory(image)
        if not os.path.isdir(directory):
            return
        process.stop_memtap(directory)
        process.stop_memory_server(directory)
        record = self._read_record(image)
        if record is not None:
            record.process.kill()
        shutil.rmtree(directory)

    # What a guest must be

    def _examine(self, domain: libvirt.virDomain) -> _Guest:
        """Return what a fork has to know of the guest; _Refusal says why it cannot be forked."""
        if self._connection.getType() != "QEMU":
            raise _Refusal(f"it runs on {self._connection.getType()}, not on QEMU")
        state, _ = domain.state()
        if state != libvirt.VIR_DOMAIN_RUNNING:
            raise _Refusal(f"it is {_STATES.get(state, 'in an unknown state')}, not running")
        try:
            xml = _portable_xml(domain)
            root = domain_xml.parse(xml)
            reason = domain_xml.refusal(root)
            if reason is not None:
                raise _Refusal(reason)
            if domain.jobInfo()[0] != libvirt.VIR_DOMAIN_JOB_NONE:
                raise _Refusal("libvirt is busy with another job on it, such as a migration")
            pid = _qemu_pid(domain)
            reason = freeze.refusal(pid)
            if reason is not None:
                raise _Refusal(reason)
            qemu = monitor.Monitor(domain)
            blockers = qemu.migration_blockers()
            if blockers:
                raise _Refusal(f"QEMU could not save it: {'; '.join(blockers)}")
            guest = _Guest(
                domain=domain,
                qemu=qemu,
                pid=pid,
                xml=xml,
                cpu=domain_xml.cpu(root),
                machine_type=domain_xml.machine_type(root),
                vcpus=domain.maxVcpus(),
                version=qemu.version(),
                blocks=tuple(qemu.ram_blocks()),
            )
        except (exception.SnowFlockError, libvirt.libvirtError, OSError) as error:
            raise _Refusal(str(error)) from error
        _check_memory(guest)
        return guest

    # What a host must be

    def _check_host(self, image: descriptor.Descriptor) -> None:
        """Raise SpawnFailed if this host cannot run clones of the image."""
        root = domain_xml.parse(image.domain)
        os_type = root.find("os/type")
        emulator, kind = root.findtext("devices/emulator"), root.get("type")
        arch = os_type.get("arch") if os_type is not None else None
        own = self._connection.getVersion()
        version = f"{own // 1000000}.{own // 1000 % 1000}.{own % 1000}"
        if _version(version) < _version(image.hypervisor_version):
            raise exception.SpawnFailed(
                f"This host's QEMU {version} is older than the image's {image.hypervisor_version}"
            )
        try:
            self._connection.getDomainCapabilities(emulator, arch, image.machine_type, kind)
            cpu = root.find("cpu")
            if cpu is not None and cpu.get("mode", "custom") == "custom":
                comparison = self._connection.compareHypervisorCPU(
                    emulator, arch, image.machine_type, kind, image.cpu
                )
                if comparison == libvirt.VIR_CPU_COMPARE_INCOMPATIBLE:
                    raise exception.SpawnFailed(
                        f"This host's processor lacks features of the image's: {image.cpu}"
                    )
        except libvirt.libvirtError as error:
            raise exception.SpawnFailed(
                f"This host cannot run the image {image.image}: {error}"
            ) from error

    @contextlib.contextmanager
    def _spawning(self, image: descriptor.Descriptor) -> Iterator[None]:
        """Have memtap end if the spawn fails and no other uses or is about to use it."""
        directory = self._directory(image.image)
        with _lock(os.path.join(directory, _SPAWNING)) as lock:
            try:
                yield
            except BaseException:
                fcntl.flock(lock, fcntl.LOCK_UN)
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if not self._clones(directory):
                        self._forget(directory)
                raise

    def _forget(self, directory: str) -> None:
        """Remove what spawns made in the directory; what captures made stays."""
        process.stop_memtap(directory)
        if process.find_memory_server(directory) is None and not os.path.exists(
            os.path.join(directory, _FROZEN)
        ):
            shutil.rmtree(directory)

    def _clones(self, directory: str) -> list[str]:
        """Return the names of the clones on this host that run on the image in ``directory``."""
        return [
            domain.name()
            for domain in self._connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE)
            if f"mem-path={directory}/" in domain.XMLDesc()
        ]

    # The image's processes

    def _directory(self, image: str) -> str:
        if str(uuid.UUID(image)) != image:
            raise ValueError(f"The image {image} is not named by a UUID")
        return os.path.join(self._conf.run_path, image)

    def _server_spec(
        self, image: str, key: bytes, address: str | None = None, group: str | None = None
    ) -> process_spec.ServerSpec:
        if address is None:
            address = _endpoint(self._conf.address, 0)
            if self._conf.distribution == "multicast":
                group = self._group(image)
        return process_spec.ServerSpec(
            image=image,
            key=key,
            run_directory=self._directory(image),
            address=address,
            group=group,
            interface=self._conf.interface,
            mtu=self._conf.mtu,
        )

    def _group(self, image: str) -> str:
        # Two images in one group would only hear, and drop, each other's datagrams.
        groups = ipaddress.ip_network(self._conf.multicast_groups)
        address = groups[uuid.UUID(image).int % groups.num_addresses]
        return _endpoint(str(address), self._conf.multicast_port)

    def _memtap_spec(
        self, image: descriptor.Descriptor, key: bytes, population: str | None
    ) -> process_spec.MemtapSpec:
        return process_spec.MemtapSpec(
            image=image.image,
            key=key,
            run_directory=self._directory(image.image),
            store_directory=self._conf.store_path,
            descriptor=image.encode(),
            address=self._conf.address,
            owner=self._qemu_owner(),
            interface=self._conf.interface,
            population=population or self._conf.population,
            background_rate=self._conf.background_rate * 1e6,
            read_around=self._conf.read_around << 10,
        )

    def _qemu_owner(self) -> tuple[int, int]:
        """Return the user and group that libvirt runs guests as (secmodel dac)."""
        root = etree.fromstring(self._connection.getCapabilities().encode())
        label = root.findtext("host/secmodel[model='dac']/baselabel", default="+0:+0")
        user, _, group = label.partition(":")
        return int(user), int(group)

    # The record of the frozen process

    def _write_record(self, image: str, frozen: freeze.Process, guest: _Guest) -> None:
        record = {"pid": frozen.pid, "start_time": frozen.start_time, "file": _file(guest)}
        path = os.path.join(self._directory(image), _FROZEN)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(record, file)

    def _read_record(self, image: str) -> "_Record | None":
        path = os.path.join(self._directory(image), _FROZEN)
        try:
            with open(path, encoding="utf-8") as file:
                record = json.load(file)
        except FileNotFoundError:
            return None
        return _Record(freeze.Process(record["pid"], record["start_time"]), record["file"])


@contextlib.contextmanager
def _lock(path: str) -> Iterator[int]:
    """Hold a shared lock on a file, which is made, with its directory, if it is not there."""
    while True:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        try:
            lock = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_SH)
            # Whoever held it before may have removed the directory.
            if os.path.exists(path) and os.path.samestat(os.fstat(lock), os.stat(path)):
                yield lock
                return
        finally:
            os.close(lock)


@dataclasses.dataclass(frozen=True)
class _Record:
    process: freeze.Process
    file: Mapping[str, Any]


_STATES = {
    libvirt.VIR_DOMAIN_BLOCKED: "blocked",
    libvirt.VIR_DOMAIN_PAUSED: "paused",
    libvirt.VIR_DOMAIN_SHUTDOWN: "being shut down",
    libvirt.VIR_DOMAIN_SHUTOFF: "shut off",
    libvirt.VIR_DOMAIN_CRASHED: "crashed",
    libvirt.VIR_DOMAIN_PMSUSPENDED: "suspended by its kernel",
}


class _Stopwatch:
    def __init__(self, laps: dict[str, float]) -> None:
        self._laps = laps
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now


def _portable_xml(domain: libvirt.virDomain) -> str:
    return domain_xml.portable(
        domain.XMLDesc(_PORTABLE), domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE)
    )


def _qemu_pid(domain: libvirt.virDomain) -> int:
    path = os.path.join(_LIBVIRT_STATE, f"{domain.name()}.pid")
    with open(path, encoding="ascii") as file:
        pid = int(file.read())
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        if domain.UUIDString().encode() not in file.read().split(b"\0"):
            raise _Refusal(f"the process {pid} in {path} is not its QEMU")
    return pid


def _check_memory(guest: _Guest) -> None:
    """Raise _Refusal unless every page of the guest's RAM is private to QEMU and 4 KiB."""
    with open(f"/proc/{guest.pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
        maps = [line.split(maxsplit=5) for line in file]
    for block in guest.writable:
        if block.page_size != _PAGE_SIZE:
            raise _Refusal(f"its memory {block.name} is on huge pages of {block.page_size} bytes")
        position = block.address or 0
        end = position + block.size
        for place, mode, _, _, inode, *_ in maps:
            start, stop = (int(field, 16) for field in place.split("-"))
            if start <= position < stop:
                if mode[3] != "p":
                    raise _Refusal(f"its memory {block.name} is shared with other processes")
                if inode != "0":
                    raise _Refusal(f"its memory {block.name} is in a file")
                position = stop
        if position < end:
            raise _Refusal(f"its memory {block.name} is not in one piece in QEMU")


def _resume(domain: libvirt.virDomain) -> None:
    try:
        domain.resume()
    except libvirt.libvirtError as error:
        if not domain.isActive():
            LOG.error("The guest %s ended while it was being forked", domain.name())
        elif domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
            raise exception.CaptureFailed(
                f"The guest {domain.name()} is stopped and libvirt does not resume it: {error}"
            ) from error


@contextlib.contextmanager
def _process_files(frozen: freeze.Process) -> Iterator[tuple[int, int]]:
    """Open the frozen process's memory and page map."""
    with contextlib.ExitStack() as stack:
        fds = []
        for name in ("mem", "pagemap"):
            fd = os.open(f"/proc/{frozen.pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, fd)
            fds.append(fd)
        yield fds[0], fds[1]


def _file(guest: _Guest) -> dict[str, Any]:
    """Return the image's memory as the memory server wants it described."""
    memory = guest.blocks[0]
    return {
        "number": MEMORY_FILE,
        "name": "memory",
        "size": memory.size,
        "kind": "process",
        "ranges": [[memory.address, memory.size]],
    }


def _publish(
    server: control.ControlClient, guest: _Guest, memory: int, pagemap: int
) -> dict[str, Any]:
    return server.call("publish", (memory, pagemap), files=[_file(guest)])


def _serve(server: control.ControlClient, image: descriptor.Descriptor) -> None:
    server.call("serve", descriptor=base64.b64encode(image.encode()).decode())


def _clone_blocks(guest: _Guest) -> tuple[descriptor.RamBlock, ...]:
    """Return the RAM blocks of a clone: the parent's, but for the name of the guest's memory."""
    memory, *others = guest.blocks
    return (
        descriptor.RamBlock(domain_xml.MEMORY, memory.size),
        *(descriptor.RamBlock(block.name, block.size) for block in others),
    )


def _small_pages(guest: _Guest, memory: int) -> Iterator[stream.Page]:
    """Yield the pages of the RAM blocks beside the guest's memory that are not zero."""
    for block in guest.writable[1:]:
        content = os.pread(memory, block.size, block.address or 0)
        for start in range(0, len(content), _PAGE_SIZE):
            page = content[start : start + _PAGE_SIZE]
            if page != _ZERO_PAGE:
                yield stream.Page(block.name, start, page)


def _check_descriptor(image: descriptor.Descriptor) -> descriptor.File:
    """Return the image's memory; InvalidDescriptor says why the descriptor is not for QEMU."""
    if image.hypervisor != NAME:
        raise exception.InvalidDescriptor(f"The image is of the hypervisor {image.hypervisor}")
    try:
        incoming = stream.parse(image.device_state)
        root = domain_xml.parse(image.domain)
        machine_type = domain_xml.machine_type(root)
        reason = domain_xml.refusal(root)
    except (exception.InvalidStream, exception.InvalidDomain) as error:
        raise exception.InvalidDescriptor(f"The descriptor is invalid: {error}") from error
    if reason is not None:
        raise exception.InvalidDescriptor(f"The descriptor's guest cannot be a clone: {reason}")
    if not incoming.machine_type == machine_type == image.machine_type:
        raise exception.InvalidDescriptor("The descriptor's machine types contradict each other")
    if incoming.ram_blocks != image.ram_blocks:
        raise exception.InvalidDescriptor("The descriptor's RAM blocks contradict each other")
    sizes = {block.name: block.size for block in image.ram_blocks}
    try:
        memory = image.file(MEMORY_FILE)
    except KeyError:
        raise exception.InvalidDescriptor("The descriptor has no memory") from None
    if memory.size != sizes.get(domain_xml.MEMORY):
        raise exception.InvalidDescriptor("The descriptor's memory is not its RAM block's size")
    return memory


def _version(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split("."))
    except ValueError:
        raise exception.InvalidDescriptor(f"{text!r} is not a version of QEMU") from None


def _endpoint(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
