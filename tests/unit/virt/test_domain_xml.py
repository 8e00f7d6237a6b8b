# SPDX-License-Identifier: Apache-2.0
"""A clone's XML, derived from that of a real guest; guests that cannot be forked."""

from lxml import etree
import pytest

from nova_snowflock import exception
from nova_snowflock.virt import libvirt_xml
from nova_snowflock.virt.qemu import domain_xml
from tests.unit import virt

NAME = "instance-0000002a"
UUID = "22222222-2222-4222-8222-222222222222"
MEMORY = "/run/nova-snowflock/6f0c4e9e-3a39-4c0b-9a4e-1f6f2d2f7d10/mount/memory"


def parent() -> etree._Element:
    return etree.fromstring(virt.text("migratable.xml"))


def as_clone(xml: str) -> etree._Element:
    return etree.fromstring(domain_xml.clone(xml, NAME, UUID, MEMORY, 512 << 20))


@pytest.fixture(scope="module")
def clone() -> etree._Element:
    return as_clone(domain_xml.portable(virt.text("migratable.xml"), virt.text("live.xml")))


def test_a_real_guest_can_be_forked() -> None:
    assert domain_xml.refusal(libvirt_xml.parse(virt.text("migratable.xml"))) is None


def test_identity(clone: etree._Element) -> None:
    assert clone.findtext("name") == NAME
    assert clone.findtext("uuid") == UUID
    entries = {entry.get("name"): entry.text for entry in clone.iterfind("sysinfo//entry")}
    assert entries == {"manufacturer": "OpenStack Foundation", "serial": UUID, "uuid": UUID}
    assert clone.get("id") is None


def test_nothing_of_the_parent_is_left(clone: etree._Element) -> None:
    text = etree.tostring(clone, encoding="unicode")
    assert str(parent().findtext("uuid")) not in text
    assert "parent" not in text


def test_generation_id_is_new(clone: etree._Element) -> None:
    again = as_clone(virt.text("migratable.xml"))
    ids = {element.findtext("genid") for element in (clone, again, parent())}
    assert len(ids) == 3


def test_generation_id_is_not_added() -> None:
    root = parent()
    genid = root.find("genid")
    assert genid is not None
    root.remove(genid)
    assert as_clone(etree.tostring(root, encoding="unicode")).find("genid") is None


def test_machine_and_devices_are_the_parents(clone: etree._Element) -> None:
    assert domain_xml.machine_type(clone) == domain_xml.machine_type(parent()) == "pc-q35-7.2"
    for path in (".//address", ".//controller", ".//model", "cpu", "vcpu", "memory", "features"):
        assert [etree.tostring(element, method="c14n").strip() for element in clone.iterfind(path)]
        assert [element.attrib for element in clone.iterfind(path)] == [
            element.attrib for element in parent().iterfind(path)
        ]


def test_metadata_is_kept(clone: etree._Element) -> None:
    name = "metadata/{http://openstack.org/xmlns/libvirt/nova/1.1}instance/*"
    assert clone.findtext(name) == "web"


def test_host_files_are_the_clones_own(clone: etree._Element) -> None:
    source = clone.find("devices/serial/source")
    log = clone.find("devices/serial/log")
    assert source is not None
    assert source.get("path") == f"/var/lib/libvirt/qemu/{NAME}.console"
    assert log is not None
    assert log.get("file") == f"/var/lib/libvirt/qemu/{UUID}.log"
    assert clone.findall("devices/channel/source[@path]") == []


def test_memory_is_the_images(clone: etree._Element) -> None:
    namespace = "{http://libvirt.org/schemas/domain/qemu/1.0}"
    arguments = clone.findall(f"{namespace}commandline/{namespace}arg")
    assert [argument.get("value") for argument in arguments] == [
        "-object",
        f"memory-backend-file,id=snowflock-ram,size=536870912,mem-path={MEMORY},share=off,"
        "x-use-canonical-path-for-ramblock-id=off",
        "-machine",
        "memory-backend=snowflock-ram",
    ]


def test_a_clone_is_forked_as_its_parent(clone: etree._Element) -> None:
    assert domain_xml.memory_file(clone) == MEMORY
    assert domain_xml.memory_file(parent()) is None
    text = etree.tostring(clone, encoding="unicode")
    root = etree.fromstring(domain_xml.portable(text, text))
    assert domain_xml.memory_file(root) is None
    assert domain_xml.refusal(root) is None


@pytest.mark.parametrize(
    "fragment",
    [
        "<qemu:commandline xmlns:qemu='{}'><qemu:arg value='-snapshot'/></qemu:commandline>",
        "<qemu:commandline xmlns:qemu='{}'><qemu:env name='A' value='B'/></qemu:commandline>",
    ],
)
def test_other_arguments_are_refused(clone: etree._Element, fragment: str) -> None:
    namespace = "http://libvirt.org/schemas/domain/qemu/1.0"
    for root in (parent(), etree.fromstring(etree.tostring(clone))):
        root.append(etree.fromstring(fragment.format(namespace)))
        text = etree.tostring(root, encoding="unicode")
        reason = domain_xml.refusal(etree.fromstring(domain_xml.portable(text, text)))
        assert "libvirt knows nothing of" in str(reason)


