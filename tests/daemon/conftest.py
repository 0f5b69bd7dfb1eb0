"""Daemons that the tests of a module share, and fakes of APIs."""

from collections.abc import AsyncIterator

import pytest

from tests.fakes.midjourney_api import MidjourneyAPI
from tests.fakes.openai_api import OpenAIAPI
from tests.fakes.openai_responses import ResponsesAPI
from tests.support.multi_provider_harness import MultiProviderHarness, multi_provider_harness
from tests.support.openai_harness import OpenAIHarness, openai_harness
from tests.support.postgres import Cluster


@pytest.fixture(scope="module")
async def shared_openai(postgres: Cluster) -> AsyncIterator[OpenAIHarness]:
    """A daemon with the Images API."""
    async with OpenAIAPI() as api, postgres.database() as dsn, openai_harness(dsn, api) as harness:
        yield harness


@pytest.fixture
async def openai(shared_openai: OpenAIHarness) -> OpenAIHarness:
    """The shared daemon; the API is as new, and nothing is blocked."""
    shared_openai.api.reset()
    await shared_openai.reset_limits()
    return shared_openai


@pytest.fixture(scope="module")
async def shared_providers(postgres: Cluster) -> AsyncIterator[MultiProviderHarness]:
    """A daemon with OpenAI, Google and Stability AI."""
    async with postgres.database() as dsn, multi_provider_harness(dsn) as harness:
        yield harness


@pytest.fixture
async def providers(shared_providers: MultiProviderHarness) -> MultiProviderHarness:
    """The shared daemon; the APIs are as new, and nothing is blocked or limited."""
    await shared_providers.reset()
    return shared_providers


@pytest.fixture
async def responses_api() -> AsyncIterator[ResponsesAPI]:
    """A fake of OpenAI's Responses API."""
    async with ResponsesAPI() as api:
        yield api


@pytest.fixture
async def midjourney_api() -> AsyncIterator[MidjourneyAPI]:
    """A fake of midjourney-proxy."""
    async with MidjourneyAPI() as api:
        api.reset()  # the stages hold its address, which is known only now
        yield api
