# SPDX-License-Identifier: Apache-2.0
"""XML of libvirt's domains, which may come from another host."""

import copy

from lxml import etree

from nova_snowflock import exception


def parse(xml: str) -> etree._Element:
    """The root of a domain's XML.

    :raises InvalidDomain: it is not one, or has a document type
    """
    if "<!DOCTYPE" in xml:
        raise exception.InvalidDomain("The domain's XML has a document type, which none may have")
    parser = etree.XMLParser(
        resolve_entities=False,
        no_network=True,
        load_dtd=False,
        remove_blank_text=False,
        # libvirt reads texts as if these were not there; so does this.
        remove_comments=True,
        remove_pis=True,
    )
    try:
        root = etree.fromstring(xml.encode(), parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise exception.InvalidDomain(f"The domain's XML is not well-formed: {error}") from error
    if root.tag != "domain":
        raise exception.InvalidDomain(f"The domain's XML describes a {root.tag}")
    return root


def replace(parent: etree._Element, own: etree._Element, tag: str) -> None:
    """Have an element have the children of that tag that the own one has, and no others."""
    for element in parent.findall(tag):
        parent.remove(element)
    for element in own.findall(tag):
        parent.append(copy.deepcopy(element))


def take_attributes(element: etree._Element, own: etree._Element, names: tuple[str, ...]) -> None:
    """Have an element have those attributes as the own one has them, or not at all."""
    for name in names:
        element.attrib.pop(name, "")
        value = own.get(name)
        if value is not None:
            element.set(name, value)