def test_fixed_ports_become_free_ones() -> None:
    xml = virt.text("live.xml").replace("autoport='yes'", "autoport='no' websocket='5700'")
    graphics = as_clone(xml).find("devices/graphics")
    assert graphics is not None
    assert graphics.get("autoport") == "yes"
    assert graphics.get("port") is None
    assert graphics.get("websocket") is None


def test_labels_of_the_host_go() -> None:
    assert etree.fromstring(virt.text("live.xml")).find("seclabel") is not None
    assert as_clone(virt.text("live.xml")).find("seclabel") is None


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/instances/11111111-1111/console.log", "/instances/22/console.log"),
        ("/log/web.log", "/log/clone.log"),
        ("/log/web/web.log", "/log/clone/clone.log"),
        ("/log/web-1.log", "/log/web-1.log.clone"),
        ("/log/webs", "/log/webs.clone"),
        ("/dev/console", "/dev/console.clone"),
    ],
)
def test_no_path_is_shared(path: str, expected: str) -> None:
    assert domain_xml.own_path(path, "web", "11111111-1111", "clone", "22") == expected


def test_processor_is_the_live_one() -> None:
    asked, actual = "<cpu mode='maximum' check='none'/>", "<cpu><model>EPYC</model></cpu>"
    migratable, live = virt.text("migratable.xml"), virt.text("live.xml")
    assert asked in migratable
    assert asked in live
    root = etree.fromstring(
        domain_xml.portable(
            migratable.replace(asked, "<cpu mode='host-model'/>"), live.replace(asked, actual)
        )
    )
    assert domain_xml.cpu(root) == actual


@pytest.mark.parametrize(
    ("fragment", "reason"),
    [
        ("<interface type='hostdev'/>", "network interface of type hostdev"),
        ("<interface type='vhostuser'/>", "network interface of type vhostuser"),
        ("<interface type='direct'/>", "network interface of type direct"),
        ("<interface type='bridge'><teaming type='persistent'/></interface>", "teamed"),
        ("<hostdev mode='subsystem' type='mdev'/>", "host device"),
        ("<tpm model='tpm-crb'/>", "TPM"),
        ("<memory model='nvdimm'/>", "memory devices"),
        ("<filesystem type='mount'/>", "file system"),
        ("<shmem name='x'/>", "shared with the host"),
        ("<vsock model='virtio'/>", "vsock"),
        ("<redirdev bus='usb'/>", "redirdev"),
        (
            "<input type='evdev'><source dev='/dev/input/event1'/></input>",
            "input device of the host",
        ),
        ("<newdevice/>", "newdevice"),
        ("<serial type='tcp'/>", "only one guest can have"),
        ("<serial type='unix'><source mode='connect' path='/x'/></serial>", "connected"),
        ("<video><driver name='vhostuser'/></video>", "vhost-user"),
        ("<rng><backend model='egd' type='unix'/></rng>", "come from a socket"),
        ("<audio type='file' path='/x'/>", "played on this host"),
        (
            "<channel type='pty'><target type='guestfwd' address='10.0.2.9'/></channel>",
            "address of its network",
        ),
        ("<interface type='bridge'><model type='x,y'/></interface>", "of the model x,y"),
        ("<controller type='pci' index='2147483646'/>", "whose index is 2147483646"),
        ("<controller type='usb' index='0' ports=' 9999'/>", "whose ports is  9999"),
        (
            "<disk><address type='drive' controller='2000000000'/></disk>",
            "controller is 2000000000",
        ),
        ("<interface><driver queues='+999'/></interface>", "whose queues is +999"),
        ("<audio type='pulseaudio'/>", "played on this host"),
        ("<sound model='es1370'><rom file='/x'/></sound>", "ROM is a file"),
    ],
)
def test_refused_devices(fragment: str, reason: str) -> None:
    root = parent()
    devices = root.find("devices")
    assert devices is not None
    devices.append(etree.fromstring(fragment))
    assert reason in str(domain_xml.refusal(root))


DISK = """<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
<source file='/i/1/disk'/><target dev='vda' bus='virtio'/></disk>"""


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("</domain>", "<keywrap/></domain>", "a part keywrap"),
        ("</domain>", "<maxMemory slots='9'>9</maxMemory></domain>", "a part maxMemory"),
        ("</domain>", "<bootloader>/x</bootloader></domain>", "a part bootloader"),
        ("</domain>", "<memoryBacking><hugepages/></memoryBacking></domain>", "huge pages"),
        ("</domain>", "<pm/><pm/></domain>", "parts pm"),
        ("</domain>", "<devices/></domain>", "2 parts devices"),
        ("<devices>", "<devices xmlns:x='u' x:y='z'>", "other namespaces in its part devices"),
        ("<devices>", "<devices><x:disk xmlns:x='u'/>", "in its part devices"),
        ("<devices>", "<devices xmlns='u'>", "a part {u}devices"),
        ("<domain ", "<domain xmlns:x='u' x:type='qemu' ", "attributes of other namespaces"),
        ("</vcpu>", "<x/>6</vcpu>", "more than text in its part vcpu"),
    ],
)
def test_what_libvirt_could_read_differently(old: str, new: str, reason: str) -> None:
    text = etree.tostring(parent(), encoding="unicode")
    assert text.count(old) == 1
    assert reason in str(domain_xml.refusal(libvirt_xml.parse(text.replace(old, new))))


