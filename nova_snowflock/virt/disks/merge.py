# SPDX-License-Identifier: Apache-2.0
"""Fewer layers: those of images that were released are merged, those of memtap copied.

What a guest's disk reads as never changes, whenever this is interrupted: layers that are being
merged stay below the one they are merged from until that has nothing more to tell, and the disk's
name goes to the merged file while the guest stands still.
"""

from collections.abc import Callable, Mapping
import contextlib
import os
import time

import libvirt
from lxml import etree
from oslo_log import log as logging

from nova_snowflock import exception
from nova_snowflock.virt import domain_lock
from nova_snowflock.virt import libvirt_xml
from nova_snowflock.virt.disks import blocks as disk_blocks
from nova_snowflock.virt.disks import disk_xml
from nova_snowflock.virt.disks import files
from nova_snowflock.virt.disks import qcow2

LOG = logging.getLogger(__name__)

_WORKING, _STOPPED = "working", "stopped"
_FIRST_LOOK, _LAST_LOOK = 0.01, 0.5
# libxl's driver takes a guest that waits for something for one that is blocked.
_RUNNING = (libvirt.VIR_DOMAIN_RUNNING, libvirt.VIR_DOMAIN_BLOCKED)


class _Interrupted(Exception):
    """A fork wants the disks, or the guest was started or stopped."""


def disks_of(domain: libvirt.virDomain) -> list[files.Disk]:
    """Its writable disks, but for those of a kind that is never forked."""
    return list(files.forkable(libvirt_xml.parse(domain.XMLDesc())))


def depends(domain: libvirt.virDomain, directory: str) -> bool:
    """Whether the disks of a domain, running or not, are based on files in an image's mount."""
    for disk in disks_of(domain):
        # A disk of which not all is there can still be of the image as far as that goes.
        with contextlib.suppress(exception.DiskError):
            for path, _ in qcow2.walk(disk.path, disk.format):
                if path.startswith(f"{directory}/"):
                    return True
                if path.startswith(f"{os.path.dirname(os.path.dirname(directory))}/"):
                    break  # a file of another image, below which there are no other's
    return False


def interrupt(blocks: disk_blocks.Blocks) -> None:
    """Have whoever merges or copies layers of the guest give up."""
    for disk in disks_of(blocks.domain):
        blocks.cancel(disk)


def repair(blocks: disk_blocks.Blocks) -> None:
    """Have the name of each disk of a running guest stand for what QEMU writes.

    :raises DiskError: it cannot be made so
    """
    for disk in disks_of(blocks.domain):
        blocks.repair(disk)


def recover(blocks: disk_blocks.Blocks, lock: domain_lock.DomainLock) -> None:
    """End what somebody began who was killed. The guest runs again if that had stopped it."""
    domain = blocks.domain
    noted = lock.noted()
    define_without_layers(domain)
    if not domain.isActive():
        return
    if noted in (_WORKING, _STOPPED):
        interrupt(blocks)
    repair(blocks)
    if noted == _STOPPED and domain.state()[0] == libvirt.VIR_DOMAIN_PAUSED:
        LOG.warning("The guest %s was left stopped and runs again", domain.name())
        domain.resume()


def collapse(
    blocks: disk_blocks.Blocks,
    lock: domain_lock.DomainLock,
    served: Callable[[str], bool],
    running: bool | None,
) -> bool:
    """Merge each disk's layers that nobody needs apart.

    :param served: whether an image still needs the file as it is
    :param running: whether the guest must run for that, or must not; None if it does not matter
    :returns: False if a fork came in between, or the guest runs, or does not, and must not
    """
    domain = blocks.domain
    recover(blocks, lock)
    with contextlib.suppress(_Interrupted):
        for disk in disks_of(domain):
            chain = disk.chain()
            depth = 0
            while depth + 1 < len(chain) and disk.is_layer(chain[depth + 1].path):
                if served(chain[depth + 1].path):
                    break
                depth += 1
            if depth:
                LOG.info("Merging %d layers of %s of %s", depth, disk.target, domain.name())
                if _runs(domain, running):
                    _merge_running(blocks, lock, disk, chain, depth)
                else:
                    qcow2.commit(disk.path, chain[depth].path)
                    os.rename(chain[depth].path, disk.path)
                    define_without_layers(domain, {disk.path: chain[depth].format})
            _clean(domain, disk.target)
        return True
    return False


