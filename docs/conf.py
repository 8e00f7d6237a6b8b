# SPDX-License-Identifier: Apache-2.0
"""Sphinx configuration."""

project = "nova-snowflock"
copyright = "nova-snowflock contributors"
extensions = ["openstackdocstheme"]
html_theme = "openstackdocs"
openstackdocs_auto_name = False
# Not one of OpenStack's own repositories: no bug tracker link, no version from git.
openstackdocs_auto_version = False
version = release = "0.1.0"
exclude_patterns = ["_build"]
