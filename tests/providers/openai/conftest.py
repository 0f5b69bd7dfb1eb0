"""Fixtures for the tests of OpenAI: a fake Images API, and a provider that calls it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.fakes.openai_api import OpenAIAPI
from tests.support.openai_images_harness import Harness, provider


@pytest.fixture(scope="module")
async def api() -> AsyncIterator[OpenAIAPI]:
    async with OpenAIAPI() as api:
        yield api


@pytest.fixture
async def harness(api: OpenAIAPI, tmp_path: Path) -> AsyncIterator[Harness]:
    api.reset()
    harness = Harness(api, provider(api.url), tmp_path)
    yield harness
    await harness.provider.aclose()
