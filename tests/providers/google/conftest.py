"""Fixtures for the tests of Google: a fake Gemini API, and a provider that calls it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.google_api import KEY, GoogleAPI
from tests.support.provider_harness import ProviderHarness

NEWEST = "gemini-nano-banana-2.1"
Harness = ProviderHarness[GoogleAPI]


@pytest.fixture(scope="module")
async def api() -> AsyncIterator[GoogleAPI]:
    async with GoogleAPI() as api:
        yield api


@pytest.fixture
async def harness(api: GoogleAPI, tmp_path: Path) -> AsyncIterator[Harness]:
    api.reset()
    harness = Harness("google", NEWEST, KEY, api, tmp_path)
    yield harness
    await harness.provider.aclose()
