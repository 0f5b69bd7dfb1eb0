"""The page's server: to whom it gives a session, and what it says where there is no page."""

from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from daemon.dev.api import one_port
from daemon.dev.canvas import VISITOR, WORKFLOW, canvas_app
from daemon.dev.keys import make_keys

KEYS = make_keys("a secret of at least thirty-two characters")
HERE = "http://127.0.0.1:54321"


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    (tmp_path / "index.html").write_text("the page")
    (tmp_path / "main.js").write_text("its script")
    app = one_port({"/canvas": canvas_app(KEYS, tmp_path)})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HERE) as client:
        yield client


async def test_the_page_is_asked_for_again_each_time(client):
    for path, content in (("/canvas", "the page"), ("/canvas/main.js", "its script")):
        answer = await client.get(path)
        assert (answer.status_code, answer.text) == (200, content)
        assert answer.headers["cache-control"] == "no-cache"


async def test_the_address_alone_leads_to_the_page(client):
    answer = await client.get("/")
    assert (answer.status_code, answer.headers["location"]) == (307, "/canvas")


async def test_the_page_gets_a_session_of_the_visitor(client):
    answer = await client.post("/canvas/session", headers={"origin": HERE})
    session = answer.json()
    assert answer.headers["cache-control"] == "no-store"
    assert (session["url"], session["anonKey"], session["workflowId"]) == (HERE, KEYS.anon_key, str(WORKFLOW))
    claims = KEYS.claims(session["accessToken"])
    assert (claims["role"], claims["sub"]) == ("authenticated", str(VISITOR))


async def test_the_page_may_ask_to_be_somebody_else(client):
    other = str(uuid4())
    answer = await client.post("/canvas/session", params={"as": other}, headers={"origin": HERE})
    assert KEYS.claims(answer.json()["accessToken"])["sub"] == other
    answer = await client.post("/canvas/session", params={"as": "root"}, headers={"origin": HERE})
    assert (answer.status_code, answer.json()) == (400, {"message": "as must be a uuid."})


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="no page at all"),
        pytest.param({"origin": "https://example.com"}, id="another site"),
        pytest.param({"origin": "http://127.0.0.1:3000"}, id="another program on this machine"),
        pytest.param({"origin": "null"}, id="a sandboxed frame"),
        pytest.param(
            {"origin": "http://rebound.test:54321", "host": "rebound.test:54321"}, id="a name that leads here"
        ),
    ],
)
async def test_nobody_else_gets_a_session(client, headers):
    answer = await client.post("/canvas/session", headers=headers)
    assert answer.status_code == 403
    assert answer.json() == {"message": "Open the canvas as http://127.0.0.1:54321/canvas."}


async def test_an_installation_without_the_page_says_so(tmp_path):
    app = canvas_app(KEYS, tmp_path / "nothing")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HERE) as client:
        answer = await client.get("/canvas")
    assert answer.status_code == 503
    assert "Install again without IMAGE_JOBS_SKIP_CANVAS." in answer.text
