# SPDX-License-Identifier: Apache-2.0
"""What ``compute_driver = snowflock.SnowFlockDriver`` or ``snowflock.SnowFlockXenDriver`` names.

Nova loads drivers from its own package nova.virt only, so this is installed as nova.virt.snowflock
(pyproject.toml), beside Nova's files and without touching any of them.
"""

from nova_snowflock.virt.driver import SnowFlockDriver
from nova_snowflock.virt.xen_driver import SnowFlockXenDriver

__all__ = ["SnowFlockDriver", "SnowFlockXenDriver"]
