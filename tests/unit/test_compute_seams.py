# SPDX-License-Identifier: Apache-2.0
"""Where the driver takes hold of Nova's own code. A Nova that has moved one of these fails here."""

from collections.abc import Callable
import inspect
from typing import Any

from nova.compute import manager as compute_manager
from nova.virt import virtapi
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import imagebackend
import pytest

from nova_snowflock.virt import driver
from nova_snowflock.virt import manager

LIBVIRT = libvirt_driver.LibvirtDriver
OURS = driver.SnowFlockDriver


def calls(caller: Callable[..., Any], name: str) -> bool:
    """Whether a method calls ``self.<name>``."""
    return f"self.{name}(" in inspect.getsource(caller)


@pytest.mark.parametrize(
    ("caller", "seam"),
    [
        (LIBVIRT.spawn, "_get_guest_xml"),
        (LIBVIRT.spawn, "_create_guest_with_network"),
        (LIBVIRT._create_guest_with_network, "_create_guest"),
        (LIBVIRT._create_guest_with_network, "plug_vifs"),
        (LIBVIRT._hard_reboot, "_create_images_and_backing"),
        (LIBVIRT.power_on, "_hard_reboot"),
        (LIBVIRT.destroy, "cleanup"),
    ],
)
def test_seam_is_called(caller: Callable[..., Any], seam: str) -> None:
    assert calls(caller, seam)
    assert seam in vars(OURS)


def test_create_guest_is_told_what_it_is_here() -> None:
    theirs = inspect.signature(LIBVIRT._create_guest).parameters
    assert list(theirs) == list(inspect.signature(OURS._create_guest).parameters)


@pytest.mark.parametrize(
    ("method", "first"),
    [
        ("cleanup", ["self", "context", "instance", "network_info", "block_device_info"]),
        (
            "_create_images_and_backing",
            ["self", "context", "instance", "instance_dir", "disk_info"],
        ),
        ("check_can_live_migrate_source", ["self", "context", "instance"]),
        ("migrate_disk_and_power_off", ["self", "context", "instance"]),
        ("_create_guest_with_network", ["self", "context", "xml", "instance"]),
        ("plug_vifs", ["self", "instance", "network_info"]),
        ("spawn", ["self", "context", "instance"]),
        ("update_provider_tree", ["self", "provider_tree", "nodename"]),
    ],
)
def test_arguments_are_where_they_are_taken_from(method: str, first: list[str]) -> None:
    assert list(inspect.signature(getattr(LIBVIRT, method)).parameters)[: len(first)] == first


def test_fifth_argument_of_cleanup_is_whether_disks_go() -> None:
    assert list(inspect.signature(LIBVIRT.cleanup).parameters)[5] == "destroy_disks"


def test_compute_manager_takes_endpoints() -> None:
    source = inspect.getsource(compute_manager)
    assert "self.additional_endpoints.append(" in source
    assert "self.driver.init_host(host=self.host)" in source
    assert "self._compute = compute" in inspect.getsource(compute_manager.ComputeVirtAPI)
    assert issubclass(compute_manager.ComputeVirtAPI, virtapi.VirtAPI)


def test_every_domain_is_made_when_the_one_before_is_gone() -> None:
    """Its disks are then what they will be while it runs."""
    for caller, end in (
        (LIBVIRT._hard_reboot, "self.destroy("),
        (LIBVIRT.rescue, "self._destroy("),
        (LIBVIRT.unrescue, "self._destroy("),
    ):
        source = inspect.getsource(caller)
        assert source.index(end) < source.index("self._create_guest")


def test_images_are_made_by_name() -> None:
    ours = inspect.signature(driver._ImageBackend.by_name).parameters
    assert list(ours) == list(inspect.signature(imagebackend.Backend.by_name).parameters)
    source = inspect.getsource(LIBVIRT.__init__)
    assert "self.image_backend = imagebackend.Backend(CONF.use_cow_images)" in source
    for caller in (LIBVIRT._create_image, LIBVIRT._get_guest_disk_config):
        assert "self.image_backend.by_name(" in inspect.getsource(caller)


def test_formats_are_noted_under_a_lock_of_the_file() -> None:
    source = inspect.getsource(imagebackend.Image.resolve_driver_format)
    assert "@utils.synchronized(self.disk_info_path or '', external=False" in source
    flat = inspect.getsource(imagebackend.Flat.__init__)
    assert "os.path.join(os.path.dirname(path), 'disk.info')" in flat


def test_operations_on_a_server_hold_the_lock_of_its_uuid() -> None:
    assert "@utils.synchronized(instance.uuid)" in inspect.getsource(compute_manager)
    assert "@utils.synchronized(instance.uuid)" in inspect.getsource(manager)
