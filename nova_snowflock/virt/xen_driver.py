# SPDX-License-Identifier: Apache-2.0
"""The Nova driver for Xen: Nova's for libvirt, with what it has lost of Xen.

That was taken from it in Wallaby (23.0.0, "libvirt: Drop support for Xen"). Most of it does for any
hypervisor of libvirt's still; what does not is here.
"""

from typing import Any

import libvirt
from nova import conf as nova_conf
from nova import exception as nova_exception
from nova import objects
from nova.conf import libvirt as libvirt_conf
from nova.network import model as network_model
from nova.objects import fields
from nova.virt.libvirt import blockinfo
from nova.virt.libvirt import config as libvirt_config
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import vif as libvirt_vif

from nova_snowflock.virt import driver
from nova_snowflock.virt import host

CONF = nova_conf.CONF

XEN = "xen"
_PVH = "xenpvh"
"""libvirt's name of an OS type that Nova has no name for."""
_MACHINES = {fields.VMMode.HVM: "xenfv", fields.VMMode.XEN: "xenpv", _PVH: _PVH}
"""libvirt's machine types, by OS type."""
_VIF_MODELS = (
    network_model.VIF_MODEL_NETFRONT,
    network_model.VIF_MODEL_NE2K_PCI,
    network_model.VIF_MODEL_PCNET,
    network_model.VIF_MODEL_RTL8139,
    network_model.VIF_MODEL_E1000,
)
_MIB = 1 << 20


class XenHost(host.Host):
    """Nova's, without domain 0, which is none of its servers, and what libxl does not tell."""

    def list_instance_domains(self, only_running: bool = True) -> list[Any]:
        """Domains of servers, as objects of libvirt's."""
        return [domain for domain in super().list_instance_domains(only_running) if domain.ID()]

    def get_capabilities(self) -> libvirt_config.LibvirtConfigCaps:
        """What libvirt says of the host, but for PVH guests: Nova has no name for them."""
        capabilities = super().get_capabilities()
        capabilities.guests = [guest for guest in capabilities.guests if guest.ostype != _PVH]
        return capabilities

    def get_available_cpus(self) -> set[int]:
        """The host's processors. Domain 0 sees only its own."""
        return set(range(self._get_hardware_info()[2]))

    def get_online_cpus(self) -> set[int]:
        """All of them: libxl does not tell."""
        return self.get_available_cpus()

    def get_memory_mb_used(self) -> int:
        """What Xen has given to guests, domain 0 and itself: MiB."""
        free = self.get_connection().getFreeMemory() // _MIB
        return int(self.get_memory_mb_total()) - int(free)


