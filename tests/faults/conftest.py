"""The world of these tests: see `tests/faults/world.py`."""

from collections.abc import AsyncIterator

import pytest

from tests.faults.world import World, open_world


@pytest.fixture
async def world(database: str) -> AsyncIterator[World]:
    async with open_world(database) as it:
        yield it
