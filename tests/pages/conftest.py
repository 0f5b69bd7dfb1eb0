"""The dashboard's application, asked as its page asks it."""

from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from daemon.pages.dashboard import dashboard_app

TOKEN = "the-token-of-this-start"
HERE = "http://127.0.0.1:54380"


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    (tmp_path / "index.html").write_text("the page")
    (tmp_path / "main.js").write_text("its script")
    return tmp_path


@pytest.fixture
def token() -> str:
    return TOKEN


@pytest.fixture
async def client(database: str, bundle: Path) -> AsyncIterator[httpx.AsyncClient]:
    """A page that has the token."""
    headers = {"authorization": f"Bearer {TOKEN}", "origin": HERE, "sec-fetch-site": "same-origin"}
    async with (
        dashboard_app(database, TOKEN, bundle) as app,
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HERE, headers=headers) as opened,
    ):
        yield opened
