# SPDX-License-Identifier: Apache-2.0
"""What of a domain's XML a clone has."""

from lxml import etree
import pytest

from nova_snowflock import exception
from nova_snowflock.virt.xen import domain_xml

UUID = "22222222-2222-4222-8222-222222222222"
PARENT = """\
<domain type='xen' id='7'>
  <name>parent</name>
  <uuid>11111111-1111-4111-8111-111111111111</uuid>
  <memory unit='KiB'>262144</memory>
  <currentMemory unit='KiB'>262144</currentMemory>
  <vcpu placement='static'>2</vcpu>
  <os>
    <type arch='x86_64' machine='xenpvh'>xenpvh</type>
    <kernel>/guest/vmlinuz</kernel>
  </os>
  <clock offset='utc'/>
  <on_reboot>restart</on_reboot>
  <devices>
    <console type='pty' tty='/dev/pts/1'>
      <source path='/dev/pts/1'/>
      <target type='xen' port='0'/>
      <alias name='console0'/>
    </console>
    <controller type='xenbus' index='0'/>
    <memballoon model='xen'/>
  </devices>
</domain>
"""
OWN = """\
<domain type='xen'>
  <name>own</name>
  <uuid>22222222-2222-4222-8222-222222222222</uuid>
  <metadata><n:instance xmlns:n='http://example.org/'/></metadata>
  <memory>1</memory>
  <cputune/>
  <vcpu>1</vcpu>
  <os><type machine='xenpvh'>xenpvh</type><kernel>/own/vmlinuz</kernel></os>
  <devices></devices>
</domain>
"""

DISK = """<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
<source file='/i/1/disk'/><target dev='xvda' bus='xen'/></disk>"""
CDROM = """<disk type='file' device='cdrom'><driver name='file' type='raw'/>
<source file='/i/1/disk.config'/><target dev='xvdd' bus='xen'/><readonly/></disk>"""


def with_devices(xml: str, *devices: str) -> str:
    return xml.replace("</devices>", "".join(devices) + "</devices>")


def for_clones(xml: str = PARENT) -> str:
    return domain_xml.for_clones(domain_xml.parse(xml))


def test_what_is_the_parents_own_is_left_out() -> None:
    root = etree.fromstring(for_clones())
    assert root.get("id") is None
    [console] = root.findall("devices/console")
    assert console.get("tty") is None
    assert [part.tag for part in console] == ["target"]
    assert domain_xml.refusal(root) is None
    assert domain_xml.vcpus(root) == 2


def test_clone() -> None:
    root = etree.fromstring(domain_xml.clone(for_clones(), "clone", UUID))
    assert root.findtext("name") == "clone"
    assert root.findtext("uuid") == UUID
    assert root.findtext("memory") == "262144"
    assert root.findtext("os/kernel") == "/guest/vmlinuz"


def test_clone_boots_what_its_own_domain_says() -> None:
    root = etree.fromstring(domain_xml.clone(for_clones(), "clone", UUID, OWN))
    assert [kernel.text for kernel in root.iterfind("os/kernel")] == ["/own/vmlinuz"]
    assert root.find("metadata") is not None
    # The machine that its guest believes in is its parent's.
    assert root.findtext("memory") == "262144"
    assert root.findtext("vcpu") == "2"


