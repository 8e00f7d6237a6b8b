# SPDX-License-Identifier: Apache-2.0
"""The versioned notifications ``instance.fork.start``, ``.end`` and ``.error``.

Nova's own event type and instance notification admit only the actions that Nova has.
"""

from __future__ import annotations

from nova import context as nova_context
from nova import objects
from nova import rpc
import nova.conf
from nova.notifications.objects import base
from nova.notifications.objects import exception as exception_payload
from nova.notifications.objects import instance as instance_payload
from nova.objects import base as nova_base
from nova.objects import fields
from oslo_log import log as logging

LOG = logging.getLogger(__name__)
CONF = nova.conf.CONF


@nova_base.NovaObjectRegistry.register_notification
class ForkEventType(base.NotificationObject):
    """``instance.fork`` in one of its phases."""

    VERSION = "1.0"
    fields = {"phase": fields.NotificationPhaseField()}  # noqa: RUF012

    def to_notification_event_type_field(self) -> str:
        """What consumers see."""
        return f"instance.fork.{self.phase}"


@nova_base.NovaObjectRegistry.register_notification
class InstanceForkPayload(instance_payload.InstanceActionPayload):
    """The parent, the fork and, once there are any, its clones."""

    VERSION = "1.0"
    fields = {  # noqa: RUF012
        "fork_id": fields.UUIDField(),
        "count": fields.IntegerField(),
        "clones": fields.ListOfStringsField(),
    }


@nova_base.NovaObjectRegistry.register_notification
class InstanceForkNotification(base.NotificationBase):
    """A server is, has been or could not be forked."""

    VERSION = "1.0"
    fields = {  # noqa: RUF012
        "event_type": fields.ObjectField("ForkEventType"),
        "payload": fields.ObjectField("InstanceForkPayload"),
    }


@rpc.if_notifications_enabled
def notify(
    context: nova_context.RequestContext,
    parent: objects.Instance,
    fork_id: str,
    count: int,
    phase: str,
    *,
    clones: tuple[str, ...] = (),
    error: Exception | None = None,
) -> None:
    """Tell whoever listens. A fork does not fail because nobody could be told.

    :param clones: the UUIDs of the servers that were created
    """
    fault, priority = None, fields.NotificationPriority.INFO
    if error is not None:
        fault = exception_payload.ExceptionPayload.from_exception(error)
        priority = fields.NotificationPriority.ERROR
    try:
        payload = InstanceForkPayload(context=context, instance=parent, fault=fault)
        payload.fork_id = fork_id
        payload.count = count
        payload.clones = list(clones)
        InstanceForkNotification(
            context=context,
            priority=priority,
            publisher=base.NotificationPublisher(
                host=CONF.host, source=fields.NotificationSource.API
            ),
            event_type=ForkEventType(phase=phase),
            payload=payload,
        ).emit(context)
    except Exception:
        LOG.exception("No notification of instance.fork.%s", phase, instance=parent)
