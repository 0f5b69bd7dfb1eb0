"""The dashboard is for its own page alone: not for other sites, other names of this machine, or whoever lacks the token."""

import re
from pathlib import Path

import httpx
import pytest

from daemon.pages.dashboard import dashboard_app
from daemon.pages.dashboard.guard import Guard

HERE = "http://127.0.0.1:54380"
TOKEN = "the-token-of-this-start"
OURS = {"origin": HERE, "sec-fetch-site": "same-origin", "authorization": f"Bearer {TOKEN}"}
NOWHERE = "postgresql://127.0.0.1:1/postgres"
PAUSE = {"operation": {"kind": "pause", "provider": "openai"}}


@pytest.fixture
async def outside(bundle: Path):
    """Ask the application with no header of its own page. There is no database: a request that gets that far is a 503."""
    async with (
        dashboard_app(NOWHERE, TOKEN, bundle) as app,
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HERE) as opened,
    ):
        yield opened


async def test_its_own_page_is_let_in(outside):
    assert (await outside.get("/dashboard")).text == "the page"
    assert (await outside.get("/dashboard/api/board", headers=OURS)).status_code == 503
    assert (await outside.post("/dashboard/api/preview", headers=OURS, json=PAUSE)).status_code == 503


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:54380", "LOCALHOST", "[::1]:54380"])
async def test_it_opens_by_every_name_of_loopback(outside, host):
    assert (await outside.get("/dashboard", headers={"host": host})).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        pytest.param("rebound.example:54380", id="rebound"),
        pytest.param("127.0.0.1.rebound.example", id="rebound, and looks like it"),
        pytest.param("192.168.1.5:54380", id="an address of the network"),
        pytest.param("127.0.0.1@rebound.example", id="a user that looks like it"),
        pytest.param("0.0.0.0:54380", id="every address"),
        pytest.param("[", id="no host at all"),
        pytest.param("", id="an empty one"),
    ],
)
async def test_a_name_of_others_that_leads_here_is_refused(outside, host):
    for path in ("/dashboard", "/dashboard/main.js", "/dashboard/api/board"):
        headers = {**OURS, "host": host, "origin": f"http://{host}"}
        response = await outside.get(path, headers=headers)
        assert response.status_code == 403
        assert "by its own address only" in response.json()["message"]


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param({"origin": "https://evil.example"}, id="another site"),
        pytest.param({"origin": "http://localhost:5173"}, id="another port of this machine"),
        pytest.param({"origin": "https://127.0.0.1:54380"}, id="another scheme"),
        pytest.param({"origin": "null"}, id="a sandboxed frame"),
        pytest.param({"sec-fetch-site": "cross-site"}, id="no origin, but the browser says so"),
        pytest.param({"sec-fetch-site": "same-site"}, id="another name of the site"),
    ],
)
async def test_requests_of_other_sites_are_refused(outside, headers):
    for path in ("/dashboard/api/preview", "/dashboard/api/act"):
        response = await outside.post(path, headers={**OURS, **headers}, json=PAUSE)
        assert (response.status_code, response.json()["message"]) == (
            403,
            "The dashboard takes no requests from other sites.",
        )
    script = await outside.get("/dashboard/main.js", headers={"sec-fetch-mode": "no-cors", **headers})
    assert script.status_code == 403


async def test_a_link_from_another_site_opens_the_page(outside):
    headers = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert (await outside.get("/dashboard", headers=headers)).status_code == 200


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        TOKEN,
        "Bearer \u00e9".encode(),
    ],
)
async def test_without_the_token_nothing_is_said(outside, authorization):
    headers = {name: value for name, value in OURS.items() if name != "authorization"}
    if authorization is not None:
        headers["authorization"] = authorization
    for method, path in (("GET", "board"), ("POST", "preview"), ("POST", "act"), ("GET", "nothing")):
        response = await outside.request(method, f"/dashboard/api/{path}", headers=headers)
        assert response.status_code == 401
        assert "open the address that was printed" in response.json()["message"]


async def test_a_token_in_the_address_or_a_cookie_is_none(outside):
    headers = {"origin": HERE, "cookie": f"token={TOKEN}; authorization=Bearer {TOKEN}"}
    response = await outside.get(f"/dashboard/api/board?token={TOKEN}&authorization=Bearer {TOKEN}", headers=headers)
    assert response.status_code == 401


async def test_no_get_changes_anything(outside):
    for path in ("preview", "act"):
        for method in ("GET", "HEAD", "PUT", "DELETE", "OPTIONS"):
            response = await outside.request(method, f"/dashboard/api/{path}", headers=OURS)
            assert response.status_code == 405


@pytest.mark.parametrize(
    ("content_type", "body", "sentence"),
    [
        ("text/plain", '{"operation": {"kind": "pause", "provider": "openai"}}', "The body is JSON"),
        ("application/x-www-form-urlencoded", "operation=pause", "The body is JSON"),
        ("application/json", "{", "The body is no JSON."),
        ("application/json", "[" * 9000, "The body is no JSON."),
        ("application/json", "[]", "the body: input should be"),
        ("application/json", '{"operation": {"kind": "drop"}}', "operation: input tag 'drop'"),
        ("application/json", '{"operation": {"kind": "pause", "provider": 1}}', "operation.pause.provider:"),
        ("application/json", '{"operation": {"kind": "pause", "provider": "\\ud800"}}', "operation.pause.provider:"),
        ("application/json", '{"operation": {"kind": "limit", "provider": "a", "per_minute": -1}}', "per_minute:"),
        ("application/json", '{"operation": {"kind": "requeue", "code": "x", "period": "9y"}}', "period:"),
        ("application/json", '{"operation": {"kind": "requeue_run", "run": ""}}', "operation.requeue_run.run:"),
        ("application/json", " " * 10_001, "The body is too long."),
    ],
)
async def test_a_body_that_is_no_operation_is_one_sentence(outside, content_type, body, sentence):
    headers = {**OURS, "content-type": content_type}
    response = await outside.post("/dashboard/api/preview", headers=headers, content=body)
    assert response.status_code == 400
    assert sentence in response.json()["message"]


@pytest.mark.parametrize("path", ["", "/main.js", "/nothing", "/api/board", "/api/nothing"])
@pytest.mark.parametrize("headers", [{}, OURS, {"host": "rebound.example"}])
async def test_every_response_forbids_all_that_is_not_needed(outside, path, headers):
    response = await outside.get(f"/dashboard{path}", headers=headers)
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert "set-cookie" not in response.headers


async def test_a_websocket_is_closed():
    sent = []

    async def keep(message):
        sent.append(message)

    await Guard(keep, "/dashboard", TOKEN)({"type": "websocket"}, keep, keep)
    assert sent == [{"type": "websocket.close"}]


async def test_both_pages_have_nothing_inline():
    page = (Path(__file__).parents[2] / "daemon/pages/index.html").read_text()
    assert re.findall(r"<style|\sstyle=|\son\w+=|<script>", page) == []


async def test_figures_of_a_period_that_is_none_are_refused(outside):
    response = await outside.get("/dashboard/api/board?period=1y", headers=OURS)
    assert (response.status_code, response.json()["message"]) == (400, "period is one of 15m, 1h, 24h, 7d.")


async def test_an_installation_without_the_page_says_so(tmp_path):
    async with (
        dashboard_app(NOWHERE, TOKEN, tmp_path / "nothing") as app,
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=HERE) as opened,
    ):
        response = await opened.get("/dashboard")
    assert response.status_code == 503
    assert "Install again without IMAGE_JOBS_SKIP_CANVAS." in response.text
