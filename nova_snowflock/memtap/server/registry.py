# SPDX-License-Identifier: Apache-2.0
"""A memory server's side of its sessions: which memtaps there are, what of theirs is genuine."""

import collections
from collections.abc import Callable
import dataclasses

from nova_snowflock import endpoint
from nova_snowflock.memtap import wire

_MOST = 1024
_SILENCE = 60.0


@dataclasses.dataclass(eq=False)
class Memtap:
    """A receiver of data.

    :param greeting: receiving end of the session in which it greets
    :param identity: what it calls itself in every HELLO
    :param heard: when the last genuine datagram of it came
    :param confirmed: it has answered a WELCOME, so its HELLO was no replay
    """

    greeting: wire.Opener
    identity: int
    address: endpoint.Address
    sealer: wire.Sealer
    opener: wire.Opener
    heard: float
    confirmed: bool = False


class Registry:
    """The memtaps that have greeted.

    :param key: the image's
    :param dropped: called with each memtap that is forgotten
    """

    def __init__(self, key: bytes, dropped: Callable[[Memtap], None]) -> None:
        self._dropped = dropped
        self.confirmed = 0
        """How many of them are certainly there."""
        self._key = key
        self._by_greeting: collections.OrderedDict[int, Memtap] = collections.OrderedDict()
        self._by_session: dict[int, Memtap] = {}
        self._rejected = 0
        self._replayed = 0

    def receivers(self) -> list[Memtap]:
        """Those that are certainly there."""
        return [memtap for memtap in self._by_session.values() if memtap.confirmed]

    def refused(self) -> tuple[int, int]:
        """How many datagrams were forged, and how many replayed."""
        return self._rejected, self._replayed

    def greet(
        self, session: int, datagram: memoryview, address: endpoint.Address, now: float
    ) -> Memtap | None:
        """The memtap that a HELLO is from; None if it is forged or replayed.

        :raises ValueError: the HELLO is malformed
        """
        known = self._by_greeting.get(session)
        if known is None:
            opener = wire.Opener(session, wire.session_key(self._key, "hello", session))
        else:
            opener = known.greeting
        payload = self._open(opener, datagram)
        if payload is None:
            return None
        identity = wire.decode_session(payload)
        if known is None:
            return self._admit(opener, identity, address, now)
        if not known.confirmed:
            # Whoever replays a HELLO does not keep the one it is from from being heard.
            known.address = address
        return known

    def open(
        self, session: int, datagram: memoryview, address: endpoint.Address, now: float
    ) -> tuple[Memtap, bytes] | None:
        """Who a REQUEST or BYE is from and its payload; None if it is forged or replayed."""
        memtap = self._by_session.get(session)
        if memtap is None:
            self._rejected += 1
            return None
        payload = self._open(memtap.opener, datagram)
        if payload is None:
            return None
        memtap.heard = now
        memtap.address = address  # only what is genuine and new moves it
        if not memtap.confirmed:
            memtap.confirmed = True
            self.confirmed += 1
            for other in list(self._by_session.values()):
                if other is not memtap and other.identity == memtap.identity:
                    self.drop(other)  # it has greeted anew, so that is over
        return memtap, payload

    def drop(self, memtap: Memtap) -> None:
        """Forget a memtap."""
        self.confirmed -= memtap.confirmed
        del self._by_greeting[memtap.greeting.session]
        del self._by_session[memtap.opener.session]
        self._dropped(memtap)

    def drop_silent(self, now: float) -> None:
        """Forget those that have ended without a good-bye."""
        silent = [memtap for memtap in self._by_session.values() if now - memtap.heard > _SILENCE]
        for memtap in silent:
            self.drop(memtap)

    def _open(self, opener: wire.Opener, datagram: memoryview) -> bytes | None:
        replayed = opener.replayed
        payload = opener.open(datagram)
        if payload is None:
            was_replay = opener.replayed - replayed
            self._replayed += was_replay
            self._rejected += 1 - was_replay
        return payload

    def _admit(
        self, greeting: wire.Opener, identity: int, address: endpoint.Address, now: float
    ) -> Memtap:
        if len(self._by_greeting) >= _MOST:
            # A HELLO of another time can be replayed, but who that makes is never confirmed.
            memtaps = self._by_greeting.values()
            strangers = (memtap for memtap in memtaps if not memtap.confirmed)
            self.drop(next(strangers, next(iter(memtaps))))
        ours = wire.new_session()
        sessions = (greeting.session, ours)
        sealer = wire.Sealer(ours, wire.session_key(self._key, "answer", *sessions))
        opener = wire.Opener(ours, wire.session_key(self._key, "request", *sessions))
        memtap = Memtap(greeting, identity, address, sealer, opener, now)
        self._by_greeting[greeting.session] = memtap
        self._by_session[ours] = memtap
        return memtap
