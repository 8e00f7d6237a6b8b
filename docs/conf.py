# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration."""

from importlib import metadata

project = "nova-snowflock"
copyright = "nova-snowflock contributors"
extensions = ["openstackdocstheme"]
html_theme = "openstackdocs"
openstackdocs_auto_name = False
# Not one of OpenStack's own repositories: no bug tracker link, and the version is the package's.
openstackdocs_auto_version = False
version = release = metadata.version("nova-snowflock")
exclude_patterns = ["_build"]
