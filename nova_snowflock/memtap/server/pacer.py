# SPDX-License-Identifier: Apache-2.0
"""How fast background data may be sent, from what its receivers report.

The bottleneck is estimated as BBR does (Cardwell et al., ACM Queue 14(5), 2016): the most that was
delivered lately, probed with a little more from time to time. A loss that does not depend on the
rate, as on a bad link, therefore does not slow the sender down; a full queue does.
"""

import collections
from collections.abc import Hashable
import dataclasses

_START = 100e6
_FLOOR = 1e6
_INTERVAL = 0.02
_PHASE = 2 * _INTERVAL
"""A report interval lies within it wherever it begins, so that one sees all of the probe."""
_GAINS = (1.25, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
_MEMORY = int(len(_GAINS) * _PHASE / _INTERVAL) + 2
_START_GAIN = 2.0
_GROWTH = 1.25
_PLATEAU = 3
_BURST = 0.002


@dataclasses.dataclass
class _Mark:
    """A report, and what had been sent by then.

    :param received: datagrams, by the report
    :param addressed: datagrams that were sent to this receiver, or to all
    :param sent: bytes that were sent to anyone
    """

    time: float
    received: int
    addressed: int
    sent: int


class _Receiver:
    def __init__(self) -> None:
        self.addressed = 0
        self.mark: _Mark | None = None
        self.delivered: collections.deque[float] = collections.deque(maxlen=_MEMORY)


class Pacer:
    """The rate of one stream of datagrams, in bytes a second."""

    def __init__(self, limit: float | None = None) -> None:
        """:param limit: never send faster than this, in bytes a second"""
        self._limit = limit or float("inf")
        self._receivers: dict[Hashable, _Receiver] = {}
        self._bottleneck = _START / 2
        self._plateau = 0
        self._full = 0.0
        self._round = 0.0
        self._next = 0.0
        self._idle = 0.0
        self._sent = 0
        self._addressed = 0
        self.rate = min(_START, self._limit)

    def delay(self, now: float) -> float:
        """Seconds until more may be sent; 0 if it may be now."""
        return max(0.0, self._next - now)

    def sent(self, size: int, datagrams: int, now: float, receiver: Hashable = None) -> None:
        """Datagrams were sent, ``size`` bytes in all, to a receiver or to all."""
        self._sent += size
        if receiver is None:
            self._addressed += datagrams
        else:
            self._receivers.setdefault(receiver, _Receiver()).addressed += datagrams
        starting = self._plateau < _PLATEAU
        gain = _START_GAIN if starting else _GAINS[int(now / _PHASE) % len(_GAINS)]
        self.rate = min(max(self._bottleneck * gain, _FLOOR), self._limit)
        if now - self._next > _INTERVAL:
            self._idle = now  # this process is late itself
        self._next = max(self._next, now - _BURST) + size / self.rate

    def idle(self, now: float) -> None:
        """There is nothing to send: what is delivered now tells nothing about the path."""
        self._idle = now

    def forget(self, receiver: Hashable) -> None:
        """The receiver has left."""
        self._receivers.pop(receiver, None)

    def report(self, receiver: Hashable, received: int, now: float) -> None:
        """A receiver's own count of datagrams since its beginning."""
        state = self._receivers.get(receiver)
        if state is None:
            state = self._receivers[receiver] = _Receiver()
        last = state.mark
        if last is not None and now - last.time < _INTERVAL and received >= last.received:
            return
        mark = _Mark(now, received, self._addressed + state.addressed, self._sent)
        if last is None or received < last.received:
            state.mark = mark
            return
        elapsed = now - last.time
        addressed = mark.addressed - last.addressed
        if not addressed:
            return
        state.mark = mark
        # What went to others by unicast had its part of the rate, but is not in this report.
        arrived = min((received - last.received) / addressed, 2.0)
        delivered = (mark.sent - last.sent) * arrived / elapsed
        limited = self._idle < last.time
        if limited or not state.delivered or delivered > max(state.delivered):
            state.delivered.append(delivered)
            self._adapt(now)

    def _adapt(self, now: float) -> None:
        bottleneck = min(
            max(receiver.delivered) for receiver in self._receivers.values() if receiver.delivered
        )
        if self._plateau < _PLATEAU:
            bottleneck = max(bottleneck, self._bottleneck)
            if now - self._round > _PHASE:
                self._plateau = self._plateau + 1 if bottleneck < self._full * _GROWTH else 0
                self._full = bottleneck
                self._round = now
        self._bottleneck = bottleneck
