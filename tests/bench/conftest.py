"""Fixtures of the benchmarks (`tests/run --bench`), which assert nothing about speed and print ratios, measured side by side.

The server calls fsync as in production. Where its files lie in memory, as they do by default, that costs nothing, and ratios
hang on no disk; BENCH_DIR names a directory on one. `db` is that of `tests/conftest.py`.
"""

import os
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.support.postgres import DEFAULT, Cluster

DURABLE = {"max_connections": "300", "shared_buffers": "256MB"}


@pytest.fixture(scope="session")
def durable() -> Iterator[Cluster]:
    """A server with fsync on."""
    cluster = Cluster(DEFAULT, DURABLE, os.environ.get("BENCH_DIR"))
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture
async def database(durable: Cluster) -> AsyncIterator[str]:
    """The DSN of a fresh, migrated database."""
    async with durable.database() as dsn:
        yield dsn
