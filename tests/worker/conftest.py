"""A worker that the tests of its steps share."""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from tests.support.shop import Shop, open_shop


@pytest.fixture
async def shop(database: str, db: asyncpg.Connection) -> AsyncIterator[Shop]:
    """A worker under way, of this test alone."""
    async with open_shop(database, db) as shop:
        yield shop
