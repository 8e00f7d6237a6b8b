# SPDX-License-Identifier: Apache-2.0
from lxml import etree
from nova import objects
import pytest

from nova_snowflock import exception
from nova_snowflock.virt import identity

objects.register_all()


def server(flavor: str | None = None, image: str | None = None) -> objects.Instance:
    specs = {} if flavor is None else {identity.PROPERTY: flavor}
    properties = {} if image is None else {"image_snowflock:identity": image}
    return objects.Instance(
        flavor=objects.Flavor(extra_specs=specs), system_metadata={"image_x": "1", **properties}
    )


@pytest.mark.parametrize(
    ("flavor", "image", "agent", "way"),
    [
        (None, None, False, "hotplug"),
        (None, None, True, "agent"),
        ("auto", None, False, "hotplug"),
        (None, "none", True, "none"),
        ("hotplug", "none", True, "hotplug"),
        ("none", "hotplug", False, "none"),
        ("agent", None, True, "agent"),
    ],
)
def test_way(flavor: str | None, image: str | None, agent: bool, way: str) -> None:
    assert identity.way(server(flavor, image), agent) == way


def test_unknown_way() -> None:
    with pytest.raises(exception.CannotFork, match="snowflock:identity=magic"):
        identity.chosen(server("magic"))


def test_agent_that_is_not_there() -> None:
    with pytest.raises(exception.CannotFork, match="no agent in its guest answers"):
        identity.way(server("agent"), False)


def check(
    parent: objects.Instance,
    domain: etree._Element,
    interfaces: int,
    *,
    agent: bool = False,
    allow_unseeded: bool = False,
) -> None:
    identity.check(parent, domain, interfaces, agent=agent, allow_unseeded=allow_unseeded)


def machine(ports: int, model: str = "pcie-root", further: str = "") -> etree._Element:
    """A machine whose first two ports and one function of its root are taken."""
    controllers = "".join(
        f"<controller type='pci' model='pcie-root-port' index='{number}'>"
        f"<address type='pci' bus='0x00' slot='0x02' function='{number}'/></controller>"
        for number in range(1, ports + 1)
    )
    return etree.fromstring(
        f"<domain><genid/><devices><controller type='pci' index='0' model='{model}'/>{controllers}"
        "<disk><address type='pci' bus='0x01'/></disk><rng><address type='pci' bus='0x02'/></rng>"
        f"{further}</devices></domain>"
    )


BRIDGE = "<controller type='pci' model='pcie-to-pci-bridge' index='9'/>"
FIXED = (
    "<controller type='pci' model='pcie-root-port' index='9'><target hotplug='off'/></controller>"
)


@pytest.mark.parametrize(
    ("kind", "domain", "interfaces"),
    [
        ("hotplug", machine(2), 0),
        ("hotplug", machine(3), 1),
        ("hotplug", machine(4), 2),
        ("hotplug", machine(0, "pci-root"), 1),
        ("none", machine(2), 1),
    ],
)
def test_room(kind: str, domain: etree._Element, interfaces: int) -> None:
    check(server(kind), domain, interfaces)


@pytest.mark.parametrize(
    ("domain", "interfaces"),
    [
        (machine(2), 1),
        (machine(3), 2),
        (machine(0), 1),
        # An interface of a q35 machine does not go into a conventional place.
        (machine(2, further=BRIDGE), 1),
        (machine(2, further=FIXED), 1),
    ],
)
def test_no_room(domain: etree._Element, interfaces: int) -> None:
    with pytest.raises(exception.CannotFork, match="num_pcie_ports"):
        check(server(), domain, interfaces)
    check(server(), domain, interfaces, agent=True)


@pytest.mark.parametrize("kind", ["hotplug", "none"])
def test_no_generation_id(kind: str) -> None:
    """Nothing would tell the guest's kernel that its random numbers are its parent's."""
    domain = machine(4)
    for genid in domain.findall("genid"):
        domain.remove(genid)
    with pytest.raises(exception.CannotFork, match="no generation ID"):
        check(server(kind), domain, 1)
    check(server(kind), domain, 0)
    with pytest.raises(exception.CannotFork, match="no generation ID"):
        check(server(kind), domain, 1, agent=True)
    check(server(), domain, 1, agent=True)
    check(server(kind), domain, 1, allow_unseeded=True)


def test_guest_of_xen() -> None:
    """Its interfaces are on a bus of Xen's, and if it is a PVH guest, it cannot have the ID."""
    domain = etree.fromstring("<domain type='xen'><devices/></domain>")
    with pytest.raises(exception.CannotFork, match="guests of Xen are given none"):
        check(server("hotplug"), domain, 1)
    check(server("hotplug"), domain, 1, allow_unseeded=True)
    check(server("hotplug"), domain, 0)
