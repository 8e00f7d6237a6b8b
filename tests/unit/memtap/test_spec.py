# SPDX-License-Identifier: Apache-2.0
"""Specs: how a process is told what to do, and the key with it."""

import dataclasses
import json
from typing import Any

import pytest

from nova_snowflock.memtap import spec as process_spec

KEY = bytes(range(32))
SERVER = process_spec.ServerSpec(
    image="6f0c4e9e-3a39-4c0b-9a4e-1f6f2d2f7d10",
    key=KEY,
    run_directory="/run/image",
    address="10.0.0.1:0",
    group="239.1.2.3:5000",
    interface="eth0",
    mtu=9000,
    rate_limit=1e9,
)
MEMTAP = process_spec.MemtapSpec(
    image=SERVER.image,
    key=KEY,
    run_directory="/run/image",
    store_directory="/var/lib/image",
    descriptor=b"\x00\xff descriptor",
    address="10.0.0.2",
    owner=(64055, 64055),
    population="eager",
)


def test_round_trip() -> None:
    server = process_spec.decode(process_spec.ServerSpec, process_spec.encode(SERVER))
    assert server == SERVER
    memtap = process_spec.decode(process_spec.MemtapSpec, process_spec.encode(MEMTAP))
    assert dataclasses.replace(memtap, owner=MEMTAP.owner) == MEMTAP
    assert tuple(memtap.owner) == MEMTAP.owner


@pytest.mark.parametrize("spec", [SERVER, MEMTAP])
def test_the_key_is_not_shown(spec: process_spec.ServerSpec | process_spec.MemtapSpec) -> None:
    for text in (repr(spec), str(spec), f"{spec}"):
        assert "key" not in text
        assert repr(KEY)[2:-1] not in text
        assert KEY.hex() not in text


@pytest.mark.parametrize("key", [b"", KEY[:16], KEY + b"\0"])
def test_a_key_of_another_length_is_refused(key: bytes) -> None:
    for spec in (SERVER, MEMTAP):
        with pytest.raises(ValueError, match="32 bytes"):
            dataclasses.replace(spec, key=key)


@pytest.mark.parametrize(
    ("spec", "change"),
    [
        (SERVER, {"address": "somewhere"}),
        (SERVER, {"address": "example.org:1"}),
        (SERVER, {"address": "10.0.0.1:65536"}),
        (SERVER, {"address": "239.1.2.3:5000"}),
        (SERVER, {"group": "10.0.0.1:5000"}),
        (SERVER, {"group": "everyone"}),
        (MEMTAP, {"address": "example.org"}),
        (MEMTAP, {"population": "greedy"}),
    ],
)
def test_wrong_values_are_refused(
    spec: process_spec.ServerSpec | process_spec.MemtapSpec, change: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"."):
        dataclasses.replace(spec, **change)
    fields = json.loads(process_spec.encode(spec)) | change
    with pytest.raises(ValueError, match=r"."):
        process_spec.decode(type(spec), json.dumps(fields).encode())  # type: ignore[type-var]


def test_ipv6() -> None:
    spec = dataclasses.replace(SERVER, address="[fd00::1]:0", group="[ff05::1:3]:5000")
    assert process_spec.decode(process_spec.ServerSpec, process_spec.encode(spec)) == spec
