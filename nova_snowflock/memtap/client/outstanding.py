# SPDX-License-Identifier: Apache-2.0
"""The pages that were asked for and have not arrived yet."""

from collections.abc import Iterator
import dataclasses
import math

from nova_snowflock.memtap import wire
from nova_snowflock.memtap.client import store as page_store

BLOCK = 16
"""Pages, aligned, that are asked for, waited for and asked for again together."""

_FAULT_TIMEOUT = 0.005
_BACKGROUND_TIMEOUT = 0.2
_REPAIR_TIMEOUT = 0.01
_MAX_TIMEOUT = 1.0


class Timeout:
    """How long to wait for an answer, in seconds (RFC 6298)."""

    def __init__(self, least: float) -> None:
        self.value = 4 * least
        self._least = least
        self.mean = 0.0
        """How long answers have taken lately; 0 before the first."""
        self._deviation = 0.0

    def sample(self, elapsed: float) -> None:
        """The answer to a request that was sent once took this long."""
        if self.mean:
            self._deviation += (abs(elapsed - self.mean) - self._deviation) / 4
            self.mean += (elapsed - self.mean) / 8
        else:
            self.mean, self._deviation = elapsed, elapsed / 2
        self.value = min(max(self.mean + 4 * self._deviation, self._least), _MAX_TIMEOUT)

    def back_off(self) -> None:
        """No answer came in time: perhaps answers take longer now."""
        self.value = min(2 * self.value, _MAX_TIMEOUT)


@dataclasses.dataclass(slots=True, eq=False)
class Request:
    """Pages of one block that were asked for.

    :param wanted: a bit for each page of the block that is still to come
    :param fault: a guest waits for some of them
    :param background: the block was first asked for because it is missing
    :param sent: when it was sent last
    :param due: when it will be sent again
    :param attempts: how often it was sent since something of it came last
    :param repeated: it was sent more than once, so nobody knows to what an answer is one
    """

    file: page_store.StoredFile
    block: int
    wanted: int
    fault: bool
    background: bool
    sent: float
    due: float
    attempts: int = 1
    repeated: bool = False


def runs(file: page_store.StoredFile, block: int, bits: int) -> list[wire.Run]:
    """The pages of a block that have a bit, the first page's the lowest."""
    found = []
    page = block * BLOCK
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits >>= skip
        count = (~bits & bits + 1).bit_length() - 1
        found.append(wire.Run(file.number, page + skip, count))
        page += skip + count
        bits >>= count
    return found


class Outstanding:
    """All requests."""

    def __init__(self) -> None:
        self.background = 0
        """How many of them are background requests."""
        self.due = math.inf
        """When to look for overdue requests, at the latest."""
        self.fault_timeout = Timeout(_FAULT_TIMEOUT)
        self.background_timeout = Timeout(_BACKGROUND_TIMEOUT)
        self._requests: dict[int, Request] = {}
        # Those of which some pages have come since they were sent.
        self._begun: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._requests.values()))

    def has(self, file: page_store.StoredFile, block: int) -> bool:
        """Whether some pages of the block are asked for."""
        return _key(file, block) in self._requests

    def timeout(self, request: Request) -> Timeout:
        """How long an answer to such a request may take."""
        return self.fault_timeout if request.fault else self.background_timeout

    def on_its_way(self, file: page_store.StoredFile, block: int) -> int:
        """A bit for each page of the block that was asked for because a guest waits."""
        request = self._requests.get(_key(file, block))
        return request.wanted if request is not None and request.fault else 0

    def add(
        self, file: page_store.StoredFile, block: int, bits: int, now: float, *, background: bool
    ) -> Request:
        """Note that these pages of a block are asked for now."""
        key = _key(file, block)
        request = self._requests.get(key)
        if request is None:
            timeout = self.background_timeout if background else self.fault_timeout
            due = now + timeout.value
            request = Request(file, block, bits, not background, background, now, due)
            self._requests[key] = request
            self.background += background
        else:
            request.wanted |= bits
            request.fault = True
            request.due = min(request.due, now + self.fault_timeout.value)
        if request.due < self.due:
            self.due = request.due
        return request

    def arrived(self, file: page_store.StoredFile, page: int, count: int, now: float) -> bool:
        """Pages are there; returns whether this completes a request."""
        done = False
        end = page + count
        for block in range(page // BLOCK, (end - 1) // BLOCK + 1):
            key = _key(file, block)
            request = self._requests.get(key)
            if request is None:
                continue
            first = max(page - block * BLOCK, 0)
            after = min(end - block * BLOCK, BLOCK)
            request.wanted &= ~((1 << after) - (1 << first))
            if key not in self._begun:
                self._begin(key, request, now)
            if not request.wanted:
                del self._requests[key]
                del self._begun[key]
                self.background -= request.background
                done = True
        return done

    def _begin(self, key: int, request: Request, now: float) -> None:
        """The first of an answer is here."""
        self._begun[key] = request
        request.attempts = 1
        if request.repeated:
            return
        # A fault may have joined a background request, or come late to it.
        if not request.fault:
            self.background_timeout.sample(now - request.sent)
        elif not request.background:
            self.fault_timeout.sample(now - request.sent)

    def stranded(self, file: page_store.StoredFile, page: int) -> list[Request]:
        """Background requests answered in part, if the server has gone on to ``page`` since.

        It sends a block's pages one after another, so the others of these blocks are lost.
        """
        current = _key(file, page // BLOCK)
        return [
            request
            for key, request in self._begun.items()
            if key != current and request.background and not request.fault
        ]

    def overdue(self, now: float) -> list[Request]:
        """Requests whose time is over; also finds out when to look again."""
        overdue = []
        self.due = math.inf
        for request in self._requests.values():
            if request.due <= now:
                overdue.append(request)
            elif request.due < self.due:
                self.due = request.due
        return overdue

    def renew(self, request: Request, now: float) -> None:
        """A request is sent again."""
        self._begun.pop(_key(request.file, request.block), None)
        request.sent = now
        timeout = self.fault_timeout.value if request.fault else _REPAIR_TIMEOUT
        request.due = now + min(timeout * 2 ** min(request.attempts, 10), _MAX_TIMEOUT)
        request.attempts += 1
        request.repeated = True
        if request.due < self.due:
            self.due = request.due


def _key(file: page_store.StoredFile, block: int) -> int:
    return file.number << 48 | block
