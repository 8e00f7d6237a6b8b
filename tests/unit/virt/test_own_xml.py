# SPDX-License-Identifier: Apache-2.0
"""What a clone takes from its own domain, and what stays its parent's."""

from lxml import etree
import pytest

from nova_snowflock import exception
from nova_snowflock.virt.qemu import own_xml

PARENT = """\
<domain>
  <metadata><who>parent</who></metadata>
  <memory unit='KiB'>524288</memory>
  <vcpu placement='static' cpuset='0-3'>2</vcpu>
  <os><type>hvm</type><kernel>/i/parent/kernel</kernel><cmdline>root=/dev/sda</cmdline></os>
  <on_crash>coredump-restart</on_crash>
  <genid>11111111-1111-1111-1111-111111111111</genid>
  <cputune><shares>1</shares></cputune>
  <memtune><hard_limit>1</hard_limit></memtune>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none' io='native' queues='4'/>
      <source file='/i/parent/disk' index='4'/><backingStore type='file' index='2'/>
      <target dev='vda' bus='virtio'/><alias name='virtio-disk0'/><address type='pci'/>
      <serial>parent</serial>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw'/><source file='/i/parent/disk.config'/>
      <target dev='sda' bus='sata'/><readonly/>
    </disk>
    <disk type='file' device='cdrom'><target dev='sdb' bus='sata'/><readonly/></disk>
    <interface type='bridge'>
      <mac address='52:54:00:00:00:01'/><source bridge='br-int'/><target dev='tap1'/>
      <virtualport type='openvswitch'><parameters interfaceid='1'/></virtualport>
      <model type='virtio'/><driver name='vhost' queues='2' rx_queue_size='512'/><mtu size='1450'/>
      <alias name='net0'/><address type='pci'/>
    </interface>
    <serial type='pty'>
      <source path='/dev/pts/3'/><log file='/i/parent/console.log'/><target port='0'/>
    </serial>
    <console type='pty'>
      <source path='/dev/pts/3'/><log file='/i/parent/console.log'/><target type='serial' port='0'/>
    </console>
    <channel type='unix'>
      <source mode='bind' path='/q/parent'/><target type='virtio' name='agent' state='connected'/>
    </channel>
    <channel type='spicevmc'><target type='virtio' name='spice'/></channel>
    <rng model='virtio'><backend model='random'>/dev/random</backend></rng>
    <graphics type='vnc' listen='10.0.0.1'><listen type='address' address='10.0.0.1'/></graphics>
  </devices>
</domain>
"""
OWN = """\
<domain>
  <metadata><who>clone</who></metadata>
  <memory>524288</memory>
  <os><type>hvm</type><kernel>/i/clone/kernel</kernel><cmdline>root=/dev/sda</cmdline></os>
  <vcpu placement='static' cpuset='4-7'>2</vcpu>
  <genid>22222222-2222-2222-2222-222222222222</genid>
  <cputune><shares>2</shares></cputune>
  <devices>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2' cache='writeback' discard='unmap' queues='1'/>
      <source file='/i/clone/disk'/><target dev='vda' bus='scsi'/>
    </disk>
    <disk type='file' device='cdrom'>
      <driver name='qemu' type='raw' cache='none'/><source file='/i/clone/disk.config'/>
      <target dev='sda' bus='sata'/><readonly/>
    </disk>
    <interface type='ethernet'>
      <mac address='52:54:00:00:00:02'/><target dev='tap2'/><model type='e1000'/>
      <driver name='qemu' queues='8'/><mtu size='1400'/><filterref filter='f'/>
    </interface>
    <serial type='tcp'>
      <source host='10.0.0.2' mode='bind' service='10000'/><protocol type='raw'/>
      <log file='/i/clone/console.log'/>
    </serial>
    <channel type='spicevmc'><target type='virtio' name='spice'/></channel>
    <channel type='unix'>
      <source mode='bind' path='/q/clone'/><target type='virtio' name='agent'/>
    </channel>
    <rng model='virtio'><rate bytes='9'/><backend model='random'>/dev/urandom</backend></rng>
    <graphics type='vnc' listen='10.0.0.2'><listen type='address' address='10.0.0.2'/></graphics>
  </devices>
</domain>
"""
DISKS = {"vda": "/i/clone/disk"}


def merged(
    parent: str = PARENT, own: str | None = OWN, disks: dict[str, str] = DISKS
) -> etree._Element:
    root = etree.fromstring(parent)
    own_xml.merge(root, None if own is None else etree.fromstring(own), disks)
    return root


