# SPDX-License-Identifier: Apache-2.0
"""A memtap whose network loses datagrams: ``python -m bench.lossy`` is memtap but for that."""

import os
import random
import subprocess
import sys

from nova_snowflock.memtap import fetcher
from nova_snowflock.memtap import fuse
from nova_snowflock.memtap import memtap
from nova_snowflock.memtap import spec
from nova_snowflock.memtap import wire


class Opener(wire.Opener):
    """Loses datagrams by chance, as if they had never come."""

    rate = 0.0
    _random = random.Random(1)

    def open_into(
        self,
        sequence: int,
        header: memoryview,
        ciphertext: memoryview,
        payload: bytearray | memoryview,
    ) -> bool:
        if self._random.random() < self.rate:
            return False
        return super().open_into(sequence, header, ciphertext, payload)


class Fetcher(fetcher.Fetcher):
    opener_class = Opener


class Memtap(memtap.Memtap):
    fetcher_class = Fetcher


def start(memtap_spec: spec.MemtapSpec, rate: float) -> None:
    """Start one as :func:`nova_snowflock.memtap.process.start_memtap` starts a memtap.

    :raises RuntimeError: it could not be set up; the message says why
    """
    mount = os.path.join(memtap_spec.run_directory, memtap.MOUNT)
    os.makedirs(mount, mode=0o700)
    connection = fuse.mount(mount)
    try:
        started = subprocess.run(
            (sys.executable, "-m", "bench.lossy", str(connection), str(rate)),
            input=spec.encode(memtap_spec),
            capture_output=True,
            pass_fds=(connection,),
        )
    finally:
        os.close(connection)
    if started.returncode:
        raise RuntimeError((started.stdout + started.stderr).decode(errors="replace"))


if __name__ == "__main__":
    Opener.rate = float(sys.argv[2])
    raise SystemExit(memtap.main(Memtap))
