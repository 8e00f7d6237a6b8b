# SPDX-License-Identifier: Apache-2.0
"""mcdist datagrams: their format, their keys, and their protection against forgery and replay.

docs/protocol.rst describes the whole exchange. Every datagram is::

    magic "SF" | version u8 | kind u8 | session u64 | sequence u64 | ciphertext | tag (16 bytes)

sealed with AES-256-GCM; the header is authenticated with it. A session belongs to one direction
between two ends and has a key of its own, so that a sequence number is a nonce that never repeats.
All integers are big-endian.
"""

from collections.abc import Iterable, Sequence
import secrets
import struct
from typing import NamedTuple

from cryptography import exceptions as crypto_exceptions
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers import aead
from cryptography.hazmat.primitives.kdf import hkdf

from nova_snowflock.memtap import PAGE_SIZE

MAGIC = b"SF"
VERSION = 1
KEY_SIZE = 32
TAG_SIZE = 16
NONCE_SIZE = 12
"""The nonce is the sequence number in as many bytes."""
MINIMUM_MTU = 1280
"""Bytes: what IPv6 guarantees on every link; below it a page would need too many fragments."""

HEADER = struct.Struct(">2sBBQQ")
_UDP_HEADERS = 40 + 8  # IPv6 and UDP; IPv4 leaves 20 bytes of a datagram unused
_MAX_DATAGRAM = 65535 - _UDP_HEADERS
_MAX_SEGMENTS = 64  # UDP_MAX_SEGMENTS of Linux before 6.9

_SESSION = struct.Struct(">Q")
_REPORT = struct.Struct(">QQB")
_RUN = struct.Struct(">HHQ")
LOCATION = struct.Struct(">HBBQ")
"""What precedes page data: file, fragments a page is cut into, index of this one, page."""

MAX_RUNS = (MINIMUM_MTU - _UDP_HEADERS - HEADER.size - TAG_SIZE - _REPORT.size) // _RUN.size
"""How many runs one request or zero notice may name."""

# What a datagram is.
HELLO = 1
WELCOME = 2
REQUEST = 3
DATA = 4
ZERO = 5
BYE = 6

# How a request is to be answered: bits of its priority.
BACKGROUND = 0
FAULT = 1
"""A guest waits for these pages: ahead of everything else."""
REPAIR = 2
"""They were asked for before and did not arrive: by unicast, even if just sent to all."""


class Run(NamedTuple):
    """Consecutive pages of one file."""

    file: int
    page: int
    pages: int


class Request(NamedTuple):
    """What a memtap asks for, and what it has seen so far of the data that was sent to it.

    :param received: data datagrams that arrived
    :param expected: data datagrams that must have been sent, from their sequence numbers
    :param priority: :data:`FAULT` and :data:`REPAIR`, or'ed
    """

    received: int
    expected: int
    priority: int
    runs: Sequence[Run]


def parse_header(buffer: memoryview, start: int, end: int) -> tuple[int, int, int] | None:
    """Kind, session and sequence number of a datagram; None if it cannot be one of this version."""
    if end - start < HEADER.size + TAG_SIZE:
        return None
    magic, version, kind, session, sequence = HEADER.unpack_from(buffer, start)
    if magic != MAGIC or version != VERSION:
        return None
    return kind, session, sequence


def encode_request(request: Request) -> bytes:
    """The payload of a REQUEST; at most :data:`MAX_RUNS` runs."""
    received, expected, priority, runs = request
    return _REPORT.pack(received, expected, priority) + encode_runs(runs)


def decode_request(payload: bytes) -> Request:
    """:raises ValueError: the payload is not of a request's form"""
    if len(payload) < _REPORT.size:
        raise ValueError("a request is too short")
    received, expected, priority = _REPORT.unpack_from(payload)
    if priority & ~(FAULT | REPAIR):
        raise ValueError(f"a request has the unknown priority {priority}")
    return Request(received, expected, priority, decode_runs(payload[_REPORT.size :]))


def encode_runs(runs: Iterable[Run]) -> bytes:
    """At most :data:`MAX_RUNS` runs as a datagram carries them."""
    return b"".join([_RUN.pack(file, count, page) for file, page, count in runs])


def decode_runs(payload: bytes) -> list[Run]:
    """:raises ValueError: the payload is not a list of runs"""
    if len(payload) % _RUN.size:
        raise ValueError("a list of runs has a part of one at its end")
    return [Run(file, page, count) for file, count, page in _RUN.iter_unpack(payload)]


def encode_session(session: int) -> bytes:
    """What a HELLO (who greets) and a WELCOME (where multicast data comes from) carry."""
    return _SESSION.pack(session)


def decode_session(payload: bytes) -> int:
    """:raises ValueError: the payload is not a session number"""
    if len(payload) != _SESSION.size:
        raise ValueError("a session number has the wrong length")
    return int(_SESSION.unpack(payload)[0])


def new_session() -> int:
    """A session number that was never used with any key."""
    return secrets.randbits(64) or 1


