# SPDX-License-Identifier: Apache-2.0
"""Datagrams: what one end seals the other opens, once, and nothing else."""

import random

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import aead
from cryptography.hazmat.primitives.kdf import hkdf
from hypothesis import given
from hypothesis import strategies as st
import pytest

from nova_snowflock.memtap import PAGE_SIZE
from nova_snowflock.memtap import wire

KEY = bytes(range(32))
WINDOW = wire.Opener.WINDOW


def pair(session: int = 7) -> tuple[wire.Sealer, wire.Opener]:
    return (
        wire.Sealer(session, wire.session_key(KEY, "answer", 1, session)),
        wire.Opener(session, wire.session_key(KEY, "answer", 1, session)),
    )


def at(sealer: wire.Sealer, sequence: int) -> bytes:
    """The datagram of this sequence number, as if so many had been sent before."""
    sealer._sequence = sequence - 1
    return sealer.seal(wire.DATA, b"%d" % sequence)


@given(st.binary(max_size=2000), st.integers(1, 6))
def test_round_trip(payload: bytes, kind: int) -> None:
    sealer, opener = pair()
    datagram = sealer.seal(kind, payload)
    assert payload not in datagram or len(payload) < 4
    assert opener.open(datagram) == payload
    assert (opener.received, opener.rejected, opener.replayed) == (1, 0, 0)


def test_format() -> None:
    """As docs/protocol.rst has it, without any help from the code."""
    context = b"snowflock mcdist 1 answer" + (1).to_bytes(8, "big") + (7).to_bytes(8, "big")
    key = aead.AESGCM(hkdf.HKDFExpand(hashes.SHA256(), 32, context).derive(KEY))
    datagram = pair()[0].seal(wire.DATA, b"payload")
    header, ciphertext = datagram[:20], datagram[20:]
    assert header == b"SF\x01\x04" + (7).to_bytes(8, "big") + (1).to_bytes(8, "big")
    assert key.decrypt((1).to_bytes(12, "big"), ciphertext, header) == b"payload"