def test_clone_runs_where_its_own_domain_does() -> None:
    pinned = "<cputune><vcpupin vcpu='0' cpuset='{}'/></cputune>"
    parent = PARENT.replace("<os>", pinned.format(7) + "<os>")
    parent = parent.replace("placement='static'", "placement='static' cpuset='7'")
    own = OWN.replace("<cputune/>", pinned.format(3)).replace("<vcpu>", "<vcpu cpuset='3'>")
    root = etree.fromstring(domain_xml.clone(for_clones(parent), "clone", UUID, own))
    [pin] = root.findall("cputune/vcpupin")
    assert pin.get("cpuset") == "3"
    [vcpu] = root.findall("vcpu")
    assert vcpu.items() == [("cpuset", "3")]
    anywhere = domain_xml.clone(for_clones(parent), "clone", UUID, OWN)
    assert etree.fromstring(anywhere).find("cputune/vcpupin") is None


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("type='xen'", "type='qemu'", "of qemu"),
        ("machine='xenpvh'>xenpvh", "machine='xenpv'>linux", "not a PVH or HVM guest"),
        ("<memballoon", "<disk/><memballoon", "its disk  is not one of Xen's"),
        ("<memballoon", "<interface type='user'/><memballoon", "interface of type user"),
        ("<memballoon", "<hostdev/><memballoon", "a host device"),
        ("<memballoon", "<controller type='usb'/><memballoon", "a controller"),
        ("<memballoon", "<tpm/><memballoon", "a device <tpm>"),
        ("<memballoon", "<console/>" * 256 + "<memballoon", "259 devices"),
    ],
)
def test_refusals(old: str, new: str, reason: str) -> None:
    root = domain_xml.parse(PARENT.replace(old, new))
    assert reason in str(domain_xml.refusal(root))


HVM = with_devices(
    PARENT.replace("machine='xenpvh'>xenpvh", "machine='xenfv'>hvm"),
    "<emulator>/theirs/qemu</emulator>",
    "<serial type='pty'><source path='/dev/pts/2'/><target port='0'/></serial>",
    "<input type='mouse' bus='ps2'/>",
    "<graphics type='vnc' port='5900' listen='192.0.2.1' passwd='theirs'/>",
    "<video><model type='vga' vram='16384'/></video>",
    "<controller type='ide' index='0'/>",
)
OWN_HVM = OWN.replace("machine='xenpvh'>xenpvh", "machine='xenfv'>hvm")


def test_hvm_guest() -> None:
    root = domain_xml.parse(HVM)
    assert domain_xml.machine(root) == domain_xml.HVM
    assert domain_xml.refusal(root) is None


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("<graphics type='spice'/>", "graphics of type spice"),
        ("<input type='tablet' bus='usb'/>", "an input device on a USB"),
        ("<video><model type='qxl'/></video>", "not cirrus or vga"),
        ("<video/>", "not cirrus or vga"),
        ("<video><model type='vga' vram='65536'/></video>", "65536 KiB of video memory"),
        ("<video><model type='vga' vram='-1'/></video>", "-1 KiB of video memory"),
        ("<controller type='usb'/>", "a controller of type usb"),
        ("<serial type='file'><source path='/etc/shadow'/></serial>", "a serial of type file"),
        ("<console type='unix'/>", "a console of type unix"),
        ("<sound model='ich6'/>", "a device <sound>"),
        ("<hostdev/>", "a host device"),
        (DISK.replace("xvda", "vda"), "its disk vda"),
        (DISK.replace("</disk>", "<readonly/></disk>"), "its disk xvda is read only"),
        ("<video><model type='vga' vram='9999999'/></video>", "9999999 KiB of video memory"),
        ("<interface type='bridge'><model type='virtio'/></interface>", "of the model virtio"),
    ],
)
def test_refusals_of_hvm_guests(device: str, reason: str) -> None:
    root = domain_xml.parse(with_devices(HVM, device))
    assert reason in str(domain_xml.refusal(root))


def test_screen_and_device_model_are_those_of_the_clones_host() -> None:
    own = with_devices(
        OWN_HVM,
        "<emulator>/own/qemu</emulator>",
        "<graphics type='vnc' autoport='yes' listen='192.0.2.2'/>",
        "<video><model type='cirrus'/></video>",
    )
    root = etree.fromstring(domain_xml.clone(for_clones(HVM), "clone", UUID, own))
    assert [emulator.text for emulator in root.iterfind("devices/emulator")] == ["/own/qemu"]
    [graphics] = root.findall("devices/graphics")
    assert graphics.get("listen") == "192.0.2.2"
    assert graphics.get("passwd") is None
    # These the guest sees.
    assert [model.get("type") for model in root.iterfind("devices/video/model")] == ["vga"]
    assert root.find("devices/input") is not None
    assert root.find("devices/serial/source") is None


