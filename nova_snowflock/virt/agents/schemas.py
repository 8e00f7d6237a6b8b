# SPDX-License-Identifier: Apache-2.0
"""What the arguments of programs' calls must look like."""

from typing import Any

import jsonschema

from nova_snowflock.guest import protocol

# Of the end of a text, not of a line: "$" lets a newline follow.
_UUID = {"type": "string", "pattern": r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z"}
_PARAMS = {
    "type": "object",
    # With what a clone's metadata puts before it, Nova takes 255 characters.
    "propertyNames": {"pattern": r"^[a-zA-Z0-9_:. -]{1,200}\Z", "not": {"pattern": "^snowflock:"}},
    "additionalProperties": {"type": "string", "maxLength": 255},
    # A fork has 64 at most, one of which says what request it was made for.
    "maxProperties": 63,
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


def _is_integer(checker: Any, value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# To jsonschema 1.0 is an integer, to Python it is none: it counts nothing and ends no range.
_Validator = jsonschema.validators.extend(
    jsonschema.Draft202012Validator,
    type_checker=jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", _is_integer),
)
_VALIDATORS = {call: _Validator(schema) for call, schema in ARGUMENTS.items()}


def validate(call: str, arguments: dict[str, Any]) -> None:
    """
    :raises jsonschema.ValidationError: they are no arguments of the call
    """
    error = jsonschema.exceptions.best_match(_VALIDATORS[call].iter_errors(arguments))
    if error is not None:
        raise error
