# SPDX-License-Identifier: Apache-2.0
"""The forks of a host outlive whoever knows of them, and only their owner reads them."""

import os
import pathlib
import uuid

import pytest

from nova_snowflock import exception
from nova_snowflock.virt import records

KEY = bytes(range(32))


def fork(fork_id: str | None = None) -> records.Fork:
    return records.Fork(
        id=fork_id or str(uuid.uuid4()),
        parent=str(uuid.uuid4()),
        project_id="demo",
        created="2026-11-20T13:00:00.000+00:00",
        confirmed=False,
        checkpoint=False,
        keep=60,
        params={"job": "7"},
        clones=3,
        pause=0.012,
        stages={"suspend": 0.002},
        after={},
        size=1 << 28,
        vcpus=1,
        image_ref=str(uuid.uuid4()),
        key=KEY,
        descriptor=b"\0descriptor\xff",
    )


def test_fork_is_found_again(tmp_path: pathlib.Path) -> None:
    kept = fork()
    records.Records(str(tmp_path)).put(kept)
    later = records.Records(str(tmp_path))
    assert later.get(kept.id) == kept
    assert list(later) == [kept]


def test_change_replaces_what_was_known(tmp_path: pathlib.Path) -> None:
    known = records.Records(str(tmp_path))
    kept = fork()
    known.put(kept)
    kept.clones = 9
    known.put(kept)
    assert [found.clones for found in known] == [9]
    assert len(os.listdir(tmp_path)) == 1


def test_removed_fork_is_unknown(tmp_path: pathlib.Path) -> None:
    known = records.Records(str(tmp_path))
    kept = fork()
    known.put(kept)
    known.remove(kept.id)
    known.remove(kept.id)
    with pytest.raises(exception.ForkNotFound, match=kept.id):
        known.get(kept.id)
    assert list(known) == []


def test_nobody_else_reads_it(tmp_path: pathlib.Path) -> None:
    directory = tmp_path / "forks"
    known = records.Records(str(directory))
    kept = fork()
    known.put(kept)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / f"{kept.id}.json").stat().st_mode & 0o777 == 0o600


def test_secrets_are_not_shown() -> None:
    kept = fork()
    assert not {"key", "descriptor"} & kept.public().keys()
    assert str(KEY) not in repr(kept)
    assert "descriptor" not in repr(kept)


@pytest.mark.parametrize("name", ["../../etc/passwd", "x" * 36, ""])
def test_id_is_a_uuid(tmp_path: pathlib.Path, name: str) -> None:
    with pytest.raises(ValueError, match="UUID"):
        records.Records(str(tmp_path)).get(name)
