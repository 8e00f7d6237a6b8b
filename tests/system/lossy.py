# SPDX-License-Identifier: Apache-2.0
"""A memtap on a bad link, which does not hear a part of what is sent to it."""

import os
import random
import subprocess
import sys

from nova_snowflock.memtap import spec as process_spec
from nova_snowflock.memtap import wire
from nova_snowflock.memtap.client import fetcher
from nova_snowflock.memtap.client import fuse
from nova_snowflock.memtap.client import memtap


class LossyOpener(wire.Opener):
    """Loses datagrams before it looks at them."""

    loss = 0.0
    _random = random.Random(1)

    def open_into(
        self,
        sequence: int,
        header: memoryview,
        ciphertext: memoryview,
        payload: bytearray | memoryview,
    ) -> bool:
        if self._random.random() < self.loss:
            return False
        return super().open_into(sequence, header, ciphertext, payload)


class LossyFetcher(fetcher.Fetcher):
    opener_class = LossyOpener


class LossyMemtap(memtap.Memtap):
    fetcher_class = LossyFetcher


def start(spec: process_spec.MemtapSpec, loss: float) -> None:
    """Start one as :func:`nova_snowflock.memtap.process.start_memtap` starts a memtap.

    :param loss: the part of all datagrams that it loses
    :raises CalledProcessError: it could not be set up
    """
    mount = process_spec.mount_path(spec.run_directory)
    os.makedirs(mount, mode=0o700)
    connection = fuse.mount(mount)
    try:
        subprocess.run(
            (sys.executable, "-m", "tests.system.lossy", str(connection), str(loss)),
            input=process_spec.encode(spec),
            pass_fds=(connection,),
            check=True,
            stdout=subprocess.DEVNULL,
        )
    finally:
        os.close(connection)


if __name__ == "__main__":
    LossyOpener.loss = float(sys.argv[2])
    raise SystemExit(memtap.main(LossyMemtap))
