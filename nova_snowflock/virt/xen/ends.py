# SPDX-License-Identifier: Apache-2.0
"""What becomes of a domain that has stopped by itself, as libvirt does it where it notices."""

import libvirt
from oslo_log import log as logging

from nova_snowflock.virt import libvirt_xml

LOG = logging.getLogger(__name__)

# By why it has stopped: the element that says what is to be done, and what is if it does not.
_ELEMENTS = {
    "poweroff": ("on_poweroff", "destroy"),
    "reboot": ("on_reboot", "restart"),
    "crash": ("on_crash", "destroy"),
}
_KEPT = "preserve"
_RESTARTS = ("restart", "rename-restart", "coredump-restart")


def end(connection: libvirt.virConnect, number: int, reason: str) -> None:
    """End a domain, or start it anew, as its XML says.

    :param number: Xen's of it; if there is no such domain any more, nothing is done
    :param reason: one of :func:`helper.stopped`
    :raises libvirtError: it cannot be done
    """
    try:
        domain = connection.lookupByID(number)
        xml = domain.XMLDesc(libvirt.VIR_DOMAIN_XML_SECURE | libvirt.VIR_DOMAIN_XML_INACTIVE)
    except libvirt.libvirtError as error:
        if error.get_error_code() == libvirt.VIR_ERR_NO_DOMAIN:
            return
        raise
    element, default = _ELEMENTS[reason]
    action = libvirt_xml.parse(xml).findtext(element) or default
    if action == _KEPT:
        return
    LOG.info("The guest %s has stopped (%s): %s", domain.name(), reason, action)
    is_persistent = domain.isPersistent()
    domain.destroy()
    if action not in _RESTARTS:
        return
    if is_persistent:
        domain.create()
    else:
        connection.createXML(xml)
