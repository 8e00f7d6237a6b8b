# SPDX-License-Identifier: Apache-2.0
"""What Nova's libvirt driver makes of servers on a Xen host, with what ours puts back."""

from collections.abc import Callable, Iterator
import inspect
import pathlib
from typing import Any

import libvirt
from lxml import etree
from nova import conf as nova_conf
from nova import context as nova_context
from nova import exception as nova_exception
from nova import objects
from nova.compute import provider_tree
from nova.network import model as network_model
from nova.virt.libvirt import blockinfo
from nova.virt.libvirt import config as libvirt_config
from nova.virt.libvirt import driver as libvirt_driver
from nova.virt.libvirt import guest as libvirt_guest
from nova.virt.libvirt import host as libvirt_host
from nova.virt.libvirt import vif as libvirt_vif
import pytest

from nova_snowflock.virt import driver
from nova_snowflock.virt import xen_driver
from nova_snowflock.virt.xen import domain_xml
from tests.unit import virt

objects.register_all()
CONF = nova_conf.CONF
LIBVIRT = libvirt_driver.LibvirtDriver
SERVER = "66666666-7777-4888-9999-aaaaaaaaaaaa"
KERNEL, RAMDISK = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
MIB = 1 << 20
COMMAND_LINE = "console=hvc0 quiet"


def failure(code: int, message: str) -> libvirt.libvirtError:
    error = libvirt.libvirtError(message)
    error.err = (code, 0, message, 0, "", "", "", 0, 0)
    return error


class Domain:
    """One of a connection's."""

    def __init__(self, number: int) -> None:
        self._number = number
        self.undefined_with: list[int] = []

    def ID(self) -> int:
        return self._number

    def vcpus(self) -> Any:
        return [(0, 1, 0, 0)], [(True, True)]

    def undefineFlags(self, flags: int) -> None:
        self.undefined_with.append(flags)


class Connection:
    """What libvirt's libxl driver answers to Nova; it says that it supports nothing else."""

    def __init__(self) -> None:
        self.domains = [Domain(0), Domain(7), Domain(-1)]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def refuse(*_: object) -> None:
            raise failure(libvirt.VIR_ERR_NO_SUPPORT, name)

        return refuse

    def getCapabilities(self) -> str:
        return virt.text("xen-capabilities.xml")

    def getInfo(self) -> list[Any]:
        return ["x86_64", 3071, 2, 2000, 1, 1, 2, 1]

    def getFreeMemory(self) -> int:
        return 1400 * MIB

    def getLibVersion(self) -> int:
        return 9000000

    def getVersion(self) -> int:
        return 4017005

    def getType(self) -> str:
        return "Xen"

    def getHostname(self) -> str:
        return "xen1"

    def listAllDomains(self, flags: int) -> list[Domain]:
        if flags & libvirt.VIR_CONNECT_LIST_DOMAINS_INACTIVE:
            return self.domains
        return [domain for domain in self.domains if domain.ID() >= 0]

    def lookupByUUIDString(self, uuid: str) -> None:
        raise failure(libvirt.VIR_ERR_NO_DOMAIN, uuid)


@pytest.fixture
def connection() -> Connection:
    return Connection()


