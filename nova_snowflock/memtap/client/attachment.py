# SPDX-License-Identifier: Apache-2.0
"""A memtap's side of its sessions with the memory server: greeting, keys, replay protection."""

from collections.abc import Callable, Sequence
import itertools

from nova_snowflock import endpoint
from nova_snowflock.memtap import wire

_FIRST_WAIT = 0.05
_MAX_WAIT = 1.0
_KEEP_ALIVE = 20.0


class Attachment:
    """Attached once a server has answered a HELLO; greets until then.

    :param key: the image's
    :param servers: which to greet, one after another
    :param send: sends a datagram to an address
    :param opener: makes the receiving end of a session
    """

    def __init__(
        self,
        key: bytes,
        servers: Sequence[endpoint.Address],
        send: Callable[[bytes, endpoint.Address], None],
        opener: Callable[..., wire.Opener] = wire.Opener,
    ) -> None:
        self.openers: dict[int, wire.Opener] = {}
        """The sessions in which data may come, by number."""
        self.unicast: wire.Opener | None = None
        self.rejected = 0
        self.replayed = 0
        self._key = key
        self._servers = itertools.cycle(servers)
        self._send = send
        self._opener = opener
        self._identity = wire.new_session()
        self._sealer: wire.Sealer | None = None
        self.keep_alive_due = 0.0
        """When :meth:`keep_alive` is to be called, at the latest."""
        self.lose(0.0)

    @property
    def attached(self) -> bool:
        return self._sealer is not None

    @property
    def lost(self) -> int:
        """How many data datagrams have not arrived, so far."""
        return sum(opener.expected - opener.received for opener in self.openers.values())

    def lose(self, now: float) -> None:
        """The server does not answer: it may have been started again and know nothing of us."""
        self.server = next(self._servers)
        self._sealer = None
        # A session of its own: no answer to an earlier greeting can be taken for one to this.
        session = wire.new_session()
        self._hello = wire.Sealer(session, wire.session_key(self._key, "hello", session))
        self._due = now
        self._wait = _FIRST_WAIT

    def greet(self, now: float) -> float:
        """Send a HELLO if it is time to; the time of the next."""
        if now >= self._due:
            hello = self._hello.seal(wire.HELLO, wire.encode_session(self._identity))
            self._send(hello, self.server)
            self._due = now + self._wait
            self._wait = min(2 * self._wait, _MAX_WAIT)
        return self._due

    def welcome(self, session: int, datagram: memoryview) -> bool:
        """Take a WELCOME from a session not known yet; whether this attached us.

        :raises ValueError: it is malformed
        """
        sessions = (self._hello.session, session)
        opener = self._opener(session, wire.session_key(self._key, "answer", *sessions))
        payload = opener.open(datagram)
        if payload is None:
            self.rejected += 1
            return False
        everyone = wire.decode_session(payload)
        # What went to everyone before must not be accepted again.
        multicast = self.openers.pop(everyone, None)
        self.rejected, self.replayed = self.refused()
        self.openers = {session: opener}
        self.unicast = opener
        if everyone:
            if multicast is None:
                key = wire.session_key(self._key, "multicast", everyone)
                multicast = self._opener(everyone, key)
            self.openers[everyone] = multicast
        self._sealer = wire.Sealer(session, wire.session_key(self._key, "request", *sessions))
        return True

    def request(self, priority: int, runs: Sequence[wire.Run], now: float) -> None:
        """Ask for pages, if attached."""
        for start in range(0, len(runs), wire.MAX_RUNS):
            self._send_request(priority, runs[start : start + wire.MAX_RUNS], now)

    def _send_request(self, priority: int, runs: Sequence[wire.Run], now: float) -> None:
        if self._sealer is None:
            return
        received = expected = 0
        for opener in self.openers.values():
            received += opener.received
            expected += opener.expected
        request = wire.encode_request(wire.Request(received, expected, priority, runs))
        self._send(self._sealer.seal(wire.REQUEST, request), self.server)
        self.keep_alive_due = now + _KEEP_ALIVE

    def keep_alive(self, now: float) -> None:
        """Report if nothing was asked for lately: a server forgets who is silent."""
        if now >= self.keep_alive_due:
            self._send_request(wire.BACKGROUND, (), now)

    def leave(self) -> None:
        """Say good-bye."""
        if self._sealer is not None:
            self._send(self._sealer.seal(wire.BYE), self.server)
            self._sealer = None

    def refused(self) -> tuple[int, int]:
        """How many datagrams were forged, and how many replayed."""
        openers = self.openers.values()
        return (
            self.rejected + sum(opener.rejected for opener in openers),
            self.replayed + sum(opener.replayed for opener in openers),
        )