class SnowFlockXenDriver(driver.SnowFlockDriver):
    """Nova's libvirt driver for Xen's guests, with VM fork.

    A server whose image brings a kernel is a PVH guest, any other an HVM guest, unless the image
    says otherwise (``hw_vm_mode``).
    """

    _host_class = XenHost

    def __init__(self, virtapi: Any, read_only: bool = False) -> None:
        if CONF.snowflock.hypervisor != XEN:
            raise nova_exception.InvalidConfiguration(
                f"SnowFlockXenDriver takes [snowflock]hypervisor = {XEN}"
            )
        _know_xen()
        super().__init__(virtapi, read_only)

    @staticmethod
    def _uri() -> str:
        return str(CONF.libvirt.connection_uri or "xen:///system")

    # What a guest has

    def _conf_non_lxc(
        self,
        guest: libvirt_config.LibvirtConfigGuest,
        root_device_name: str | None,
        rescue: Any,
        instance: objects.Instance,
        inst_path: str,
        image_meta: objects.ImageMeta,
        disk_info: dict[str, Any],
    ) -> None:
        super()._conf_non_lxc(
            guest, root_device_name, rescue, instance, inst_path, image_meta, disk_info
        )
        default = fields.VMMode.HVM if guest.os_kernel is None else _PVH
        guest.os_type = image_meta.properties.get("hw_vm_mode") or default
        if guest.os_type not in _MACHINES:
            raise nova_exception.UnsupportedHardware(model=guest.os_type, virt=XEN)
        guest.os_mach_type = _MACHINES[guest.os_type]

    def _set_features(
        self, guest: libvirt_config.LibvirtConfigGuest, *args: Any, **kwargs: Any
    ) -> None:
        super()._set_features(guest, *args, **kwargs)
        if guest.os_type == fields.VMMode.HVM:
            guest.add_feature(libvirt_config.LibvirtConfigGuestFeatureACPI())
            guest.add_feature(libvirt_config.LibvirtConfigGuestFeatureAPIC())

    def _get_guest_numa_config(self, topology: Any, flavor: Any, image_meta: Any) -> Any:
        found = super()._get_guest_numa_config(topology, flavor, image_meta)
        if found.cputune is None and found.cpuset:
            # Of what Nova says for all of a guest's processors libxl's driver takes no notice.
            found = found._replace(cputune=_pinned(flavor.vcpus, found.cpuset))
        return found

    def _get_guest_iothread(self) -> int:
        return 0

    def _get_guest_storage_config(self, *args: Any, **kwargs: Any) -> list[Any]:
        return [_backed(device) for device in super()._get_guest_storage_config(*args, **kwargs)]

    def _get_volume_config(
        self, connection_info: Any, disk_info: Any
    ) -> libvirt_config.LibvirtConfigGuestDisk:
        return _backed(super()._get_volume_config(connection_info, disk_info))

    def _create_consoles(
        self, guest_cfg: libvirt_config.LibvirtConfigGuest, *args: Any, **kwargs: Any
    ) -> None:
        console = libvirt_config.LibvirtConfigGuestConsole()
        console.target_type = "serial" if guest_cfg.os_type == fields.VMMode.HVM else XEN
        guest_cfg.add_device(console)

    @staticmethod
    def _guest_add_video_device(guest: libvirt_config.LibvirtConfigGuest) -> bool:
        # No others have a device model that would show them.
        return guest.os_type == fields.VMMode.HVM and bool(
            libvirt_driver.LibvirtDriver._guest_add_video_device(guest)
        )

    def _get_video_type(self, image_meta: objects.ImageMeta) -> str | None:
        return str(image_meta.properties.get("hw_video_model") or fields.VideoModel.VGA)

    @staticmethod
    def _guest_add_spice_channel(guest: libvirt_config.LibvirtConfigGuest) -> None:
        """libxl has no channels of SPICE's."""

    def _guest_add_usb_root_controller(self, *args: Any, **kwargs: Any) -> None:
        """libxl makes one for those who have a device for it."""

    # What is done with guests

    def _delete_guest_configuration(
        self, guest: libvirt_guest.Guest, *args: Any, **kwargs: Any
    ) -> None:
        # libxl's driver refuses what Nova says besides, of vTPM and NVRAM.
        guest._domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE)

    def check_can_live_migrate_source(
        self, context: Any, instance: objects.Instance, *args: Any, **kwargs: Any
    ) -> Any:
        """Refused."""
        raise nova_exception.MigrationPreCheckError(
            reason="servers of Xen hosts are not migrated live"
        )


def _know_xen() -> None:
    """Have this process' Nova know what it rejects: only a driver of Xen's is to be started now."""
    [option] = [known for known in libvirt_conf.libvirt_general_opts if known.name == "virt_type"]
    option.type.choices[XEN] = None
    CONF.set_override("virt_type", XEN, "libvirt")
    CONF.set_default("disk_prefix", "xvd", "libvirt")
    # Those with a USB are not forked.
    CONF.set_default("pointer_model", "ps2mouse")
    libvirt_vif.SUPPORTED_VIF_MODELS[XEN] = list(_VIF_MODELS)
    blockinfo.get_disk_bus_for_device_type = _disk_bus


_novas_disk_bus = blockinfo.get_disk_bus_for_device_type


def _disk_bus(
    instance: objects.Instance,
    virt_type: str,
    image_meta: objects.ImageMeta,
    device_type: str = "disk",
) -> str | None:
    """Nova's, which knows no default for Xen: all guests have drivers for its own bus, and HVM
    guests, with the same names, IDE disks until they use it."""
    try:
        return _novas_disk_bus(instance, virt_type, image_meta, device_type)
    except nova_exception.UnsupportedVirtType:
        if virt_type != XEN:
            raise
        return XEN


def _pinned(vcpus: int, cpuset: set[int]) -> libvirt_config.LibvirtConfigGuestCPUTune:
    tune = libvirt_config.LibvirtConfigGuestCPUTune()
    for number in range(vcpus):
        pin = libvirt_config.LibvirtConfigGuestCPUTuneVCPUPin()
        pin.id, pin.cpuset = number, cpuset
        tune.vcpupin.append(pin)
    return tune


def _backed(device: Any) -> Any:
    """A device; if a disk, with the driver that libxl is to use. Without, it takes it for raw."""
    if isinstance(device, libvirt_config.LibvirtConfigGuestDisk):
        device.driver_name = "phy" if device.source_type == "block" else "qemu"
    return device
