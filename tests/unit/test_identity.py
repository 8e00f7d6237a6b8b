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
    ("flavor", "image", "kind"),
    [
        (None, None, "hotplug"),
        ("auto", None, "hotplug"),
        (None, "none", "none"),
        ("hotplug", "none", "hotplug"),
        ("none", "hotplug", "none"),
    ],
)
def test_kind(flavor: str | None, image: str | None, kind: str) -> None:
    assert identity.kind_of(server(flavor, image)) == kind


def test_unknown_kind() -> None:
    with pytest.raises(exception.CannotFork, match="snowflock:identity=magic"):
        identity.kind_of(server("magic"))


def machine(ports: int, model: str = "pcie-root", further: str = "") -> etree._Element:
    """A machine whose first two ports and one function of its root are taken."""
    controllers = "".join(
        f"<controller type='pci' model='pcie-root-port' index='{number}'>"
        f"<address type='pci' bus='0x00' slot='0x02' function='{number}'/></controller>"
        for number in range(1, ports + 1)
    )
    return etree.fromstring(
        f"<domain><devices><controller type='pci' index='0' model='{model}'/>{controllers}"
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
    identity.check_room(server(kind), domain, interfaces)


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
        identity.check_room(server(), domain, interfaces)
