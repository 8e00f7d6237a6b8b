# SPDX-License-Identifier: Apache-2.0
"""Commands of python-openstackclient: ``openstack server fork`` and what follows it."""