def test_clone_has_no_screen_if_its_parent_has_none() -> None:
    own = with_devices(OWN, "<graphics type='vnc'/>")
    root = etree.fromstring(domain_xml.clone(for_clones(), "clone", UUID, own))
    assert root.find("devices/graphics") is None


def test_clone_without_its_own_domain_has_a_screen_of_its_own() -> None:
    root = etree.fromstring(domain_xml.clone(for_clones(HVM), "clone", UUID))
    assert root.find("devices/emulator") is None
    [graphics] = root.findall("devices/graphics")
    assert dict(graphics.attrib.items()) == {"type": "vnc", "autoport": "yes"}


def test_interface_is_of_the_parents_model() -> None:
    parent, own = (
        with_devices(xml, f"<interface type='bridge'><mac address='{mac}'/>{model}</interface>")
        for xml, mac, model in (
            (HVM, "02:00:00:00:00:01", "<model type='e1000'/>"),
            (OWN_HVM, "02:00:00:00:00:02", "<model type='netfront'/>"),
        )
    )
    root = etree.fromstring(domain_xml.clone(for_clones(parent), "clone", UUID, own))
    [interface] = root.findall("devices/interface")
    assert [(part.tag, *part.attrib.values()) for part in interface] == [
        ("mac", "02:00:00:00:00:02"),
        ("model", "e1000"),
    ]


@pytest.mark.parametrize(
    ("target", "bus"), [("hda", "ide"), ("sda", "scsi"), ("xvda", "xen"), ("xvdsd", "xen")]
)
def test_disk_that_was_emulated(target: str, bus: str) -> None:
    parent = with_devices(HVM, DISK.replace("dev='xvda' bus='xen'", f"dev='{target}' bus='{bus}'"))
    assert domain_xml.refusal(domain_xml.parse(parent)) is None
    clone = domain_xml.clone(for_clones(parent), "clone", UUID, disks={target: "/mine"})
    [found] = etree.fromstring(clone).findall("devices/disk/target")
    assert dict(found.attrib.items()) == {"dev": target, "bus": bus}


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (OWN, "of the machine type xenpvh"),
        (with_devices(OWN_HVM, "<graphics type='spice'/>"), "graphics of type spice"),
    ],
)
def test_own_domain_that_is_another_machine(own: str, message: str) -> None:
    with pytest.raises(exception.SpawnFailed, match=message):
        domain_xml.clone(for_clones(HVM), "clone", UUID, own)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<domain", "<!DOCTYPE domain [<!ENTITY e 'x'>]><domain"),
        ("<domain", "<network"),
        ("<name>parent</name>", ""),
        ("<name>parent</name>", "<name>parent</name><name>another</name>"),
        ("<clock", "<qemu:commandline xmlns:qemu='q'/><clock"),
        ("<clock", "<seclabel/><clock"),
        ("</domain>", ""),
    ],
)
def test_what_is_not_understood(old: str, new: str) -> None:
    with pytest.raises(exception.InvalidDomain):
        domain_xml.parse(PARENT.replace(old, new))


@pytest.mark.parametrize("count", ["", "0", "-1", "two", "9999"])
def test_processors(count: str) -> None:
    xml = PARENT.replace("'static'>2<", f"'static'>{count}<")
    with pytest.raises(exception.InvalidDomain):
        domain_xml.vcpus(domain_xml.parse(xml))


def test_disks() -> None:
    """A clone has layers of its own, and its own domain's read-only disks."""
    xml = for_clones(with_devices(PARENT, DISK, CDROM))
    own = with_devices(OWN, DISK, CDROM).replace("/i/1/", "/i/2/")
    clone = domain_xml.clone(xml, "clone", UUID, own, {"xvda": "/i/2/disk"})
    assert "/i/1/" not in clone
    disk, cdrom = domain_xml.parse(clone).findall("devices/disk")
    assert [dict(part.attrib) for part in disk] == [
        {"name": "qemu", "type": "qcow2"},
        {"file": "/i/2/disk"},
        {"dev": "xvda", "bus": "xen"},
    ]
    assert [source.get("file") for source in cdrom.iterfind("source")] == ["/i/2/disk.config"]
    assert domain_xml.refusal(domain_xml.parse(clone)) is None


