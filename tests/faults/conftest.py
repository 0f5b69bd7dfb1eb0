"""The fixture of these tests: see `tests/support/fault_harness.py`."""

from collections.abc import AsyncIterator

import pytest

from tests.support.fault_harness import FaultHarness, fault_harness


@pytest.fixture
async def harness(database: str) -> AsyncIterator[FaultHarness]:
    async with fault_harness(database) as harness:
        yield harness
