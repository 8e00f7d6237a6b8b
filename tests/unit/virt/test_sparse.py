# SPDX-License-Identifier: Apache-2.0
"""Copies of sparse files, whatever the file system and the kernel can do."""

import errno
import os
import pathlib
import random

import pytest

from nova_snowflock.virt.qemu import sparse

MIB = 1 << 20
CONTENT = random.Random(0).randbytes(3 * MIB)


@pytest.fixture
def source(tmp_path: pathlib.Path) -> pathlib.Path:
    """Data, a hole, data, a hole."""
    path = tmp_path / "source"
    with open(path, "wb") as file:
        file.write(CONTENT[:4096])
        file.seek(4 * MIB)
        file.write(CONTENT)
        file.truncate(8 * MIB + 100)
    return path


def refuse(number: int, after: int = 0) -> object:
    """copy_file_range(2) that copies ``after`` bytes at a time, and then fails."""
    original, calls = os.copy_file_range, []

    def copy_file_range(source: int, target: int, count: int, *offsets: int) -> int:
        calls.append(count)
        if after and len(calls) < 3:
            return original(source, target, min(count, after), *offsets)
        raise OSError(number, os.strerror(number))

    return copy_file_range


def check(source: pathlib.Path) -> None:
    target = source.with_name("target")
    data = sparse.copy(str(source), str(target))
    assert target.read_bytes() == source.read_bytes()
    assert 4096 + len(CONTENT) <= data < 4 * MIB
    assert target.stat().st_blocks * 512 < 4 * MIB
    assert target.stat().st_mode & 0o777 == 0o600


def test_copy(source: pathlib.Path) -> None:
    check(source)


@pytest.mark.parametrize("number", [errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
@pytest.mark.parametrize("after", [0, 5000])
def test_copied_by_hand(
    source: pathlib.Path, monkeypatch: pytest.MonkeyPatch, number: int, after: int
) -> None:
    monkeypatch.setattr(os, "copy_file_range", refuse(number, after))
    check(source)


def test_nothing_is_copied_by_the_kernel(
    source: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", lambda *_: 0)
    check(source)


def test_file_that_is_empty(tmp_path: pathlib.Path) -> None:
    (tmp_path / "source").touch()
    assert sparse.copy(str(tmp_path / "source"), str(tmp_path / "target")) == 0
    assert (tmp_path / "target").read_bytes() == b""


def test_no_room(source: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "copy_file_range", refuse(errno.ENOSPC, 5000))
    with pytest.raises(OSError, match="No space left"):
        sparse.copy(str(source), str(source.with_name("target")))
    assert os.listdir(source.parent) == ["source"]


def test_what_is_there_is_not_replaced(source: pathlib.Path) -> None:
    source.with_name("target").write_text("another's")
    with pytest.raises(FileExistsError):
        sparse.copy(str(source), str(source.with_name("target")))
    assert source.with_name("target").read_text() == "another's"
