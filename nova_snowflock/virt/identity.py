# SPDX-License-Identifier: Apache-2.0
"""How a clone becomes itself: what its owner or its cloud's operator chose for the server."""

from nova import objects
from nova import utils

from nova_snowflock import exception

PROPERTY = "snowflock:identity"
"""Of a flavor or an image; the flavor's counts."""

AUTO = "auto"
HOTPLUG = "hotplug"
"""The clone's network interfaces are plugged into its guest, and its parent's out."""
NONE = "none"
"""The guest keeps its parent's interfaces, and is not heard with their addresses."""


def kind_of(instance: objects.Instance) -> str:
    """:data:`HOTPLUG` or :data:`NONE`.

    :param instance: a parent or a clone, with its flavor and system metadata
    :raises CannotFork: what was chosen is not known here
    """
    chosen = instance.flavor.extra_specs.get(PROPERTY) or instance.system_metadata.get(
        f"{utils.SM_IMAGE_PROP_PREFIX}{PROPERTY}", AUTO
    )
    if chosen in (HOTPLUG, NONE):
        return str(chosen)
    if chosen == AUTO:
        return HOTPLUG
    raise exception.CannotFork(
        f"its flavor or image has {PROPERTY}={chosen}, which is none of {AUTO}, {HOTPLUG}, {NONE}"
    )
