"""The page at /canvas: caching, its session, an installation without it."""

from collections.abc import AsyncIterator
from pathlib import Path
from uuid import uuid4

import httpx
import pytest

from daemon.dev.canvas import VISITOR, WORKFLOW, canvas_app
from daemon.dev.supabase.gateway import one_port
from daemon.dev.supabase.keys import make_keys

KEYS = make_keys("a secret of at least thirty-two characters")
HERE = "http://127.0.0.1:54321"


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[httpx.AsyncClient]:
    (tmp_path / "index.html").write_text("the page")
    (tmp_path / "main.js").write_text("its script")
    app = one_port({"/canvas": canvas_app(KEYS, tmp_path)})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HERE) as client:
        yield client


async def test_the_page_is_revalidated_each_time(client):
    for path, content in (("/canvas", "the page"), ("/canvas/main.js", "its script")):
        response = await client.get(path)
        assert (response.status_code, response.text) == (200, content)
        assert response.headers["cache-control"] == "no-cache"


async def test_scripts_are_sent_compressed_to_those_who_ask(client, tmp_path):
    script = "let fox;" * 1000
    (tmp_path / "main.js").write_text(script)
    sizes = []
    for accepted, encoding in (("identity", None), ("gzip, deflate", "gzip"), ("gzip, deflate, br", "gzip")):
        response = await client.get("/canvas/main.js", headers={"accept-encoding": accepted})
        assert (response.text, response.headers.get("content-encoding")) == (script, encoding)
        assert "accept-encoding" in response.headers["vary"].lower()
        sizes.append(response.num_bytes_downloaded)
    assert sizes[0] == len(script) > 20 * sizes[1]


async def test_the_builds_brotli_is_preferred_and_revalidated(client, tmp_path):
    (tmp_path / "main.js.br").write_bytes(b"not for identity")
    request = client.build_request("GET", "/canvas/main.js", headers={"accept-encoding": "gzip, deflate, br"})
    response = await client.send(request, stream=True)
    raw = b"".join([chunk async for chunk in response.aiter_raw()])
    assert (raw, response.headers["content-encoding"]) == (b"not for identity", "br")
    assert response.headers["content-type"].startswith("text/javascript")
    request.headers["if-none-match"] = response.headers["etag"]
    assert (await client.send(request)).status_code == 304
    plain = await client.get("/canvas/main.js", headers={"accept-encoding": "identity"})
    assert plain.text == "its script"
    assert plain.headers["etag"] != response.headers["etag"]


async def test_the_root_redirects_to_the_page(client):
    response = await client.get("/")
    assert (response.status_code, response.headers["location"]) == (307, "/canvas")


async def test_the_page_gets_a_session_of_the_visitor(client):
    response = await client.post("/canvas/session", headers={"origin": HERE})
    session = response.json()
    assert response.headers["cache-control"] == "no-store"
    assert (session["url"], session["anonKey"], session["workflowId"]) == (HERE, KEYS.anon_key, str(WORKFLOW))
    claims = KEYS.claims(session["accessToken"])
    assert (claims["role"], claims["sub"]) == ("authenticated", str(VISITOR))


async def test_the_page_calls_the_daemon_by_its_own_name(client):
    """A source is the daemon's own where its address begins with SUPABASE_URL."""
    headers = {"origin": "http://localhost:54321", "host": "localhost:54321"}
    response = await client.post("/canvas/session", headers=headers)
    assert response.json()["url"] == HERE


async def test_the_page_may_request_another_users_session(client):
    other = str(uuid4())
    response = await client.post("/canvas/session", params={"as": other}, headers={"origin": HERE})
    assert KEYS.claims(response.json()["accessToken"])["sub"] == other
    response = await client.post("/canvas/session", params={"as": "root"}, headers={"origin": HERE})
    assert (response.status_code, response.json()) == (400, {"message": "as must be a uuid."})


@pytest.mark.parametrize("origin", ["http://localhost:5173", "http://127.0.0.1:3000", "http://[::1]:8080"])
async def test_other_local_origins_get_a_session_by_cors(client, origin):
    asked = {"origin": origin, "access-control-request-method": "POST", "access-control-request-headers": "apikey"}
    preflight = await client.options("/canvas/session", headers=asked)
    response = await client.post("/canvas/session", headers={"origin": origin})
    assert (preflight.status_code, response.status_code) == (200, 200)
    assert response.headers["access-control-allow-origin"] == "*"
    assert KEYS.claims(response.json()["accessToken"])["sub"] == str(VISITOR)


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({}, id="no page at all"),
        pytest.param({"origin": "https://example.com"}, id="another site"),
        pytest.param({"origin": "null"}, id="a sandboxed frame"),
        pytest.param(
            {"origin": "http://rebound.test:54321", "host": "rebound.test:54321"}, id="a name that leads here"
        ),
    ],
)
async def test_other_origins_get_no_session(client, headers):
    response = await client.post("/canvas/session", headers=headers)
    assert response.status_code == 403
    assert response.json() == {"message": "Open the canvas as http://127.0.0.1:54321/canvas."}


async def test_an_installation_without_the_page_says_so(tmp_path):
    app = canvas_app(KEYS, tmp_path / "nothing")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HERE) as client:
        response = await client.get("/canvas")
    assert response.status_code == 503
    assert "Install again without IMAGE_JOBS_SKIP_CANVAS." in response.text
