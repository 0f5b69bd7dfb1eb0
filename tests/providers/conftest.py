"""Fixtures for tests of all providers: a server that sends anything, and all that call it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.provider_callers import AnyAPI, Callers


@pytest.fixture(scope="session")
async def any_api() -> AsyncIterator[AnyAPI]:
    async with AnyAPI() as api:
        yield api


@pytest.fixture
async def callers(any_api: AnyAPI, tmp_path: Path) -> AsyncIterator[Callers]:
    callers = Callers(any_api, tmp_path)
    yield callers
    for provider in callers.providers.values():
        await provider.aclose()
