"""Fixtures of the benchmarks (`tests/run --bench`), which assert nothing about speed and print ratios, measured side by side.

The server writes to disk as in production (fsync on). `db` is that of `tests/conftest.py`.
"""

from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.postgres import DEFAULT, Cluster

DURABLE = {"max_connections": "100", "shared_buffers": "256MB"}


@pytest.fixture(scope="session")
def durable() -> Iterator[Cluster]:
    """A server with fsync on."""
    cluster = Cluster(DEFAULT, DURABLE)
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
async def database(durable: Cluster) -> AsyncIterator[str]:
    """The DSN of a fresh, migrated database."""
    async with durable.database() as dsn:
        yield dsn
