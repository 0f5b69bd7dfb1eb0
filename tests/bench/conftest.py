"""Benchmarks: `tests/run --bench`. They assert nothing about speed; they print ratios, measured side by side.

The server writes to disk as one in production does (fsync on).
"""

from collections.abc import AsyncIterator, Iterator

import asyncpg
import pytest

from tests.postgres import DEFAULT, Cluster, connect

DURABLE = {"max_connections": "100", "shared_buffers": "256MB"}


@pytest.fixture(scope="session")
def durable() -> Iterator[Cluster]:
    """A server that loses nothing in a power cut."""
    cluster = Cluster(DEFAULT, DURABLE)
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
async def database(durable: Cluster) -> AsyncIterator[str]:
    """The DSN of a fresh, migrated database."""
    async with durable.database() as dsn:
        yield dsn


@pytest.fixture
async def db(database: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """A connection to `database` as `postgres`; json and jsonb are Python objects."""
    connection = await connect(database)
    yield connection
    await connection.close()