def test_too_many_devices() -> None:
    root = parent()
    for devices in root.iterfind("devices"):
        for _ in range(256):
            etree.SubElement(devices, "sound")
    assert "more than 256 devices" in str(domain_xml.refusal(root))


def test_comments_are_not_read() -> None:
    root = libvirt_xml.parse("<domain><vcpu>1<!-- --><?x y?>6</vcpu></domain>")
    assert root.findtext("vcpu") == "16"
    assert domain_xml.text(root) == "<domain><vcpu>16</vcpu></domain>"


def test_firmware_that_reads_a_file() -> None:
    root = parent()
    blob = "<sysinfo type='fwcfg'><entry name='opt/x' file='/x'/></sysinfo>"
    root.append(etree.fromstring(blob))
    assert "fwcfg" in str(domain_xml.refusal(root))


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("type='file'", "type='network'", "volume of type network"),
        ("type='file'", "type='block'", "volume of type block"),
        ("file='/i/1/disk'", "protocol='rbd' name='p/v'", "no file"),
        ("type='file' device='disk'", "type='network' device='disk'", "not a file"),
        ("device='disk'", "device='floppy'", "is a floppy"),
        ("device='disk'", "device='lun'", "is a lun"),
        ("qcow2", "vmdk", "of the format vmdk"),
        ("<target", "<shareable/><target", "shared with other guests"),
        ("<target", "<transient/><target", "transient"),
        ("<target", "<encryption format='luks'/><target", "encrypted"),
        ("<target", "<backingStore type='network'/><target", "based on a network"),
        ("type='qcow2'", "type='qcow2' copy_on_read='on'", "copies"),
        ("type='qcow2'/>", "type='qcow2'><metadata_cache/></driver>", "cache"),
        ("name='qemu'", "name='phy'", "not served by QEMU"),
        ("<source file='/i/1/disk'/>", "<source file='/x'><slices/></source>", "slice"),
    ],
)
def test_refused_disks(old: str, new: str, reason: str) -> None:
    root = parent()
    devices = root.find("devices")
    assert devices is not None
    assert DISK.replace(old, new) != DISK
    devices.append(etree.fromstring(DISK.replace(old, new)))
    assert reason in str(domain_xml.refusal(root))


@pytest.mark.parametrize(
    "fragment",
    [
        DISK,
        "<disk type='file' device='cdrom'><target dev='sda'/><readonly/></disk>",
        "<disk type='file' device='cdrom'><source file='/c'/><target dev='sda'/><readonly/></disk>",
        "<interface type='bridge'/>",
        "<interface type='ethernet'/>",
        "<interface type='network'/>",
    ],
)
def test_accepted_devices(fragment: str) -> None:
    root = parent()
    devices = root.find("devices")
    assert devices is not None
    devices.append(etree.fromstring(fragment))
    assert domain_xml.refusal(root) is None


@pytest.mark.parametrize(
    ("fragment", "reason"),
    [
        ("<memoryBacking><hugepages/></memoryBacking>", "huge pages"),
        ("<memoryBacking><access mode='shared'/></memoryBacking>", "shared"),
        ("<memoryBacking><source type='memfd'/></memoryBacking>", "memfd"),
        ("<memoryBacking><source type='file'/></memoryBacking>", "file"),
        ("<launchSecurity type='sev'/>", "encrypted"),
    ],
)
def test_refused_memory(fragment: str, reason: str) -> None:
    root = parent()
    root.append(etree.fromstring(fragment))
    assert reason in str(domain_xml.refusal(root))


def test_refused_numa_nodes() -> None:
    root = parent()
    cpu = root.find("cpu")
    assert cpu is not None
    etree.SubElement(cpu, "numa")
    assert "NUMA" in str(domain_xml.refusal(root))


def test_refused_variable_store() -> None:
    root = parent()
    os_element = root.find("os")
    assert os_element is not None
    etree.SubElement(os_element, "nvram")
    assert "variable store" in str(domain_xml.refusal(root))


def test_refused_other_hypervisor() -> None:
    root = parent()
    root.set("type", "xen")
    assert "not a QEMU guest" in str(domain_xml.refusal(root))


@pytest.mark.parametrize(
    "xml",
    [
        "",
        "<domain",
        "<network/>",
        "<!DOCTYPE domain [<!ENTITY a 'b'>]><domain>&a;</domain>",
        "<domain>\0</domain>",
    ],
)
def test_hostile_xml_is_refused(xml: str) -> None:
    with pytest.raises(exception.InvalidDomain):
        libvirt_xml.parse(xml)


def test_path_that_qemu_would_split() -> None:
    with pytest.raises(ValueError, match="comma"):
        domain_xml.clone(virt.text("migratable.xml"), NAME, UUID, "/run/a,b/memory", 4096)
