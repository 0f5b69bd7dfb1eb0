"""Chromium in front of a real `image-jobs dev`: what the tests here see is what its user sees."""

import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from playwright.async_api import Browser

from tests.browser.window import Window, chromium, database, opened
from tests.devs import running
from tests.postgres import free_port


@pytest.fixture(scope="session")
def directory() -> Iterator[Path]:
    """One that `nobody` can reach: as root Postgres is `nobody`."""
    path = Path(tempfile.mkdtemp(prefix="image-jobs-canvas-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
async def url(directory: Path) -> AsyncIterator[str]:
    """Of the canvas."""
    port = free_port()
    async with running(directory, port, "--data", "data"):
        yield f"http://127.0.0.1:{port}/canvas"


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as started:
        yield started


@pytest.fixture
async def open_window(browser: Browser) -> AsyncIterator[Callable[..., Any]]:
    """Opens a window of somebody's; at the end no window may have had anything to complain about in its console."""
    async with AsyncExitStack() as windows:

        async def open_one(address: str, **options: Any) -> Window:
            return await windows.enter_async_context(opened(browser, address, **options))

        yield open_one


@pytest.fixture
async def db(url: str, directory: Path) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """The database behind the canvas."""
    async with database(directory / "data") as connection:
        yield connection


@pytest.fixture
async def window(url: str, open_window: Callable[..., Any]) -> Window:
    """A new workflow, with nothing in it."""
    return await open_window(f"{url}#{uuid4()}")
