# SPDX-License-Identifier: Apache-2.0
"""A whole OpenStack cloud on one machine: ``python -m devstack.embedded up``.

Real keystone, glance, placement, neutron and nova on MariaDB and RabbitMQ, and three emulated
compute hosts (:mod:`tests.emulation`), in network namespaces of their own.
"""
