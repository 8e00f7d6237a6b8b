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


def machine(interfaces: int, ports: int, model: str = "pcie-root", further: str = "") -> str:
    """A machine whose first two ports and one function of its root are taken."""
    controllers = "".join(
        f"<controller type='pci' model='pcie-root-port' index='{number}'>"
        f"<address type='pci' bus='0x00' slot='0x02' function='{number}'/></controller>"
        for number in range(1, ports + 1)
    )
    return (
        f"<domain><devices><controller type='pci' index='0' model='{model}'/>{controllers}"
        "<disk><address type='pci' bus='0x01'/></disk><rng><address type='pci' bus='0x02'/></rng>"
        f"{'<interface/>' * interfaces}{further}</devices></domain>"
    )


@pytest.mark.parametrize(
    ("kind", "xml"),
    [
        ("hotplug", machine(0, 2)),
        ("hotplug", machine(1, 3)),
        ("hotplug", machine(2, 4)),
        ("hotplug", machine(1, 0, "pci-root")),
        ("hotplug", machine(1, 2, further="<controller type='pci' model='pcie-to-pci-bridge'/>")),
        ("none", machine(1, 2)),
    ],
)
def test_room(kind: str, xml: str) -> None:
    identity.check_room(server(kind), etree.fromstring(xml))


@pytest.mark.parametrize(("interfaces", "ports"), [(1, 2), (2, 3), (1, 0)])
def test_no_room(interfaces: int, ports: int) -> None:
    with pytest.raises(exception.CannotFork, match="num_pcie_ports"):
        identity.check_room(server(), etree.fromstring(machine(interfaces, ports)))
