# SPDX-License-Identifier: Apache-2.0
"""What the Nova driver makes of Nova's domain XML."""

from collections.abc import Callable, Iterator
import contextlib
import json
import pathlib
import subprocess
import uuid

from lxml import etree
from nova import conf as nova_conf
from nova import objects
from nova.compute import provider_tree
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import imagebackend
import pytest

from nova_snowflock.virt import driver
from nova_snowflock.virt import manager
from nova_snowflock.virt import rpc

Config = Callable[..., None]

CONF = nova_conf.CONF
CLONE = "11111111-2222-4333-8444-555555555555"
TRAIT = rpc.trait("qemu")
OTHER = "66666666-7777-4888-9999-aaaaaaaaaaaa"
XML = """\
<domain type="kvm">
  <uuid>11111111-2222-3333-4444-555555555555</uuid>
  <devices>
    <memballoon model="virtio"><stats period="10"/></memballoon>
  </devices>
</domain>
"""


def test_server_can_be_forked_well() -> None:
    root = etree.fromstring(driver._forkable(XML).encode())
    assert str(uuid.UUID(root.findtext("genid"))) == root.findtext("genid")
    balloon = root.find("devices/memballoon")
    assert balloon is not None
    assert balloon.get("freePageReporting") == "on"


def test_every_start_has_an_id_of_its_own() -> None:
    ids = {etree.fromstring(driver._forkable(XML).encode()).findtext("genid") for _ in range(3)}
    assert len(ids) == 3


def test_other_hypervisors_guests_are_left_alone() -> None:
    xml = XML.replace('type="kvm"', 'type="lxc"')
    assert "genid" not in driver._forkable(xml)
    assert "freePageReporting" not in driver._forkable(xml)


@pytest.fixture
def config() -> Iterator[Config]:
    """Sets an option of Nova's for one test: name, value, and group if it has one."""
    with contextlib.ExitStack() as stack:

        def override(name: str, value: str, group: str | None = None) -> None:
            CONF.set_override(name, value, group)
            stack.callback(CONF.clear_override, name, group)

        yield override


@pytest.fixture(params=["raw", "qcow2"])
def images_type(request: pytest.FixtureRequest, tmp_path: pathlib.Path, config: Config) -> str:
    """How a host keeps disks; its servers' are below ``tmp_path``."""
    config("images_type", request.param, "libvirt")
    config("instances_path", str(tmp_path))
    return str(request.param)


def test_clone_has_layers_wherever_it_is_built(images_type: str, tmp_path: pathlib.Path) -> None:
    clone, other = objects.Instance(uuid=CLONE), objects.Instance(uuid=OTHER)
    backend = driver._ImageBackend(False, {CLONE})
    for name in ("disk", "disk.eph0", "disk.swap"):
        assert backend.by_name(clone, name, images_type).driver_format == "qcow2"
        assert backend.by_name(other, name, images_type).driver_format == images_type
    assert backend.by_name(clone, "disk.config", "raw").driver_format == "raw"
    # Nova finds them again when it is no clone any more.
    disk = tmp_path / CLONE / "disk"
    disk.touch()
    assert imagebackend.Flat(path=str(disk)).driver_format == "qcow2"


def test_domain_has_the_formats_that_disks_have_when_it_is_made(
    images_type: str, tmp_path: pathlib.Path
) -> None:
    """Nova's XML is from before a merge: from when it ran, or was to be rescued."""
    directory = tmp_path / OTHER
    directory.mkdir()
    disk, config = directory / "disk", directory / "disk.config"
    disk.touch()
    noted = {str(disk): "qcow2", f"{disk}.{CLONE}": images_type, str(config): "raw"}
    (directory / "disk.info").write_text(json.dumps(noted))
    root = etree.Element("domain")
    devices = etree.SubElement(root, "devices")
    # libvirt may know the file that was merged into by its earlier name.
    named = f"{disk}.{CLONE}"
    for path, kind in ((named, "qcow2"), (config, "raw"), (tmp_path / "volume", "raw")):
        element = etree.SubElement(devices, "disk", type="file", device="disk")
        etree.SubElement(element, "driver", type=kind)
        etree.SubElement(element, "source", file=str(path))
        etree.SubElement(element, "backingStore", type="file")
    ours = driver.SnowFlockDriver.__new__(driver.SnowFlockDriver)
    ours.image_backend = imagebackend.Backend(True)
    xml = ours._with_disks_as_they_are(
        etree.tostring(root, encoding="unicode"), objects.Instance(uuid=OTHER)
    )
    own, _, volume = etree.fromstring(xml).findall("devices/disk")
    kinds = [kind.get("type") for kind in etree.fromstring(xml).iterfind("devices/disk/driver")]
    assert kinds == [images_type, "raw", "raw"]
    assert [source.get("file") for source in own.iterfind("source")] == [str(disk)]
    assert own.find("backingStore") is None
    assert volume.find("backingStore") is not None


def test_server_is_not_moved_without_its_layers(images_type: str, tmp_path: pathlib.Path) -> None:
    """Its image is released, and what it served is still being merged."""
    server = objects.Instance(uuid=OTHER, system_metadata={})
    (tmp_path / OTHER).mkdir()
    disk = tmp_path / OTHER / "disk"
    disk.touch()
    assert driver._why_disks_bound(server) is None
    layer = tmp_path / OTHER / f"disk.{CLONE}"
    layer.touch()
    assert "being merged" in str(driver._why_disks_bound(server))


@pytest.mark.parametrize("kind", imagebackend.Backend(True).BACKEND)
def test_host_takes_part_if_its_disks_are_files(
    kind: str, monkeypatch: pytest.MonkeyPatch, config: Config
) -> None:
    config("images_type", kind, "libvirt")
    monkeypatch.setattr(libvirt_driver.LibvirtDriver, "update_provider_tree", leave_as_is)
    known = provider_tree.ProviderTree()
    known.new_root("host", OTHER)
    # As it was before the host was configured otherwise.
    known.update_traits("host", [TRAIT, "HW_CPU_X86_AVX"])
    driver.SnowFlockDriver.__new__(driver.SnowFlockDriver).update_provider_tree(known, "host")
    reason = manager.why_unforkable()
    if imagebackend.Backend(True).backend() in (imagebackend.Flat, imagebackend.Qcow2):
        assert reason is None
        assert known.data("host").traits == {TRAIT, "HW_CPU_X86_AVX"}
    else:
        assert reason is not None
        assert f"keeps disks as {kind} " in reason
        assert known.data("host").traits == {"HW_CPU_X86_AVX"}


def leave_as_is(*_: object) -> None:
    """Instead of Nova's: it asks libvirt."""


@pytest.mark.parametrize(
    ("base", "has_layers"),
    [
        ("_base/da39a3ee5e6b4b0d3255bfef95601890afd80709", False),
        ("_base/ephemeral_1_40d1d2c", False),
        ("disk.0b8c2e2e-6e0f-4f66-8d0e-1c1f7a3a2f10", True),
        ("mount/vda-0", True),
        (None, False),
    ],
)
def test_layers_are_told_from_cached_images(
    tmp_path: pathlib.Path, base: str | None, has_layers: bool
) -> None:
    instances = tmp_path / "instances"
    disk = tmp_path / "disk"
    backing = () if base is None else ("-u", "-b", instances / base, "-F", "raw")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *backing, disk, "1M"], check=True)
    driver.CONF.set_override("instances_path", str(instances))
    try:
        assert driver._has_layers(str(disk), "qcow2") == has_layers
    finally:
        driver.CONF.clear_override("instances_path")
