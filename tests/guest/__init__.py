# SPDX-License-Identifier: Apache-2.0
"""The guest of the tests: its image, the workload inside it, and how to run and question it."""
