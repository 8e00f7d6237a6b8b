# SPDX-License-Identifier: Apache-2.0
"""What the arguments of programs' calls must look like."""

from typing import Any

from nova_snowflock.guest import protocol

_UUID = {"type": "string", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"}
_PARAMS = {
    "type": "object",
    # With what a clone's metadata puts before it, Nova takes 255 characters.
    "propertyNames": {"pattern": "^[a-zA-Z0-9_:. -]{1,200}$", "not": {"pattern": "^snowflock:"}},
    "additionalProperties": {"type": "string", "maxLength": 255},
    "maxProperties": 64,
}
_ENCODED = (protocol.MAX_PIECE + 2) // 3 * 4


def _object(optional: tuple[str, ...] = (), **properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
    }


ARGUMENTS: dict[str, dict[str, Any]] = {
    "request_ticket": _object(n={"type": "integer", "minimum": 1, "maximum": 1 << 31}),
    "clone": _object(("params",), ticket=_UUID, params=_PARAMS),
    "checkpoint_parent": _object(("params",), params=_PARAMS),
    "create_clones": _object(checkpoint=_UUID, ticket=_UUID),
    "put": _object(
        offset={"type": "integer", "minimum": 0, "maximum": 1 << 31},
        data={"type": "string", "maxLength": _ENCODED},
    ),
    "exit": _object(status={"type": "integer", "minimum": 0, "maximum": 255}),
    "join": _object(ticket=_UUID),
    "kill": _object(ticket=_UUID),
    "release": _object(checkpoint=_UUID),
    "info": _object(),
}
"""By the call's name."""
