# SPDX-License-Identifier: Apache-2.0
"""A memtap on a bad link: ``python -m tests.system.lossy 0.1`` does not hear a tenth of the data."""

import random
import sys

from nova_snowflock.memtap import fetcher
from nova_snowflock.memtap import memtap
from nova_snowflock.memtap import wire

LOSS = float(sys.argv[1])


class LossyOpener(wire.Opener):
    """Loses datagrams before it looks at them."""

    _random = random.Random(1)

    def open_into(
        self,
        sequence: int,
        header: memoryview,
        ciphertext: memoryview,
        payload: bytearray | memoryview,
    ) -> bool:
        if self._random.random() < LOSS:
            return False
        return super().open_into(sequence, header, ciphertext, payload)


class LossyFetcher(fetcher.Fetcher):
    opener_class = LossyOpener


class LossyMemtap(memtap.Memtap):
    fetcher_class = LossyFetcher


if __name__ == "__main__":
    raise SystemExit(memtap.main(LossyMemtap))
