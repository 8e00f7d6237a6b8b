# SPDX-License-Identifier: Apache-2.0
"""Makes pbr take the next release's number from setup.cfg; all else is in pyproject.toml."""

import setuptools

setuptools.setup(setup_requires=["pbr>=6.1.1"], pbr=True)
