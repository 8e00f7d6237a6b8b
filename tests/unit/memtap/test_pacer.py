# SPDX-License-Identifier: Apache-2.0
"""The pacer, against simulated paths: a bottleneck with a queue before each receiver."""

import collections
import dataclasses
import random

import pytest

from nova_snowflock.memtap.server import pacer

DATAGRAM = 1414
BATCH = 45
REPORT = 0.02


@dataclasses.dataclass
class Receiver:
    """The end of a path that carries ``rate`` bytes a second and queues for ``queue`` seconds."""

    rate: float
    loss: float = 0.0
    queue: float = 0.05
    received: int = 0
    expected: int = 0
    _sent: int = 0
    _free: float = 0.0
    _under_way: collections.deque[tuple[float, int, int]] = dataclasses.field(
        default_factory=collections.deque
    )

    def take(self, now: float, chosen: random.Random) -> None:
        """A batch was sent to it."""
        self._free = max(self._free, now)
        arriving = 0
        for _ in range(BATCH):
            self._sent += 1
            if self._free - now < self.queue:
                self._free += DATAGRAM / self.rate
                arriving += chosen.random() >= self.loss
        if arriving:
            self._under_way.append((self._free, arriving, self._sent))

    def count(self, now: float) -> None:
        """What has arrived so far, and what has been sent as far as that tells."""
        while self._under_way and self._under_way[0][0] <= now:
            _, arrived, self.expected = self._under_way.popleft()
            self.received += arrived


def run(
    pace: pacer.Pacer,
    receivers: dict[str, Receiver],
    seconds: float,
    start: float = 0.0,
    duty: float = 1.0,
) -> list[float]:
    """Send for so long; the rates that were used in the second half.

    :param duty: the part of the time in which there is something to send
    """
    chosen = random.Random(1)
    now = report = start
    rates = []
    while now < start + seconds:
        if now % 1.0 < duty:
            now += pace.delay(now) + 1e-6
            pace.sent(BATCH * DATAGRAM, BATCH, now)
            for receiver in receivers.values():
                receiver.take(now, chosen)
            if now > start + seconds / 2:
                rates.append(pace.rate)
        else:
            now += 0.01
            pace.idle(now)
        if now >= report:
            report = now + REPORT
            for name, receiver in receivers.items():
                receiver.count(now)
                pace.report(name, receiver.received, now)
    return rates


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


@pytest.mark.parametrize("rate", [10e6, 100e6, 600e6])
def test_converges_to_the_bottleneck(rate: float) -> None:
    rates = run(pacer.Pacer(), {"a": Receiver(rate)}, 5.0)
    assert 0.7 * rate < mean(rates) < 1.4 * rate


def test_the_slowest_receiver_counts() -> None:
    receivers = {"a": Receiver(500e6), "b": Receiver(50e6)}
    rates = run(pacer.Pacer(), receivers, 5.0)
    assert 0.7 * 50e6 < mean(rates) < 1.4 * 50e6


@pytest.mark.parametrize("loss", [0.01, 0.1])
def test_random_loss_does_not_collapse_it(loss: float) -> None:
    rates = run(pacer.Pacer(), {"a": Receiver(200e6, loss)}, 20.0)
    assert mean(rates) > 0.5 * 200e6


@pytest.mark.parametrize("queue", [0.005, 0.05])
def test_a_loss_free_path_loses_little(queue: float) -> None:
    pace, receiver = pacer.Pacer(), Receiver(100e6, queue=queue)
    run(pace, {"a": receiver}, 3.0)
    received, expected = receiver.received, receiver.expected
    run(pace, {"a": receiver}, 10.0, start=3.0)
    assert receiver.received - received > 0.9 * (receiver.expected - expected)


def test_follows_a_path_that_changes() -> None:
    pace = pacer.Pacer()
    receiver = Receiver(400e6)
    run(pace, {"a": receiver}, 3.0)
    receiver.rate = 40e6
    assert mean(run(pace, {"a": receiver}, 5.0, start=3.0)) < 1.5 * 40e6
    receiver.rate = 400e6
    assert mean(run(pace, {"a": receiver}, 20.0, start=8.0)) > 0.5 * 400e6


def test_pauses_tell_nothing() -> None:
    """Less is delivered where less was there to send; that is not the path's fault."""
    pace = pacer.Pacer()
    receivers = {"a": Receiver(200e6)}
    run(pace, receivers, 3.0)
    run(pace, receivers, 20.0, start=3.0, duty=0.05)
    assert pace.rate > 0.5 * 200e6


def test_the_limit_holds() -> None:
    pace = pacer.Pacer(limit=20e6)
    rates = run(pace, {"a": Receiver(500e6)}, 3.0)
    assert max(rates) <= 20e6
    now = 100.0
    sent = 0
    while now < 110.0:
        now += pace.delay(now) + 1e-6
        pace.sent(BATCH * DATAGRAM, BATCH, now)
        sent += BATCH * DATAGRAM
    assert sent < 1.05 * 10 * 20e6


def test_never_stands_still() -> None:
    pace = pacer.Pacer()
    run(pace, {"a": Receiver(1000.0)}, 10.0)
    assert pace.rate > 0
    assert pace.delay(10.0) < 10.0


def test_a_receiver_that_has_left() -> None:
    pace = pacer.Pacer()
    fast = Receiver(300e6)
    run(pace, {"fast": fast, "slow": Receiver(3e6)}, 3.0)
    pace.forget("slow")
    assert mean(run(pace, {"fast": fast}, 20.0, start=3.0)) > 0.5 * 300e6


def test_a_receiver_that_begins_anew() -> None:
    pace = pacer.Pacer()
    receiver = Receiver(100e6)
    run(pace, {"a": receiver}, 3.0)
    receiver = Receiver(100e6)
    assert 0.7 * 100e6 < mean(run(pace, {"a": receiver}, 5.0, start=3.0)) < 1.4 * 100e6


def test_lying_reports() -> None:
    """Whatever a memtap says, the rate stays a rate."""
    pace = pacer.Pacer(limit=1e9)
    chosen = random.Random(1)
    for step in range(2000):
        received = chosen.choice((0, 1, step, 1 << 63, (1 << 64) - 1))
        pace.sent(BATCH * DATAGRAM, BATCH, step / 10)
        pace.report("liar", received, step / 10)
        assert 0 < pace.rate <= 1e9
        assert 0 <= pace.delay(step / 10) < 3600
