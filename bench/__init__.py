# SPDX-License-Identifier: Apache-2.0
"""The benchmarks: ``python -m bench [name...]`` measures every figure whose name starts so.

A subject has a module, which yields figures. Each figure is the median of several runs, beside what
it is to be compared with, measured in the same run. Nothing here passes or fails by its time.
"""