def session_key(image_key: bytes, direction: str, *sessions: int) -> aead.AESGCM:
    """The key of one direction of an exchange (HKDF-Expand, RFC 5869, with SHA-256).

    :param direction: "hello", "request", "answer" or "multicast"
    :param sessions: every session number that the two ends have agreed on up to here; a datagram
        recorded in an earlier exchange is sealed with another key and fails
    """
    context = f"snowflock mcdist {VERSION} {direction}".encode()
    context += b"".join(session.to_bytes(8, "big") for session in sessions)
    derived = hkdf.HKDFExpand(hashes.SHA256(), KEY_SIZE, context).derive(image_key)
    return aead.AESGCM(derived)


class Sealer:
    """The sending end of a session."""

    def __init__(self, session: int, key: aead.AESGCM) -> None:
        self.session = session
        self._key = key
        self._sequence = 0

    def seal(self, kind: int, payload: bytes = b"") -> bytes:
        """A datagram ready to be sent."""
        datagram = bytearray(HEADER.size + len(payload) + TAG_SIZE)
        view = memoryview(datagram)
        self.seal_into(kind, payload, view[: HEADER.size], view[HEADER.size :])
        return bytes(datagram)

    def seal_into(
        self, kind: int, payload: bytes | memoryview, header: memoryview, body: memoryview
    ) -> None:
        """Fill the two parts of a datagram, which have the exact sizes."""
        # Counted before anything else: whatever happens, no number is used twice.
        self._sequence = sequence = self._sequence + 1
        HEADER.pack_into(header, 0, MAGIC, VERSION, kind, self.session, sequence)
        self._key.encrypt_into(sequence.to_bytes(NONCE_SIZE), payload, header, body)


class Opener:
    """The receiving end of a session: accepts each sequence number once.

    Numbers may arrive out of order within a window; older ones count as replays (RFC 4303, 3.4.3).
    """

    WINDOW = 1024
    _MASK = (1 << WINDOW) - 1

    def __init__(self, session: int, key: aead.AESGCM) -> None:
        self.session = session
        self.received = 0
        self.rejected = 0
        self.replayed = 0
        self.highest = 0
        self._first = 0
        self._key = key
        self._seen = 0

    @property
    def expected(self) -> int:
        """How many datagrams were sent since the first that arrived, as far as is known."""
        return self.highest - self._first + 1 if self._first else 0

    def open(self, datagram: bytes | memoryview) -> bytes | None:
        """The payload of a datagram of this session, or None if it is forged or replayed."""
        size = len(datagram) - HEADER.size - TAG_SIZE
        if size < 0:
            self.rejected += 1
            return None
        payload = bytearray(size)
        sequence = HEADER.unpack_from(datagram)[4]
        view = memoryview(datagram)
        if self.open_into(sequence, view[: HEADER.size], view[HEADER.size :], payload):
            return bytes(payload)
        return None

    def open_into(
        self,
        sequence: int,
        header: memoryview,
        ciphertext: memoryview,
        payload: bytearray | memoryview,
    ) -> bool:
        """Fill ``payload``, which has the exact size, and tell whether it is genuine and new."""
        ahead = sequence - self.highest
        if ahead <= 0 and (ahead <= -self.WINDOW or self._seen >> -ahead & 1):
            self.replayed += 1
            return False
        try:
            self._key.decrypt_into(sequence.to_bytes(NONCE_SIZE), ciphertext, header, payload)
        except crypto_exceptions.InvalidTag:
            self.rejected += 1
            return False
        if ahead > 0:
            self._seen = (self._seen << min(ahead, self.WINDOW) | 1) & self._MASK
            self.highest = sequence
            if not self._first:
                self._first = sequence
        else:
            self._seen |= 1 << -ahead
        self.received += 1
        return True


class Geometry(NamedTuple):
    """How pages are cut into datagrams that fit a path.

    :param fragments: datagrams a page needs
    :param pages: whole pages a datagram holds; 1 where it holds a fragment
    :param payload: bytes of page data in a full datagram
    :param datagram: bytes in a full datagram
    :param segments: how many full datagrams the kernel takes in one call; whole pages of them
    """

    fragments: int
    pages: int
    payload: int
    datagram: int
    segments: int

    @property
    def batch(self) -> int:
        """How many pages one call sends."""
        return self.segments * self.pages // self.fragments


MAX_FRAGMENTS = 4
"""How many datagrams a page is cut into at most: at the minimum MTU."""


def geometry(mtu: int) -> Geometry:
    """The geometry for paths that carry packets of ``mtu`` bytes.

    :raises ValueError: the MTU is below :data:`MINIMUM_MTU`
    """
    if mtu < MINIMUM_MTU:
        raise ValueError(f"an MTU of {mtu} is below the minimum of {MINIMUM_MTU} bytes")
    overhead = HEADER.size + LOCATION.size + TAG_SIZE
    room = min(mtu, 65535) - _UDP_HEADERS - overhead
    if room >= PAGE_SIZE:
        fragments, pages = 1, room // PAGE_SIZE
        payload = pages * PAGE_SIZE
    else:
        fragments, pages = -(-PAGE_SIZE // room), 1
        payload = -(-PAGE_SIZE // fragments)
    segments = min(_MAX_DATAGRAM // (overhead + payload), _MAX_SEGMENTS)
    segments -= segments % fragments
    return Geometry(fragments, pages, payload, overhead + payload, segments)
