# SPDX-License-Identifier: Apache-2.0
"""Clouds to develop on."""