def test_every_altered_bit_is_refused() -> None:
    sealer, opener = pair()
    datagram = sealer.seal(wire.DATA, b"payload")
    for bit in range(8 * len(datagram)):
        altered = bytearray(datagram)
        altered[bit // 8] ^= 1 << bit % 8
        assert opener.open(bytes(altered)) is None
    assert opener.received == 0
    assert opener.rejected + opener.replayed == 8 * len(datagram)
    assert opener.open(datagram) == b"payload"


def test_every_truncation_is_refused() -> None:
    sealer, opener = pair()
    datagram = sealer.seal(wire.DATA, b"payload")
    for length in range(len(datagram)):
        assert opener.open(datagram[:length]) is None
    assert opener.rejected == len(datagram)
    assert opener.open(datagram + b"\0") is None
    assert opener.open(datagram) == b"payload"


def test_a_forgery_does_not_move_the_window() -> None:
    sealer, opener = pair()
    forged = wire.HEADER.pack(wire.MAGIC, wire.VERSION, wire.DATA, 7, 1 << 63) + bytes(40)
    assert opener.open(forged) is None
    assert opener.open(at(sealer, 1)) == b"1"
    assert (opener.highest, opener.expected) == (1, 1)


@pytest.mark.parametrize(
    ("direction", "sessions"),
    [
        ("request", (1, 7)),
        ("multicast", (1, 7)),
        ("hello", (1, 7)),
        ("answer", (7, 1)),
        ("answer", (1,)),
        ("answer", (1, 8)),
    ],
)
def test_each_session_has_a_key_of_its_own(direction: str, sessions: tuple[int, ...]) -> None:
    opener = wire.Opener(7, wire.session_key(KEY, direction, *sessions))
    assert opener.open(pair()[0].seal(wire.DATA, b"payload")) is None
    assert opener.rejected == 1


def test_each_image_has_a_key_of_its_own() -> None:
    opener = wire.Opener(7, wire.session_key(KEY[::-1], "answer", 1, 7))
    assert opener.open(pair()[0].seal(wire.DATA, b"payload")) is None


def test_replays_are_refused() -> None:
    sealer, opener = pair()
    datagrams = [sealer.seal(wire.DATA) for _ in range(50)]
    for datagram in datagrams:
        assert opener.open(datagram) is not None
    for datagram in datagrams:
        assert opener.open(datagram) is None
    assert (opener.received, opener.replayed, opener.rejected) == (50, 50, 0)


def test_reordering_within_the_window() -> None:
    sealer, opener = pair()
    datagrams = [sealer.seal(wire.DATA) for _ in range(WINDOW)]
    random.Random(1).shuffle(datagrams)
    for datagram in datagrams:
        assert opener.open(datagram) is not None
        assert opener.open(datagram) is None
    assert (opener.received, opener.replayed) == (WINDOW, WINDOW)


def test_edges_of_the_window() -> None:
    sealer, opener = pair()
    assert opener.open(at(sealer, 5000)) is not None
    assert opener.open(at(sealer, 5000 - WINDOW)) is None
    assert opener.open(at(sealer, 5000 - WINDOW + 1)) is not None
    assert opener.open(at(sealer, 5000 - WINDOW + 1)) is None
    assert opener.open(at(sealer, 4999)) is not None
    assert opener.open(at(sealer, 5001)) is not None
    assert opener.open(at(sealer, 4999)) is None


@pytest.mark.parametrize("jump", [WINDOW - 1, WINDOW, WINDOW + 1, 1 << 40, (1 << 64) - 2])
def test_far_jumps(jump: int) -> None:
    sealer, opener = pair()
    assert opener.open(at(sealer, 1)) is not None
    assert opener.open(at(sealer, 1 + jump)) is not None
    assert opener.open(at(sealer, 1)) is None
    assert opener.open(at(sealer, 1 + jump)) is None
    # Whatever is in the window and has not come yet is welcome.
    assert opener.open(at(sealer, jump)) is not None
    assert opener.expected == jump + 1


@given(st.lists(st.integers(1, 3000), max_size=200))
def test_never_twice(sequences: list[int]) -> None:
    sealer, opener = pair()
    opened: set[int] = set()
    highest = 0
    for sequence in sequences:
        fresh = sequence not in opened and sequence > highest - WINDOW
        assert (opener.open(at(sealer, sequence)) is not None) == fresh
        if fresh:
            opened.add(sequence)
            highest = max(highest, sequence)
    assert opener.received == len(opened)
    assert opener.received + opener.replayed == len(sequences)


def test_loss_is_counted() -> None:
    sealer, opener = pair()
    for sequence in range(1, 101):
        datagram = at(sealer, sequence)
        if sequence % 10:
            assert opener.open(datagram) is not None
    assert (opener.received, opener.expected) == (90, 99)


RUNS = st.lists(
    st.builds(
        wire.Run,
        st.integers(0, (1 << 16) - 1),
        st.integers(0, (1 << 64) - 1),
        st.integers(0, (1 << 16) - 1),
    ),
    max_size=wire.MAX_RUNS,
)
COUNTS = st.integers(0, (1 << 64) - 1)


@given(COUNTS, COUNTS, st.integers(0, 3), RUNS)
def test_request(received: int, expected: int, priority: int, runs: list[wire.Run]) -> None:
    request = wire.Request(received, expected, priority, runs)
    payload = wire.encode_request(request)
    assert wire.decode_request(payload) == request
    assert 40 + 8 + wire.HEADER.size + len(payload) + wire.TAG_SIZE <= wire.MINIMUM_MTU
    for length in range(len(payload)):
        if length < 17 or (length - 17) % 12:
            with pytest.raises(ValueError, match=r"request is too short|part of one"):
                wire.decode_request(payload[:length])


def test_request_of_an_unknown_priority() -> None:
    payload = bytearray(wire.encode_request(wire.Request(0, 0, 0, [])))
    for priority in range(4, 256):
        payload[16] = priority
        with pytest.raises(ValueError, match="unknown priority"):
            wire.decode_request(bytes(payload))


@given(RUNS)
def test_runs(runs: list[wire.Run]) -> None:
    assert wire.decode_runs(wire.encode_runs(runs)) == runs


@given(st.binary(max_size=100))
def test_random_payloads(payload: bytes) -> None:
    """They decode or are refused as what they are; nothing else."""
    decoders = (wire.decode_request, wire.decode_runs, wire.decode_session)
    for decode in decoders:
        try:
            decode(payload)
        except ValueError:
            continue


def test_session() -> None:
    assert wire.decode_session(wire.encode_session(1 << 63)) == 1 << 63
    for size in (0, 7, 9):
        with pytest.raises(ValueError, match="wrong length"):
            wire.decode_session(bytes(size))
    sessions = {wire.new_session() for _ in range(1000)}
    assert len(sessions) == 1000
    assert 0 not in sessions


@given(st.integers(wire.MINIMUM_MTU, 70000))
def test_geometry(mtu: int) -> None:
    geometry = wire.geometry(mtu)
    assert 1 <= geometry.fragments <= wire.MAX_FRAGMENTS
    assert geometry.fragments == 1 or geometry.pages == 1
    assert geometry.datagram + 48 <= mtu
    # All of a page and less than a byte a fragment of padding.
    padding = geometry.payload * geometry.fragments - PAGE_SIZE * geometry.pages
    assert 0 <= padding < geometry.fragments
    assert 1 <= geometry.segments <= 64
    assert geometry.segments * geometry.datagram <= 65535 - 48
    assert geometry.segments % geometry.fragments == 0
    assert geometry.batch == geometry.segments * geometry.pages // geometry.fragments
    # No fewer fragments would do, nor would more pages.
    room = min(mtu, 65535) - 48 - 20 - 12 - 16
    if geometry.fragments > 1:
        assert -(-PAGE_SIZE // room) == geometry.fragments
    else:
        assert room // PAGE_SIZE == geometry.pages


@given(st.binary(max_size=60))
def test_headers(data: bytes) -> None:
    parsed = wire.parse_header(memoryview(b"before" + data), 6, 6 + len(data))
    if len(data) >= 36 and data.startswith(b"SF\x01"):
        assert parsed == (
            data[3],
            int.from_bytes(data[4:12], "big"),
            int.from_bytes(data[12:20], "big"),
        )
    else:
        assert parsed is None


@pytest.mark.parametrize("mtu", [-1, 0, 576, wire.MINIMUM_MTU - 1])
def test_an_mtu_below_the_minimum_is_refused(mtu: int) -> None:
    with pytest.raises(ValueError, match="below the minimum"):
        wire.geometry(mtu)
