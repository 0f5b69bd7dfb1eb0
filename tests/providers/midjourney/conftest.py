"""Fixtures for the tests of Midjourney: a fake proxy, and a provider that calls it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.midjourney_api import MidjourneyAPI
from tests.support.midjourney_provider_harness import Harness


@pytest.fixture(scope="module")
async def api() -> AsyncIterator[MidjourneyAPI]:
    async with MidjourneyAPI() as api:
        yield api


@pytest.fixture
async def harness(api: MidjourneyAPI, tmp_path: Path) -> AsyncIterator[Harness]:
    api.reset()
    harness = Harness(api, tmp_path)
    yield harness
    await harness.provider.aclose()