def attributes(root: etree._Element, path: str) -> dict[str, str]:
    element = root.find(path)
    assert element is not None, path
    return {str(name): str(value) for name, value in element.attrib.items()}


def test_domain() -> None:
    root = merged()
    assert root.findtext("metadata/who") == "clone"
    assert root.findtext("genid") == "22222222-2222-2222-2222-222222222222"
    assert attributes(root, "vcpu")["cpuset"] == "4-7"
    assert root.findtext("cputune/shares") == "2"
    assert root.find("memtune") is None
    assert attributes(root, "devices/graphics")["listen"] == "10.0.0.2"
    assert attributes(root, "devices/graphics/listen")["address"] == "10.0.0.2"


def test_boot() -> None:
    root = merged()
    assert root.findtext("os/kernel") == "/i/clone/kernel"
    assert root.findtext("os/type") == "hvm"
    # libvirt's default.
    assert root.find("on_crash") is None


def test_character_devices() -> None:
    root = merged()
    assert attributes(root, "devices/serial") == {"type": "tcp"}
    assert attributes(root, "devices/serial/source")["service"] == "10000"
    assert attributes(root, "devices/serial/log") == {"file": "/i/clone/console.log"}
    assert attributes(root, "devices/serial/target") == {"port": "0"}
    assert root.find("devices/console") is None
    agent, spice = root.findall("devices/channel")
    assert attributes(agent, "source") == {"mode": "bind", "path": "/q/clone"}
    assert attributes(agent, "target")["state"] == "connected"
    assert spice.get("type") == "spicevmc"


def test_character_device_without_a_counterpart() -> None:
    """It leads nowhere."""
    root = merged(own=OWN.replace("channel", "sound"))
    agent = root.find("devices/channel")
    assert agent is not None
    assert attributes(root, "devices/channel") == {"type": "null"}
    assert [str(element.tag) for element in agent] == ["target"]


def test_two_channels_of_one_name() -> None:
    again = "<channel type='file'><source path='/q/clone'/><target name='agent'/></channel>"
    root = merged(PARENT.replace("</devices>", f"{again}</devices>"))
    assert [one.get("type") for one in root.iterfind("devices/channel")] == [
        *("unix", "spicevmc", "null")
    ]


def test_random_numbers() -> None:
    root = merged()
    assert root.findtext("devices/rng/backend") == "/dev/urandom"
    assert attributes(root, "devices/rng/rate") == {"bytes": "9"}


@pytest.mark.parametrize("own", ["graphics type='spice'", None])
def test_graphics_are_its_own(own: str | None) -> None:
    """The parent's host does not say where this host listens, or what draws."""
    drawn = "<graphics type='egl-headless'/><graphics type='dbus' address='tcp:host=1'/>"
    theirs = PARENT.replace("</devices>", f"{drawn}</devices>")
    root = merged(theirs, OWN.replace("graphics type='vnc'", own) if own else without_graphics())
    kinds = [graphics.get("type") for graphics in root.iterfind("devices/graphics")]
    assert kinds == (["spice"] if own else [])


def without_graphics() -> str:
    root = etree.fromstring(OWN)
    for devices in root.iterfind("devices"):
        for graphics in devices.findall("graphics"):
            devices.remove(graphics)
    return etree.tostring(root, encoding="unicode")


def test_devices_that_are_the_hosts_matter() -> None:
    more = (
        "<audio id='7' type='spice' serverName='x'><input/></audio>"
        "<watchdog model='i6300esb' action='dump'/>"
        "<video><model type='virtio'><acceleration accel3d='yes'/></model></video>"
    )
    memory = "<memoryBacking><locked/><allocation mode='immediate'/></memoryBacking>"
    features = "<features><acpi/><tcg><tb-cache unit='GiB'>64</tb-cache></tcg></features>"
    parent = PARENT.replace("</devices>", f"{more}</devices>{memory}{features}")
    root = merged(parent)
    assert attributes(root, "devices/audio") == {"id": "7", "type": "none"}
    assert attributes(root, "devices/watchdog")["action"] == "none"
    assert root.find("devices/video/model/acceleration") is None
    assert root.find("memoryBacking") is None
    assert [str(element.tag) for element in root.iterfind("features/*")] == ["acpi"]

    root = merged(parent, OWN.replace("</domain>", f"{memory}</domain>"))
    assert [str(element.tag) for element in root.iterfind("memoryBacking/*")] == ["locked"]


