# SPDX-License-Identifier: Apache-2.0
"""``python -m devstack.xen``."""

import sys

from devstack.xen import cli

sys.exit(cli.main())
