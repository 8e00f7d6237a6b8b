# SPDX-License-Identifier: Apache-2.0
"""What programs in a guest talk to."""

from collections.abc import Iterator
import pathlib

import pytest

from tests.unit.guest import agents


@pytest.fixture
def host(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[agents.Host]:
    """An agent where programs look for it; nothing that it is asked makes no sense."""
    host = agents.Host(tmp_path / "guest.sock")
    monkeypatch.setenv("SNOWFLOCK_SOCKET", host.path)
    yield host
    host.close()
    assert host.wrong == []
