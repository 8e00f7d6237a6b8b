# SPDX-License-Identifier: Apache-2.0
"""Messages and lines: whatever bytes come, however they are split."""

from __future__ import annotations

import itertools
import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
import pytest

from nova_snowflock.guest import protocol

LINES = st.one_of(
    st.binary(max_size=60),
    st.sampled_from(
        [
            b'{"type":"you"}',
            b'{"type":"answer","id":"\xc3\xa9"}',
            b'{"type":5}',
            b'{"type":null}',
            b"[]",
            b"null",
            b"{",
            b"[" * 3000,
            b"1" * 5000,
            b'{"type":"\\ud800"}',
            b"",
            b"\r",
            b'{"type":"long","x":"' + b"x" * (protocol.MAX_LINE - 23) + b'"}',
            b'{"type":"long","x":"' + b"x" * (protocol.MAX_LINE - 22) + b'"}',
            b"x" * (protocol.MAX_LINE * 2),
        ]
    ),
)


def feed(lines: protocol.Lines, *pieces: bytes) -> list[protocol.Message]:
    return [message for piece in pieces for message in lines.feed(piece)]


@given(st.lists(LINES, max_size=8), st.lists(st.integers(0, 1 << 18), max_size=12))
def test_any_bytes_split_anywhere(sent: list[bytes], cuts: list[int]) -> None:
    data = b"\n".join(sent)
    whole, pieces = protocol.Lines(), protocol.Lines()
    expected = feed(whole, data)
    bounds = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    found = feed(pieces, *(data[a:b] for a, b in itertools.pairwise(bounds)))
    assert found == expected
    assert pieces.dropped == whole.dropped
    for message in found:
        assert isinstance(message["type"], str)
    # After an end of line, what came before it does not matter.
    assert feed(pieces, b"\n", protocol.encode({"type": "hello"}))[-1:] == [{"type": "hello"}]


def test_byte_by_byte() -> None:
    data = b'half\n{"type":"a"}\n\n{"type":"b","x":[1,2]}\n{"type"'
    lines = protocol.Lines()
    found = feed(lines, *(data[n : n + 1] for n in range(len(data))))
    assert found == [{"type": "a"}, {"type": "b", "x": [1, 2]}]
    assert lines.dropped == 1
    assert feed(lines, b':"c"}\n') == [{"type": "c"}]


def test_the_longest_line() -> None:
    room = protocol.MAX_LINE - len(protocol.encode({"type": "x", "data": ""}))
    message: dict[str, Any] = {"type": "x", "data": "y" * room}
    line = protocol.encode(message)
    assert len(line) == protocol.MAX_LINE
    assert feed(protocol.Lines(), line) == [message]
    message["data"] += "y"
    with pytest.raises(ValueError, match="longer than"):
        protocol.encode(message)
    lines = protocol.Lines()
    longer = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    assert feed(lines, longer, line) == [{"type": "x", "data": "y" * room}]
    assert lines.dropped == 1


def test_an_endless_line_takes_no_memory() -> None:
    lines = protocol.Lines()
    for _ in range(100):
        assert feed(lines, b"x" * protocol.MAX_LINE) == []
        assert sum(len(value) for value in vars(lines).values() if isinstance(value, bytes)) < (
            2 * protocol.MAX_LINE
        )
    assert feed(lines, b'{"type":"tail"}\n{"type":"next"}\n') == [{"type": "next"}]
    assert lines.dropped == 1


def test_any_text_survives() -> None:
    message = {"type": "x", "text": "\N{SNOWFLAKE}\n\0\ud800", "number": 1.5}
    assert feed(protocol.Lines(), protocol.encode(message)) == [message]
