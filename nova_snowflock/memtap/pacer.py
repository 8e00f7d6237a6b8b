# SPDX-License-Identifier: Apache-2.0
"""How fast background data may be sent, from what its receivers report.

The bottleneck is estimated as BBR does (Cardwell et al., ACM Queue 14(5), 2016): the most that was
delivered lately, probed with a little more from time to time. A loss that does not depend on the
rate, as on a bad link, therefore does not slow the sender down; a full queue does.
"""

import collections
from collections.abc import Hashable

_START = 100e6
_FLOOR = 1e6
_INTERVAL = 0.02
_LOSS = 0.02
_GAINS = (1.25, 0.9, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
_BURST = 0.002


class _Receiver:
    def __init__(self, now: float, received: int, expected: int) -> None:
        self.delivered: collections.deque[float] = collections.deque(maxlen=len(_GAINS) + 2)
        self.mark(now, received, expected)

    def mark(self, now: float, received: int, expected: int) -> None:
        self.time, self.received, self.expected = now, received, expected


class Pacer:
    """The rate of one stream of datagrams, in bytes a second."""

    def __init__(self, datagram: int, limit: float | None = None) -> None:
        """:param datagram: bytes in a datagram of the stream
        :param limit: never send faster than this, in bytes a second
        """
        self._datagram = datagram
        self._limit = limit or float("inf")
        self._receivers: dict[Hashable, _Receiver] = {}
        self._starting = True
        self._phase = 0
        self._next = 0.0
        self._idle = 0.0
        self.rate = min(_START, self._limit)

    def delay(self, now: float) -> float:
        """Seconds until more may be sent; 0 if it may be now."""
        return max(0.0, self._next - now)

    def sent(self, size: int, now: float) -> None:
        """``size`` bytes were sent."""
        self._next = max(self._next, now - _BURST) + size / self.rate

    def idle(self, now: float) -> None:
        """There is nothing to send: what is delivered now tells nothing about the path."""
        self._idle = now

    def forget(self, receiver: Hashable) -> None:
        """The receiver has left."""
        self._receivers.pop(receiver, None)

    def report(self, receiver: Hashable, received: int, expected: int, now: float) -> None:
        """A receiver's own counts of datagrams, since its beginning."""
        last = self._receivers.get(receiver)
        if last is None or expected < last.expected or received < last.received:
            self._receivers[receiver] = _Receiver(now, received, expected)
            return
        elapsed = now - last.time
        if elapsed < _INTERVAL or expected == last.expected:
            return
        delivered = (received - last.received) * self._datagram / elapsed
        lost = 1 - (received - last.received) / (expected - last.expected)
        limited = self._idle < last.time
        last.mark(now, received, expected)
        if limited or not last.delivered or delivered > max(last.delivered):
            last.delivered.append(delivered)
            self._adapt(lost)

    def _adapt(self, lost: float) -> None:
        bottleneck = min(
            max(receiver.delivered) for receiver in self._receivers.values() if receiver.delivered
        )
        self._starting = self._starting and lost <= _LOSS
        if self._starting:
            rate = max(self.rate, 2 * bottleneck)
        else:
            self._phase = (self._phase + 1) % len(_GAINS)
            rate = bottleneck * _GAINS[self._phase]
        self.rate = min(max(rate, _FLOOR), self._limit)
