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
  <currentMemory>1</currentMemory>
  <vcpu>1</vcpu>
  <os><type machine='xenpvh'>xenpvh</type><kernel>/own/vmlinuz</kernel></os>
</domain>
"""


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


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("type='xen'", "type='qemu'", "of qemu"),
        ("machine='xenpvh'>xenpvh", "machine='xenfv'>hvm", "not a PVH guest"),
        ("machine='xenpvh'>xenpvh", "machine='xenpv'>linux", "not a PVH guest"),
        ("<memballoon", "<disk/><memballoon", "disks"),
        ("<memballoon", "<interface/><memballoon", "interfaces"),
        ("<memballoon", "<hostdev/><memballoon", "a host device"),
        ("<memballoon", "<controller type='usb'/><memballoon", "a controller"),
        ("<memballoon", "<tpm/><memballoon", "a device <tpm>"),
        ("<memballoon", "<console/>" * 256 + "<memballoon", "259 devices"),
    ],
)
def test_refusals(old: str, new: str, reason: str) -> None:
    root = domain_xml.parse(PARENT.replace(old, new))
    assert reason in str(domain_xml.refusal(root))


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