@pytest.mark.parametrize(
    "element",
    [
        "<sound><file>/etc/shadow</file></sound>",
        "<rng><backend model='random'>/dev/urandom</backend><x/>/etc</rng>",
        "<input type='virtio'><source dev='etc/shadow'/></input>",
        "<controller><driver>//</driver></controller>",
        "<tpm><a><b><c d='&#47;etc'/></b></a></tpm>",
    ],
)
def test_path_that_only_the_parents_host_names(element: str) -> None:
    with pytest.raises(exception.SpawnFailed, match="the clone's own domain does not"):
        merged(PARENT.replace("</devices>", f"{element}</devices>"))


def test_empty_drive_has_nothing_of_a_host() -> None:
    below = "<backingStore type='file'><format type='raw'/><source file='etc'/></backingStore>"
    further = f"{below}<iotune/><encryption><secret uuid='1'/></encryption><mirror/>"
    parent = PARENT.replace("<target dev='sdb' bus='sata'/>", f"<target dev='sdb'/>{further}")
    for root in (merged(parent), merged(parent, OWN)):
        empty = root.findall("devices/disk")[2]
        assert [str(element.tag) for element in empty] == ["target", "readonly"]


def test_parts_of_a_device_are_there_once() -> None:
    again = "<driver name='qemu' type='raw'/><acceleration rendernode='x'/></disk>"
    tuned = "<tune><sndbuf>0</sndbuf></tune><coalesce/><driver queues='1'/></interface>"
    video = "<video><acceleration rendernode='x'/><model type='vga'/><model type='qxl'/></video>"
    parent = PARENT.replace("</disk>", again, 1).replace("</interface>", tuned)
    root = merged(parent.replace("</devices>", f"{video}</devices>"))
    for path, tags in (
        ("devices/disk", ["driver", "target", "alias", "address", "serial", "source"]),
        ("devices/interface", ["model", "driver", "mtu", "alias", "address", "mac"]),
        ("devices/video", ["model"]),
    ):
        found = root.find(path)
        assert found is not None
        assert [str(element.tag) for element in found][: len(tags)] == tags
        assert found.find("acceleration") is None
        assert found.find("tune") is None


def test_interface_without_a_mtu_of_its_own() -> None:
    root = merged(PARENT.replace("1450", "68"), OWN.replace("<mtu size='1400'/>", ""))
    assert attributes(root, "devices/interface/mtu") == {"size": "1500"}


def test_threads_of_iothreads() -> None:
    pool = "<iothreadids><iothread id='1' thread_pool_min='9'><poll/></iothread></iothreadids>"
    root = merged(PARENT.replace("<genid>", f"{pool}<genid>"))
    assert attributes(root, "iothreadids/iothread") == {"id": "1"}


@pytest.mark.parametrize("text", ["metadata", "title", "description", "name"])
def test_texts_that_tenants_choose_allow_nothing(text: str) -> None:
    own = OWN.replace("</domain>", f"<{text}>/etc/shadow</{text}></domain>")
    theirs = PARENT.replace("</devices>", "<sound><x y='/etc/shadow'/></sound></devices>")
    with pytest.raises(exception.SpawnFailed, match="names /etc/shadow"):
        merged(theirs, own)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (">2<", ">3<", "3 of processors, its clone may have 2"),
        (">2<", "><", "not a number"),
        (">524288<", ">524289<", "524289 of memory"),
        ("'KiB'", "'GiB'", "of memory, its clone may"),
        ("'KiB'", "'KB'", "no size of memory"),
        ("<memory unit='KiB'>524288</memory>", "", "no size of memory"),
        ("<genid>", "<iothreads>3</iothreads><genid>", "3 of iothreads"),
        ("<domain>", "<domain type='qemu'>", "one of qemu"),
        ("<genid>", "<cpu mode='host-passthrough'/><genid>", "host-passthrough"),
        ("<genid>", f"<iothreadids>{'<iothread/>' * 3}</iothreadids><genid>", "3 of iothreads"),
        ("queues='4'", "queues='9'", "9 of queues, its clone may have 8"),
        (
            "<genid>",
            "<cpu mode='custom'><feature policy='force' name='vmx'/></cpu><genid>",
            "vmx.*may not",
        ),
        ("<genid>", "<features><pmu state='on'/></features><genid>", "pmu.*may not"),
        ("<serial ", "<video/><video/><serial ", "more displays"),
        ("<serial ", "<video><model vram64='65537'/></video><serial ", "65537 KiB for its display"),
    ],
)
def test_more_than_it_may_have(old: str, new: str, reason: str) -> None:
    with pytest.raises(exception.SpawnFailed, match=reason):
        merged(PARENT.replace(old, new, 1))