@pytest.mark.parametrize(
    ("parents", "own", "disks", "reason"),
    [
        ([DISK], None, {}, "No file is named"),
        ([DISK], [], {"xvda": "/d"}, "has no disk xvda"),
        ([DISK, CDROM], None, {"xvda": "/d"}, "has no disk xvdd"),
        ([], [DISK], {"xvda": "/d"}, "has a disk xvda, which its parent has not"),
    ],
)
def test_disks_that_do_not_match(
    parents: list[str], own: list[str] | None, disks: dict[str, str], reason: str
) -> None:
    xml = for_clones(with_devices(PARENT, *parents))
    own_domain = None if own is None else with_devices(OWN, *own)
    with pytest.raises(exception.SpawnFailed, match=reason):
        domain_xml.clone(xml, "clone", UUID, own_domain, disks)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("name='qemu'", "name='phy'", "not served by QEMU"),
        ("name='qemu' ", "", "not served by QEMU"),
        ("qcow2", "raw", "not a qcow2 file"),
        ("xvda", "hda", "not one of Xen's"),
        ("xvda", "xvda/../x", "not one of Xen's"),
        ("type='file'", "type='block'", "a volume of type block"),
        ("<target", "<shareable/><target", "shared with other guests"),
    ],
)
def test_disks_that_cannot_be_forked(old: str, new: str, reason: str) -> None:
    root = domain_xml.parse(with_devices(PARENT, DISK.replace(old, new)))
    assert reason in str(domain_xml.refusal(root))


def test_read_only_disks_may_be_served_by_anything() -> None:
    assert domain_xml.refusal(domain_xml.parse(with_devices(PARENT, CDROM))) is None


NIC = """<interface type='bridge'><mac address='00:16:3e:00:00:01'/><source bridge='a'/>
<target dev='vif7.0'/><model type='netfront'/></interface>"""


def test_interfaces() -> None:
    """A clone has its own domain's."""
    xml = for_clones(with_devices(PARENT, NIC))
    own = with_devices(OWN, NIC.replace("00:01", "00:02").replace("'a'", "'b'"))
    [interface] = domain_xml.parse(domain_xml.clone(xml, "c", UUID, own)).findall(
        "devices/interface"
    )
    assert [mac.get("address") for mac in interface.iterfind("mac")] == ["00:16:3e:00:00:02"]
    assert [source.get("bridge") for source in interface.iterfind("source")] == ["b"]


@pytest.mark.parametrize(
    ("parents", "own", "reason"),
    [
        ([NIC], None, "has 0 network interfaces, its parent 1"),
        ([NIC], [NIC, NIC], "has 2 network interfaces, its parent 1"),
        ([NIC], [NIC.replace("type='bridge'", "type='user'")], "of type user"),
    ],
)
def test_interfaces_that_do_not_match(
    parents: list[str], own: list[str] | None, reason: str
) -> None:
    xml = for_clones(with_devices(PARENT, *parents))
    own_domain = None if own is None else with_devices(OWN, *own)
    with pytest.raises(exception.SpawnFailed, match=reason):
        domain_xml.clone(xml, "clone", UUID, own_domain)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("type='bridge'", "type='hostdev'", "of type hostdev"),
        ("netfront", "e1000", "of the model e1000"),
        ("<model", "<teaming type='persistent'/><model", "teamed"),
    ],
)
def test_interfaces_that_cannot_be_forked(old: str, new: str, reason: str) -> None:
    root = domain_xml.parse(with_devices(PARENT, NIC.replace(old, new)))
    assert reason in str(domain_xml.refusal(root))
