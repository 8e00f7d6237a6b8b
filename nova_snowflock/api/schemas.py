# SPDX-License-Identifier: Apache-2.0
"""What requests must look like. Where a key means what it means to a server's creation, Nova's own
schema of it is taken, as of the newest microversion: forks look the same in all of them."""

from typing import Any

from nova.api.openstack.compute.schemas import servers
from nova.api.validation import parameter_types

_SERVER = servers.create_v294["properties"]["server"]["properties"]

# They become metadata of the clones, with something put before them.
_PARAMS = {
    "type": "object",
    "patternProperties": {"^[a-zA-Z0-9-_:. ]{1,200}$": {"type": "string", "maxLength": 255}},
    "maxProperties": 64,
    "additionalProperties": False,
}

_ONE_YEAR = 365 * 24 * 3600

create: dict[str, Any] = {
    "type": "object",
    "properties": {
        "fork": {
            "type": "object",
            "properties": {
                # The upper bound is an option: the controller's to check.
                "count": {"type": "integer", "minimum": 0},
                "checkpoint": {"type": "boolean"},
                "name": parameter_types.name,
                "fork_id": {"type": "string", "format": "uuid"},
                "networks": _SERVER["networks"],
                "availability_zone": _SERVER["availability_zone"],
                "hints": servers.create_v294["properties"]["os:scheduler_hints"],
                "key_name": _SERVER["key_name"],
                "user_data": _SERVER["user_data"],
                "metadata": _SERVER["metadata"],
                "security_groups": _SERVER["security_groups"],
                "params": _PARAMS,
                "isolation": {"type": "string", "enum": ["none", "family"]},
                "population": {"type": "string", "enum": ["lazy", "background", "eager"]},
                "keep": {"type": "integer", "minimum": 0, "maximum": _ONE_YEAR},
            },
            "additionalProperties": False,
        },
    },
    "required": ["fork"],
    "additionalProperties": False,
}

release: dict[str, Any] = {
    "type": "object",
    "properties": {
        "release": {
            "type": ["object", "null"],
            "properties": {"force": {"type": "boolean"}},
            "additionalProperties": False,
        },
    },
    "required": ["release"],
    "additionalProperties": False,
}

query: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}

# What answers look like. Nova checks them where [api] response_validation says so: in its tests.


def _object(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {**required, **optional},
        "required": list(required),
        "additionalProperties": False,
    }


_UUID = {"type": "string", "format": "uuid"}
_COUNT = {"type": ["integer", "null"], "minimum": 0}
_SECONDS = {"type": ["number", "null"], "minimum": 0}
_TEXT = {"type": ["string", "null"]}

_CLONE = {
    "clone_id": {"type": "integer", "minimum": 1},
    "server_id": _UUID,
    "name": {"type": "string"},
}
_LISTED_CLONE = {**_CLONE, "status": {"type": "string"}}
_SHOWN_CLONE = {
    **_LISTED_CLONE,
    "population": _TEXT,
    "pages": _object({"resident": _COUNT, "zero": _COUNT, "missing": _COUNT}),
    "faults": _COUNT,
    "bytes_multicast": _COUNT,
    "bytes_unicast": _COUNT,
    "times": {"type": "object", "additionalProperties": {"type": "number"}},
}
_FORK = {
    "id": _UUID,
    "parent_id": _UUID,
    "state": {"type": "string", "enum": ["active", "lost", "released", "unknown"]},
    "created_at": _TEXT,
}
_LISTED_FORK = {**_FORK, "checkpoint": {"type": ["boolean", "null"]}, "size": _COUNT}
_SHOWN_FORK = {
    **_LISTED_FORK,
    "reason": _TEXT,
    "keep": _COUNT,
    "params": {"type": ["object", "null"]},
    "problems": {"type": ["array", "null"], "items": {"type": "string"}},
    "users": _COUNT,
    "method": _TEXT,
    "pause": _SECONDS,
    "stages": {"type": ["object", "null"]},
    "after": {"type": ["object", "null"]},
}


def _clones(clone: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": clone}


create_response = _object({"fork": _object({**_FORK, "clones": _clones(_object(_CLONE))})})
index_response = _object(
    {
        "forks": {
            "type": "array",
            "items": _object({**_LISTED_FORK, "clones": _clones(_object(_LISTED_CLONE))}),
        }
    }
)
show_response = _object(
    {
        "fork": _object(
            {**_SHOWN_FORK, "clones": _clones(_object(_SHOWN_CLONE, host=_TEXT))}, host=_TEXT
        )
    }
)
no_response = {"type": "null"}
