# SPDX-License-Identifier: Apache-2.0
"""``python -m devstack.embedded``."""

import sys

from devstack.embedded import cli

sys.exit(cli.main())