def localize(
    blocks: disk_blocks.Blocks,
    lock: domain_lock.DomainLock,
    run_path: str,
    running: bool | None,
) -> bool:
    """Copy what each disk needs of files below ``run_path`` into its topmost file.

    :param running: as of :func:`collapse`
    :returns: False as of :func:`collapse`
    """
    domain = blocks.domain
    recover(blocks, lock)
    with contextlib.suppress(_Interrupted):
        for disk in disks_of(domain):
            chain = disk.chain()
            foreign = _below(chain, run_path)
            if not foreign:
                continue
            LOG.info("Copying the image's part of %s of %s", disk.target, domain.name())
            below = foreign[-1] + 1
            if _runs(domain, running):
                base = below if below < len(chain) else None
                lock.note(_WORKING)
                blocks.begin_copy(disk, chain, base)
                _wait(blocks, lock, disk, until_ready=False)
                lock.note("")
            elif below < len(chain):
                base_options = ("-b", chain[below].path, "-F", chain[below].format)
                qcow2.qemu_img("rebase", "-q", "-f", qcow2.QCOW2, *base_options, disk.path)
            else:
                qcow2.qemu_img("rebase", "-q", "-f", qcow2.QCOW2, "-b", "", disk.path)
            if _below(disk.chain(), run_path):
                raise exception.DiskError(
                    f"Copying the image's part of {disk.target} of {domain.name()} failed; "
                    "QEMU's log says why"
                )
            _clean(domain, disk.target)
        return True
    return False


def _runs(domain: libvirt.virDomain, expected: bool | None) -> bool:
    """Whether the guest runs.

    :raises _Interrupted: not as expected
    """
    active = bool(domain.isActive())
    if expected not in (None, active):
        raise _Interrupted
    return active


def _below(chain: list[qcow2.Layer], directory: str) -> list[int]:
    """Which layers are files below a directory."""
    return [number for number, layer in enumerate(chain) if layer.path.startswith(f"{directory}/")]


def _clean(domain: libvirt.virDomain, target: str) -> None:
    """Remove files of earlier layers that the disk does not need any more."""
    disk = next(disk for disk in disks_of(domain) if disk.target == target)
    needed = {layer.path for layer in disk.chain()} | disk.known_as
    for path in disk.leftovers():
        if path not in needed:
            os.unlink(path)


def define_without_layers(domain: libvirt.virDomain, formats: Mapping[str, str] = {}) -> None:
    """Have a domain's definition name the disks and no lower layers, so that its next start reads
    the files.

    libvirt notes there every layer that a snapshot was laid on, under the one name that all have;
    or none, and the format of an earlier one, if it knows that by another name (see
    :class:`files.Disk`).

    :param formats: of disks of a domain that does not run, if they have changed, by path
    """
    if not domain.isPersistent():
        return
    if domain.isActive():
        formats = {disk.path: disk.format for disk in disks_of(domain)}
    flags = libvirt.VIR_DOMAIN_XML_INACTIVE | libvirt.VIR_DOMAIN_XML_SECURE
    root = libvirt_xml.parse(domain.XMLDesc(flags))
    before = etree.tostring(root)
    for disk in filter(disk_xml.is_forked, root.iterfind("devices/disk")):
        driver, source = disk.find("driver"), disk.find("source")
        file = source.get("file") if source is not None else None
        if driver is None or source is None or file is None:
            continue
        path = files.disk_path(os.path.normpath(file))
        source.set("file", path)
        driver.set("type", formats.get(path, str(driver.get("type"))))
        for layers in disk.findall("backingStore"):
            disk.remove(layers)
    if etree.tostring(root) != before:
        domain.connect().defineXML(etree.tostring(root, encoding="unicode"))


def _merge_running(
    blocks: disk_blocks.Blocks,
    lock: domain_lock.DomainLock,
    disk: files.Disk,
    chain: list[qcow2.Layer],
    depth: int,
) -> None:
    domain = blocks.domain
    lock.note(_WORKING)
    blocks.begin_merge(disk, chain, depth)
    _wait(blocks, lock, disk, until_ready=True)
    stopped = domain.state()[0] in _RUNNING
    if stopped:
        # What it wrote between the two would be in a file that has no name, were it to crash.
        lock.note(_STOPPED)
        lock.kept = True
    try:
        if stopped:
            domain.suspend()
        blocks.end_merge(disk)
        files.give_name(chain[depth].path, disk.path)
    finally:
        if stopped:
            domain.resume()
            lock.note(_WORKING)
            lock.kept = False
    recover(blocks, lock)
    lock.note("")


def _wait(
    blocks: disk_blocks.Blocks,
    lock: domain_lock.DomainLock,
    disk: files.Disk,
    *,
    until_ready: bool,
) -> None:
    """Wait for a job: until it is ready, or has ended.

    :raises _Interrupted: a fork has ended it
    :raises DiskError: it failed
    """
    domain = blocks.domain
    pause = _FIRST_LOOK
    while True:
        if lock.interrupted():
            interrupt(blocks)
            raise _Interrupted
        job = blocks.job(disk)
        if job is None:
            break
        if until_ready and job is disk_blocks.Job.READY:
            return
        time.sleep(pause)
        pause = min(2 * pause, _LAST_LOOK)
    if lock.interrupted():
        raise _Interrupted
    if until_ready:
        raise exception.DiskError(
            f"Merging the layers of {disk.target} of {domain.name()} failed; QEMU's log says why"
        )