def test_as_much_as_it_may_have() -> None:
    more = "<iothreads>2</iothreads><cpu mode='maximum'/>"
    video = "<video><model type='qxl' vram='131072'/></video>"
    merged(
        PARENT.replace("</devices>", f"{video}</devices>{more}"),
        OWN.replace("</devices>", f"{video}</devices><cpu mode='maximum'/>"),
    )


def test_disk() -> None:
    root = merged()
    assert attributes(root, "devices/disk/source") == {"file": "/i/clone/disk"}
    assert attributes(root, "devices/disk/driver") == {
        **{"name": "qemu", "type": "qcow2", "cache": "writeback", "discard": "unmap"},
        "queues": "4",
    }
    assert attributes(root, "devices/disk/target") == {"dev": "vda", "bus": "virtio"}
    assert attributes(root, "devices/disk/alias") == {"name": "virtio-disk0"}
    assert root.findtext("devices/disk/serial") == "parent"
    assert root.find("devices/disk/backingStore") is None


def test_disk_without_an_own_domain() -> None:
    only_disk = etree.fromstring(PARENT)
    devices = only_disk.find("devices")
    assert devices is not None
    for element in devices.findall("interface") + devices.findall("disk")[1:]:
        devices.remove(element)
    root = merged(etree.tostring(only_disk, encoding="unicode"), None)
    assert attributes(root, "devices/disk/source") == {"file": "/i/clone/disk"}
    assert attributes(root, "devices/disk/driver")["cache"] == "none"
    assert attributes(root, "devices/disk/driver")["type"] == "qcow2"


def test_read_only_disk() -> None:
    root = merged()
    disk = root.findall("devices/disk")[1]
    assert attributes(disk, "source") == {"file": "/i/clone/disk.config"}
    assert attributes(disk, "driver") == {"name": "qemu", "type": "raw", "cache": "none"}
    assert len(root.findall("devices/disk")) == 3


def test_interface() -> None:
    root = merged()
    assert attributes(root, "devices/interface") == {"type": "ethernet"}
    interface = root.find("devices/interface")
    assert interface is not None
    assert attributes(interface, "target") == {"dev": "tap2"}
    assert attributes(interface, "filterref") == {"filter": "f"}
    assert interface.find("source") is None
    assert interface.find("virtualport") is None
    assert attributes(interface, "mac") == {"address": "52:54:00:00:00:02"}
    # What the guest sees.
    assert attributes(interface, "model") == {"type": "virtio"}
    assert attributes(interface, "alias") == {"name": "net0"}
    assert attributes(interface, "driver") == {
        **{"name": "qemu", "queues": "2"},
        "rx_queue_size": "512",
    }
    assert attributes(interface, "mtu") == {"size": "1400"}


@pytest.mark.parametrize(
    ("parent", "own", "disks", "reason"),
    [
        (PARENT, None, DISKS, "own domain has no disk sda"),
        (PARENT, OWN, {}, "No file is named for the clone's disk vda"),
        (PARENT, OWN.replace("dev='vda'", "dev='vdb'"), DISKS, "has no disk vda"),
        (PARENT.replace("dev='sda'", "dev='sdc'"), OWN, DISKS, "has no disk sdc"),
        (PARENT.replace("<source file='/i/parent/disk.config'/>", ""), OWN, DISKS, "disk sda"),
        (PARENT, OWN.replace("interface", "sound"), DISKS, "0 network interfaces, its parent 1"),
        (PARENT, OWN.replace("ethernet", "vhostuser"), DISKS, "type vhostuser"),
    ],
)
def test_refused(parent: str, own: str | None, disks: dict[str, str], reason: str) -> None:
    with pytest.raises(exception.SpawnFailed, match=reason):
        merged(parent, own, disks)


def test_interfaces_that_will_be_unplugged() -> None:
    """Of whatever kind and number its own are: libvirt makes devices that lead nowhere."""
    root = etree.fromstring(PARENT)
    own_xml.merge(root, etree.fromstring(OWN.replace("interface", "sound")), DISKS, replaced=True)
    interface = root.find("devices/interface")
    assert interface is not None
    assert attributes(root, "devices/interface") == {"type": "ethernet"}
    assert {str(element.tag) for element in interface} == {
        *("mac", "model", "driver", "mtu", "alias", "address")
    }
    assert attributes(interface, "driver")["name"] == "qemu"
    assert attributes(interface, "mac") == {"address": "52:54:00:00:00:01"}


def test_interface_without_an_own_domain() -> None:
    parent = "<domain><devices><interface type='bridge'/></devices></domain>"
    with pytest.raises(exception.SpawnFailed, match="nothing to be connected to"):
        merged(parent, None)
    merged(parent.replace("bridge", "user"), None)
