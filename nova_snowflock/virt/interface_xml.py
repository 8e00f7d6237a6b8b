# SPDX-License-Identifier: Apache-2.0
"""Network interfaces in a domain's XML: which can be forked, and which of its own a clone has."""

from collections.abc import Collection, Iterator
import dataclasses

from lxml import etree

from nova_snowflock import exception


@dataclasses.dataclass(frozen=True)
class Kinds:
    """Those that a hypervisor's guests can be forked with.

    :param types: libvirt's, by what they are connected to
    :param models: of devices
    """

    types: Collection[str]
    models: Collection[str]

    def refusal(self, interface: etree._Element) -> str | None:
        """Why a guest with this network interface cannot be forked, or None."""
        kind = interface.get("type")
        if kind not in self.types:
            return f"it has a network interface of type {kind}, which cannot be forked"
        if interface.find("teaming") is not None:
            return "it has a network interface that is teamed with another"
        for model in interface.iterfind("model"):
            if model.get("type") not in self.models:
                return f"it has a network interface of the model {model.get('type')}"
        return None

    def pairs(
        self, root: etree._Element, own: etree._Element | None
    ) -> Iterator[tuple[etree._Element, etree._Element]]:
        """A clone's network interfaces, each with that of its own domain.

        :raises SpawnFailed: there are more of one than of the other, or one cannot be a clone's
        """
        interfaces = root.findall("devices/interface")
        own_interfaces = [] if own is None else own.findall("devices/interface")
        if len(own_interfaces) != len(interfaces):
            raise exception.SpawnFailed(
                f"The clone's own domain has {len(own_interfaces)} network interfaces, its parent "
                f"{len(interfaces)}"
            )
        for interface, own_interface in zip(interfaces, own_interfaces, strict=True):
            reason = self.refusal(own_interface)
            if reason is not None:
                raise exception.SpawnFailed(f"The clone cannot be started: {reason}")
            yield interface, own_interface