@pytest.fixture
def nova(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> Iterator[xen_driver.SnowFlockXenDriver]:
    """The driver, in a Nova that is as it was afterwards."""
    monkeypatch.setattr(blockinfo, "get_disk_bus_for_device_type", xen_driver._novas_disk_bus)
    monkeypatch.setitem(libvirt_vif.SUPPORTED_VIF_MODELS, "xen", [])
    monkeypatch.setattr(xen_driver.XenHost, "get_connection", lambda _: connection)
    CONF([], default_config_files=[])  # Nova looks for files beside its configuration
    CONF.set_override("hypervisor", "xen", "snowflock")
    CONF.set_override("instances_path", str(tmp_path))
    try:
        yield xen_driver.SnowFlockXenDriver(None)
    finally:
        CONF.clear_override("virt_type", "libvirt")
        CONF.clear_default("disk_prefix", "libvirt")
        CONF.clear_default("pointer_model")
        CONF.clear_override("hypervisor", "snowflock")
        CONF.clear_override("instances_path")


def server(**fields: Any) -> objects.Instance:
    """A server, as its compute service knows it."""
    flavor = objects.Flavor(
        flavorid="1",
        name="tiny",
        memory_mb=256,
        vcpus=2,
        root_gb=1,
        ephemeral_gb=0,
        swap=0,
        extra_specs={},
    )
    known = {
        "config_drive": "",
        "display_name": "web",
        "ephemeral_gb": 0,
        "flavor": flavor,
        "host": "xen1",
        "id": 1,
        "image_ref": KERNEL,
        "kernel_id": "",
        "numa_topology": None,
        "os_type": None,
        "pci_devices": objects.PciDeviceList(objects=[]),
        "pci_requests": objects.InstancePCIRequests(requests=[]),
        "project_id": "p",
        "ramdisk_id": "",
        "resources": None,
        "root_device_name": None,
        "system_metadata": {},
        "user_id": "u",
        "uuid": SERVER,
        "vcpu_model": None,
        "vm_mode": None,
    }
    return objects.Instance(**{**known, **fields})


def domain(
    nova: xen_driver.SnowFlockXenDriver,
    instance: objects.Instance,
    block_devices: dict[str, Any] | None = None,
    **properties: Any,
) -> etree._Element:
    """What a server whose image has those properties is defined with."""
    image = objects.ImageMeta.from_dict({"id": KERNEL, "properties": properties})
    known = {
        "block_device_mapping": [],
        "ephemerals": [],
        "image": [],
        "root_device_name": "/dev/xvda",
        "swap": None,
        **(block_devices or {}),
    }
    xml = nova._get_guest_xml(
        nova_context.RequestContext("u", "p", is_admin=False),
        instance,
        network_model.NetworkInfo([]),
        blockinfo.get_disk_info("xen", instance, image, known),
        image,
        block_device_info=known,
    )
    return etree.fromstring(xml)


def os_of(root: etree._Element) -> tuple[str | None, str | None]:
    """OS type and machine."""
    kind = root.find("os/type")
    assert kind is not None
    return kind.text, kind.get("machine")


def test_server_with_a_kernel_is_a_pvh_guest(nova: xen_driver.SnowFlockXenDriver) -> None:
    instance = server(kernel_id=KERNEL, ramdisk_id=RAMDISK)
    root = domain(nova, instance, os_command_line=COMMAND_LINE)
    assert root.get("type") == "xen"
    assert os_of(root) == ("xenpvh", "xenpvh")
    directory = f"{CONF.instances_path}/{SERVER}"
    for name, text in (
        ("kernel", f"{directory}/kernel"),
        ("initrd", f"{directory}/ramdisk"),
        ("cmdline", COMMAND_LINE),
    ):
        assert root.findtext(f"os/{name}") == text
    assert {device.tag for device in root.iterfind("devices/*")} == {"console", "disk"}
    for absent in ("cpu", "features", "genid", "sysinfo", "os/boot", "os/loader"):
        assert root.find(absent) is None
    assert root.findtext("iothreads") == "0"


def test_server_is_kept_to_the_processors_for_servers(nova: xen_driver.SnowFlockXenDriver) -> None:
    assert domain(nova, server()).find("cputune") is None
    CONF.set_override("cpu_shared_set", "1", "compute")
    try:
        root = domain(nova, server())
    finally:
        CONF.clear_override("cpu_shared_set", "compute")
    pins = root.findall("cputune/vcpupin")
    assert [(pin.get("vcpu"), pin.get("cpuset")) for pin in pins] == [("0", "1"), ("1", "1")]


def test_server_with_a_kernel_finds_its_disk(nova: xen_driver.SnowFlockXenDriver) -> None:
    root = domain(nova, server(kernel_id=KERNEL))
    assert str(root.findtext("os/cmdline")).startswith("root=/dev/xvda ")
    assert "console=hvc0" in str(root.findtext("os/cmdline"))


def test_server_without_a_kernel_is_an_hvm_guest(nova: xen_driver.SnowFlockXenDriver) -> None:
    root = domain(nova, server())
    assert os_of(root) == ("hvm", "xenfv")
    assert [feature.tag for feature in root.iterfind("features/*")] == ["acpi", "apic"]
    assert [boot.get("dev") for boot in root.iterfind("os/boot")] == ["hd"]
    [model] = root.findall("devices/video/model")
    assert model.get("type") == "vga"
    assert root.find("devices/graphics[@type='vnc']") is not None
    assert root.find("devices/input") is None


def test_spice(nova: xen_driver.SnowFlockXenDriver) -> None:
    CONF.set_override("enabled", True, "spice")
    CONF.set_override("enabled", False, "vnc")
    try:
        pvh, hvm = domain(nova, server(kernel_id=KERNEL)), domain(nova, server())
    finally:
        CONF.clear_override("enabled", "spice")
        CONF.clear_override("enabled", "vnc")
    assert [graphics.get("type") for graphics in hvm.iterfind("devices/graphics")] == ["spice"]
    assert pvh.find("devices/graphics") is None
    for root in (pvh, hvm):
        assert root.find("devices/channel") is None


@pytest.mark.parametrize(
    ("mode", "expected"), [("hvm", ("hvm", "xenfv")), ("xen", ("xen", "xenpv"))]
)
def test_image_that_says_what_it_is(
    nova: xen_driver.SnowFlockXenDriver, mode: str, expected: tuple[str, str]
) -> None:
    for properties in ({"hw_vm_mode": mode}, {"vm_mode": mode}):
        root = domain(nova, server(kernel_id=KERNEL), None, **properties)
        assert os_of(root) == expected
        assert root.find("os/kernel") is not None


def test_image_that_is_nothing_of_xens(nova: xen_driver.SnowFlockXenDriver) -> None:
    with pytest.raises(nova_exception.UnsupportedHardware):
        domain(nova, server(), hw_vm_mode="exe")


@pytest.mark.parametrize(("kernel", "target"), [(KERNEL, "xen"), ("", "serial")])
def test_console(nova: xen_driver.SnowFlockXenDriver, kernel: str, target: str) -> None:
    root = domain(nova, server(kernel_id=kernel))
    [console] = root.findall("devices/console")
    assert console.get("type") == "pty"
    assert [place.get("type") for place in console.iterfind("target")] == [target]
    assert root.find("devices/serial") is None


@pytest.mark.parametrize("kernel", [KERNEL, ""])
def test_disks(nova: xen_driver.SnowFlockXenDriver, kernel: str) -> None:
    """Without a driver, libxl would take a qcow2 file for a raw disk."""
    ephemeral = {
        "device_name": None,
        "device_type": "disk",
        "disk_bus": None,
        "guest_format": None,
        "size": 1,
    }
    instance = server(kernel_id=kernel, config_drive="True")
    root = domain(nova, instance, {"ephemerals": [ephemeral]})
    found = [
        tuple(
            element.get(name)
            for element, name in (
                (disk, "device"),
                (disk.find("driver"), "name"),
                (disk.find("driver"), "type"),
                (disk.find("target"), "dev"),
                (disk.find("target"), "bus"),
            )
            if element is not None
        )
        for disk in root.iterfind("devices/disk")
    ]
    assert sorted(found, key=lambda disk: str(disk[3])) == [
        ("disk", "qemu", "qcow2", "xvda", "xen"),
        ("disk", "qemu", "qcow2", "xvdb", "xen"),
        ("cdrom", "qemu", "raw", "xvdc", "xen"),
    ]


def test_volume_that_is_a_block_device() -> None:
    disk = libvirt_config.LibvirtConfigGuestDisk()
    disk.source_type = "block"
    assert xen_driver._backed(disk).driver_name == "phy"
    file_system = libvirt_config.LibvirtConfigGuestFilesys()
    assert not hasattr(xen_driver._backed(file_system), "driver_name")


@pytest.mark.parametrize("bus", ["virtio", "scsi"])
def test_image_that_needs_another_bus(nova: xen_driver.SnowFlockXenDriver, bus: str) -> None:
    with pytest.raises(nova_exception.UnsupportedHardware):
        domain(nova, server(), hw_disk_bus=bus)


def test_network_interfaces(nova: xen_driver.SnowFlockXenDriver) -> None:
    for model in ("netfront", "e1000"):
        assert libvirt_vif.is_vif_model_valid_for_virt("xen", model)
    assert not libvirt_vif.is_vif_model_valid_for_virt("xen", "virtio")
    image = objects.ImageMeta.from_dict({"properties": {}})
    assert nova.vif_driver.get_vif_model(image) is None  # libxl chooses


def test_other_hypervisors_are_nova_s(nova: xen_driver.SnowFlockXenDriver) -> None:
    image = objects.ImageMeta.from_dict({"properties": {"hw_machine_type": "q35"}})
    assert blockinfo.get_disk_bus_for_device_type(server(), "kvm", image) == "virtio"
    assert blockinfo.get_disk_bus_for_device_type(server(), "kvm", image, "cdrom") == "sata"
    with pytest.raises(nova_exception.UnsupportedVirtType):
        blockinfo.get_disk_bus_for_device_type(server(), "uml", image)


def test_host(nova: xen_driver.SnowFlockXenDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """libxl's driver has neither nodeGetCPUMap nor nodeGetCPUStats."""
    monkeypatch.setattr(libvirt_host.Host, "get_node_uuid", lambda _: SERVER)
    # It looks the servers up in the database.
    monkeypatch.setattr(LIBVIRT, "_get_disk_over_committed_size_total", lambda _: 0)
    found = nova.get_available_resource("xen1")
    assert found["vcpus"] == 2
    assert found["memory_mb"] == 3071
    assert found["memory_mb_used"] == 3071 - 1400
    assert found["vcpus_used"] == 1  # of the guest that runs; not domain 0's
    assert found["hypervisor_type"] == "Xen"
    assert found["hypervisor_version"] == 4017005
    assert {tuple(kind) for kind in found["supported_instances"]} == {
        ("i686", "xen", "hvm"),
        ("x86_64", "xen", "hvm"),
        ("x86_64", "xen", "xen"),
    }
    assert found["numa_topology"] is None


def test_domain_0_is_no_server(nova: xen_driver.SnowFlockXenDriver) -> None:
    for only_running, expected in ((True, [7]), (False, [7, -1])):
        domains = nova._host.list_instance_domains(only_running=only_running)
        assert [domain.ID() for domain in domains] == expected


def test_provider(nova: xen_driver.SnowFlockXenDriver) -> None:
    known = provider_tree.ProviderTree()
    known.new_root("xen1", SERVER)
    nova.update_provider_tree(known, "xen1")
    data = known.data("xen1")
    assert data.inventory["VCPU"]["total"] == 2
    assert data.inventory["MEMORY_MB"]["total"] == 3071
    assert "COMPUTE_STORAGE_BUS_VIRTIO" not in data.traits
    assert {"COMPUTE_NET_VIF_MODEL_NETFRONT", "CUSTOM_SNOWFLOCK_XEN"} <= data.traits


def test_server_that_was_suspended_is_deleted(nova: xen_driver.SnowFlockXenDriver) -> None:
    """libxl's driver refuses flags that it does not know, and to leave what is saved."""
    guest = Domain(-1)
    nova._delete_guest_configuration(libvirt_guest.Guest(guest), keep_vtpm=False, keep_nvram=False)
    assert guest.undefined_with == [libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE]


class Suspended:
    """A domain that libvirt has saved, of whose image libxl's driver does not tell."""

    def hasManagedSaveImage(self) -> bool:
        return True

    def managedSaveGetXMLDesc(self, _: int) -> None:
        Connection().managedSaveGetXMLDesc()


def test_server_that_was_suspended_is_resumed() -> None:
    assert driver._saved(Suspended()) is None
    driver._forget_layers(Suspended())


PARENT = """\
<domain type='xen' id='7'>
  <name>instance-00000002</name>
  <uuid>33333333-3333-4333-8333-333333333333</uuid>
  <memory unit='KiB'>262144</memory>
  <currentMemory unit='KiB'>262144</currentMemory>
  <vcpu placement='static'>2</vcpu>
  <os><type arch='x86_64' machine='xenpvh'>xenpvh</type><kernel>/parents/kernel</kernel></os>
  <clock offset='utc'/>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='none'/>
      <source file='/parents/disk'/>
      <target dev='xvda' bus='xen'/>
    </disk>
    <console type='pty'><target type='xen' port='0'/></console>
  </devices>
</domain>
"""
"""As libvirt describes it while it runs."""


def test_domain_of_a_clone(nova: xen_driver.SnowFlockXenDriver) -> None:
    """Its back end takes its part of what Nova would have it be."""
    own = etree.tostring(domain(nova, server(kernel_id=KERNEL)), encoding="unicode")
    parents = domain_xml.for_clones(domain_xml.parse(PARENT))
    clone = etree.fromstring(
        domain_xml.clone(parents, "instance-00000001", SERVER, own, {"xvda": "/own/disk"})
    )
    assert clone.findtext("os/kernel") == f"{CONF.instances_path}/{SERVER}/kernel"
    assert clone.findtext("uuid") == SERVER
    assert [disk.get("file") for disk in clone.iterfind("devices/disk/source")] == ["/own/disk"]
    [described] = clone.findall("metadata")
    assert described.find("{*}instance/{*}name") is not None


@pytest.mark.parametrize("vnc", [True, False])
def test_domain_of_an_hvm_guests_clone(nova: xen_driver.SnowFlockXenDriver, vnc: bool) -> None:
    CONF.set_override("enabled", vnc, "vnc")
    try:
        own = domain(nova, server())
    finally:
        CONF.clear_override("enabled", "vnc")
    assert domain_xml.refusal(own) is None
    screen = "<graphics type='vnc' port='5900'/><video><model type='vga' vram='16384'/></video>"
    parent = (
        PARENT.replace("machine='xenpvh'>xenpvh", "machine='xenfv'>hvm")
        .replace("<kernel>/parents/kernel</kernel>", "")
        .replace("</devices>", f"{screen if vnc else ''}</devices>")
    )
    clone = etree.fromstring(
        domain_xml.clone(
            domain_xml.for_clones(domain_xml.parse(parent)),
            "instance-00000001",
            SERVER,
            etree.tostring(own, encoding="unicode"),
            {"xvda": "/own/disk"},
        )
    )
    ports = [graphics.get("port") for graphics in clone.iterfind("devices/graphics")]
    assert ports == ([None] if vnc else [])
    assert len(clone.findall("devices/video")) == len(ports)


def test_image_that_asks_for_a_usb(nova: xen_driver.SnowFlockXenDriver) -> None:
    root = domain(nova, server(), hw_pointer_model="usbtablet")
    assert "on a USB" in str(domain_xml.refusal(root))


def test_live_migration_is_refused(nova: xen_driver.SnowFlockXenDriver) -> None:
    with pytest.raises(nova_exception.MigrationPreCheckError, match="not migrated live"):
        nova.check_can_live_migrate_source(None, server(), None)


def test_back_end_is_not_xens() -> None:
    with pytest.raises(nova_exception.InvalidConfiguration, match="hypervisor = xen"):
        xen_driver.SnowFlockXenDriver(None)


def test_uri(nova: xen_driver.SnowFlockXenDriver) -> None:
    assert nova._uri() == "xen:///system"


# Where the driver takes hold of Nova's own code. A Nova that has moved one of these fails here.


def source(of: object) -> str:
    return inspect.getsource(of)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("caller", "seam"),
    [
        (LIBVIRT.__init__, "self._uri("),
        (LIBVIRT._get_guest_config, "self._conf_non_lxc("),
        (LIBVIRT._get_guest_config, "self._get_guest_iothread("),
        (LIBVIRT._get_guest_config, "self._get_guest_storage_config("),
        (LIBVIRT._get_guest_config, "self._create_consoles(guest, "),
        (LIBVIRT._get_guest_config, "self._guest_add_video_device(guest)"),
        (LIBVIRT._get_guest_config, "self._guest_add_usb_root_controller("),
        (LIBVIRT._get_guest_config, "self._guest_add_spice_channel(guest)"),
        (LIBVIRT._add_video_driver, "self._get_video_type("),
        (LIBVIRT._undefine_domain, "self._delete_guest_configuration("),
        (LIBVIRT.get_available_resource, "self._host.get_memory_mb_used("),
        (LIBVIRT._get_vcpu_available, "self._host.get_online_cpus("),
        (libvirt_host.Host.list_guests, "self.list_instance_domains("),
    ],
)
def test_seam_is_called(caller: Callable[..., Any], seam: str) -> None:
    assert seam in source(caller)


def test_os_type_is_known_before_it_matters() -> None:
    steps = source(LIBVIRT._get_guest_config)
    order = [
        steps.index(f"self.{step}(")
        for step in (
            "_conf_non_lxc",
            "_set_features",
            "_create_consoles",
            "_guest_add_video_device",
        )
    ]
    assert order == sorted(order)


def test_host_is_made_as_nova_makes_it() -> None:
    made = source(LIBVIRT.__init__)
    assert (
        "self._host = host.Host(self._uri(), read_only,\n"
        "                               lifecycle_event_handler=self.emit_event,\n"
        "                               conn_event_handler=self._handle_conn_event)"
    ) in made
    # Nothing else keeps the first one.
    assert made.count("self._host)") == 1
    assert "libvirt_vif.LibvirtGenericVIFDriver(self._host)" in made


def test_default_bus_is_looked_up_where_it_is_replaced() -> None:
    assert "get_disk_bus_for_device_type(instance, virt_type," in source(blockinfo.get_disk_info)
    assert "blockinfo.get_disk_bus_for_device_type(" in source(LIBVIRT.default_root_device_name)
    assert "return CONF.libvirt.disk_prefix" in source(blockinfo.get_dev_prefix_for_disk_bus)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (xen_driver._disk_bus, xen_driver._novas_disk_bus),
        (xen_driver.SnowFlockXenDriver._conf_non_lxc, LIBVIRT._conf_non_lxc),
        (xen_driver.SnowFlockXenDriver._get_volume_config, LIBVIRT._get_volume_config),
    ],
)
def test_arguments_are_novas(ours: Callable[..., Any], theirs: Callable[..., Any]) -> None:
    assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters)
