# SPDX-License-Identifier: Apache-2.0
"""Addresses as text."""

import pytest

from nova_snowflock import endpoint


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.0.2.1:5710", ("192.0.2.1", 5710)),
        ("192.0.2.1:0", ("192.0.2.1", 0)),
        ("239.255.1.2:65535", ("239.255.1.2", 65535)),
        ("[2001:db8::1]:5710", ("2001:db8::1", 5710)),
    ],
)
def test_round_trip(text: str, address: endpoint.Address) -> None:
    assert endpoint.parse(text) == address
    assert endpoint.format(address) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "192.0.2.1",
        "192.0.2.1:",
        ":5710",
        "192.0.2.1:65536",
        "192.0.2.1:-1",
        "192.0.2.1:+1",
        "192.0.2.1: 1",
        "192.0.2.1:1_0",
        "192.0.2.1:1\n",
        "192.0.2.1:\N{ARABIC-INDIC DIGIT ONE}",
        "192.0.2.1:000001",
        "192.0.2:1",
        "[192.0.2.1]:1",
        "2001:db8::1:5710",
        "[2001:db8::1:5710",
        "2001:db8::1]:5710",
        "[2001:db8::1]]:5710",
        "[]:5710",
        "example.org:5710",
    ],
)
def test_nothing_else_is_taken(text: str) -> None:
    with pytest.raises(ValueError, match=r"not an|Expected|expected|not permitted|[Oo]ctet"):
        endpoint.parse(text)
