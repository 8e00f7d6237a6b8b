# SPDX-License-Identifier: Apache-2.0
"""The control plane: the extension of nova-api that lets a user fork a server."""
