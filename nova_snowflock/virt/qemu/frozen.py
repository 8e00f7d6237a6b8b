# SPDX-License-Identifier: Apache-2.0
"""The frozen process that holds an image's memory, and the record it is found again by."""

from collections.abc import Iterator
import contextlib
import dataclasses
import json
import os
from typing import Any

from nova_snowflock.virt.qemu import procfs

_RECORD = "frozen"


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A frozen process and the image's file in it.

    :param file: as the memory server's command ``publish`` takes it
    """

    process: procfs.Process
    file: dict[str, Any]

    @classmethod
    def find(cls, run_directory: str) -> "Frozen | None":
        """What was recorded in the image's run directory. The process may have ended."""
        try:
            with open(os.path.join(run_directory, _RECORD), encoding="utf-8") as file:
                record = json.load(file)
        except FileNotFoundError:
            return None
        except ValueError:
            # It was cut short, so the process was never settled: it ended with whoever froze it.
            return None
        return cls(procfs.Process(record["pid"], record["start_time"]), record["file"])

    def record(self, run_directory: str) -> None:
        """Have :meth:`find` find it. To be done before it is settled, or it could get lost.

        :raises OSError: it cannot be written, or is there already
        """
        path = os.path.join(run_directory, _RECORD)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump({**dataclasses.asdict(self.process), "file": self.file}, file)

    def forget(self, run_directory: str) -> None:
        """Have :meth:`find` find it no more, once it has ended."""
        os.unlink(os.path.join(run_directory, _RECORD))

    @contextlib.contextmanager
    def opened(self) -> Iterator[tuple[int, int]]:
        """Descriptors of its memory and its page map (/proc/PID/mem and pagemap)."""
        with contextlib.ExitStack() as stack:
            fds = []
            for name in ("mem", "pagemap"):
                fd = os.open(f"/proc/{self.process.pid}/{name}", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, fd)
                fds.append(fd)
            yield fds[0], fds[1]
