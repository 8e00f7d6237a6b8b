# SPDX-License-Identifier: Apache-2.0
"""The API plane in Nova: its real API, conductor, scheduler and compute managers on Nova's own
functional test base, with a compute side of forks that keeps records in memory.

Nova's base runs under unittest and stestr, not under pytest.
"""

import importlib
import logging
import os

# As Nova's services run: on threads. It decides on that when its tests are first imported, which
# must be before anything else of it.
os.environ.setdefault("OS_NOVA_DISABLE_EVENTLET_PATCHING", "true")
importlib.import_module("nova.tests.functional")

if "OS_DEBUG" not in os.environ:
    # Of three compute services and all that they talk to, for each test.
    logging.disable(logging.INFO)
