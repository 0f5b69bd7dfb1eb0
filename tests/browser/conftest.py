"""Chromium in front of a real `image-jobs dev`."""

import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from playwright.async_api import Browser, expect

from tests.support.dev_process import running
from tests.support.postgres import free_port
from tests.support.window import Window, chromium, database, opened

expect.set_options(timeout=20_000)  # here, for each file alike: a machine may be busy


@pytest.fixture(scope="session")
def directory() -> Iterator[Path]:
    """A directory that the user `nobody` can reach: as root, Postgres runs as `nobody`."""
    path = Path(tempfile.mkdtemp(prefix="image-jobs-canvas-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
async def url(directory: Path) -> AsyncIterator[str]:
    """Start dev, and return the address of the canvas."""
    port = free_port()
    async with running(directory, port, "--data", "data"):
        yield f"http://127.0.0.1:{port}/canvas"


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as started:
        yield started


@pytest.fixture
async def open_window(browser: Browser) -> AsyncIterator[Callable[..., Any]]:
    """Open a window. At the end no window may have errors or warnings in its console."""
    async with AsyncExitStack() as windows:

        async def open_one(address: str, **options: Any) -> Window:
            return await windows.enter_async_context(opened(browser, address, **options))

        yield open_one


@pytest.fixture
async def db(url: str, directory: Path) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    """Connect to the database behind the canvas."""
    async with database(directory / "data") as connection:
        yield connection


@pytest.fixture
async def window(url: str, open_window: Callable[..., Any]) -> Window:
    """Open a new, empty workflow."""
    return await open_window(f"{url}#{uuid4()}")
