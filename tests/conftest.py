# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests."""

from collections.abc import Iterator

import pytest

from tests import emulation


@pytest.fixture(scope="session")
def hosts() -> Iterator[list[emulation.Host]]:
    """Three emulated hosts, shared by the tests of a session: leave them as they were."""
    with emulation.hosts(3) as members:
        yield members
