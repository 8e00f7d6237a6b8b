# SPDX-License-Identifier: Apache-2.0
"""The compute plane: captures a running guest into a fork image and starts clones from one."""
