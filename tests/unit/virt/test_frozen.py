# SPDX-License-Identifier: Apache-2.0
"""The record of a frozen process, and what a process is known by."""

import os
import pathlib

import pytest

from nova_snowflock.virt.qemu import frozen
from nova_snowflock.virt.qemu import procfs

FILE = {"number": 1, "name": "memory", "size": 4096, "kind": "process", "ranges": [[4096, 4096]]}


def test_record_is_found(tmp_path: pathlib.Path) -> None:
    recorded = frozen.Frozen(procfs.Process(4711, 12345), FILE)
    recorded.record(str(tmp_path))
    assert frozen.Frozen.find(str(tmp_path)) == recorded
    assert (tmp_path / "frozen").stat().st_mode & 0o777 == 0o600


def test_no_record(tmp_path: pathlib.Path) -> None:
    assert frozen.Frozen.find(str(tmp_path)) is None


def test_record_that_was_cut_short(tmp_path: pathlib.Path) -> None:
    (tmp_path / "frozen").write_text('{"pid": 47')
    assert frozen.Frozen.find(str(tmp_path)) is None


def test_record_is_not_replaced(tmp_path: pathlib.Path) -> None:
    recorded = frozen.Frozen(procfs.Process(4711, 12345), FILE)
    recorded.record(str(tmp_path))
    with pytest.raises(FileExistsError):
        recorded.record(str(tmp_path))


def test_process_is_known_by_its_start() -> None:
    own = procfs.Process.find(os.getpid())
    assert own.alive()
    assert not procfs.Process(own.pid, own.start_time + 1).alive()
    with pytest.raises(ProcessLookupError):
        procfs.Process.find(2**22 + 1)  # beyond the kernel's PID_MAX_LIMIT


def test_maps_of_this_process() -> None:
    mappings = procfs.maps(os.getpid())
    (stack,) = (mapping for mapping in mappings if mapping.path == "[stack]")
    assert stack.mode == "rw-p"
    assert stack.inode == 0
    assert any(mapping.mode == "r-xp" and mapping.inode for mapping in mappings)
    assert all(mapping.start < mapping.end for mapping in mappings)


def test_status_of_this_process() -> None:
    assert procfs.status("self")["Pid"] == str(os.getpid())
