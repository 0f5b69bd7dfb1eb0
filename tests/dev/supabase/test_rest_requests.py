"""The REST stand-in: tokens, errors, headers, and no SQL from requests."""

from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import pytest

from daemon.dev.supabase.keys import Keys
from tests.support.postgres import Cluster
from tests.support.rest_project import Project, running


@pytest.fixture
async def project(postgres: Cluster) -> AsyncIterator[Project]:
    """A project for one test."""
    async with running(postgres) as one:
        yield one


@pytest.fixture(scope="module")
async def unchanged(postgres: Cluster) -> AsyncIterator[Project]:
    """A project for all tests that only read."""
    async with running(postgres) as one:
        yield one


async def test_the_token_sets_role_and_claims(unchanged: Project) -> None:
    user = uuid4()
    session = (await (await unchanged.client(unchanged.sign_in(user))).rpc("who", {}).execute()).data
    assert (session["role"], session["user"], session["session"], session["timeout"]) == (
        *("authenticated", "authenticated", "authenticator"),
        "8s",
    )
    assert session["claims"]["sub"] == str(user)
    anonymous = (await unchanged.send("POST", "/rpc/who")).json()
    assert (anonymous["role"], anonymous["timeout"]) == ("anon", "3s")
    server = (await unchanged.send("POST", f"/rpc/who?apikey={unchanged.keys.service_role_key}")).json()
    assert server["role"] == "service_role"


async def test_invalid_tokens_are_refused(unchanged: Project) -> None:
    expired = unchanged.keys.sign({"role": "authenticated", "exp": 1})
    foreign = Keys("another secret that is long enough", "", "").sign({"role": "service_role"})
    for token, code in ((expired, "PGRST303"), (foreign, "PGRST301"), ("garbage", "PGRST301")):
        response = await unchanged.send("GET", "/things", Authorization=f"Bearer {token}")
        assert (response.status_code, response.json()["code"]) == (401, code)
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("method", "path", "body", "expected"),
    [
        ("GET", "/nope", None, (404, "PGRST205")),
        ("GET", "/secrets", None, (404, "PGRST205")),
        ("GET", "/closed", None, (401, "42501")),
        ("GET", "/things?nope=eq.1", None, (400, "42703")),
        ("GET", "/things?select=nope", None, (400, "42703")),
        ("GET", "/things?id=eq.x", None, (400, "22P02")),
        ("GET", "/things?id=1", None, (400, "PGRST100")),
        ("GET", "/things?token=abc", None, (400, "PGRST100")),
        ("GET", "/things?code=is.maybe", None, (400, "PGRST100")),
        ("GET", "/things?or=(id.eq.1", None, (400, "PGRST100")),
        ("GET", "/things?select=id,", None, (400, "PGRST100")),
        ("GET", "/things?order=id.up", None, (400, "PGRST100")),
        ("GET", "/things?limit=x", None, (400, "PGRST100")),
        ("GET", "/things?limit=-1", None, (416, "PGRST103")),
        ("GET", "/things?limit=" + "9" * 30, None, (400, "PGRST100")),
        ("GET", "/things?limit=--1", None, (400, "PGRST100")),
        ("GET", "/things?or=" + "(and" * 5000, None, (400, "PGRST100")),
        ("GET", "/things?name=eq.%00", None, (400, "22021")),
        ("GET", "/things?id=like.1*", None, (404, "42883")),
        ("GET", "/things?select=id::nope", None, (400, "42704")),
        ("POST", "/things", {"nope": 1}, (400, "PGRST204")),
        ("POST", "/things", {"id": 1}, (409, "23505")),
        ("POST", "/things", {"id": 10, "code": "too long"}, (400, "22001")),
        ("POST", "/things", [{"id": 10}, {"name": "x"}], (400, "PGRST102")),
        ("POST", "/rpc/nope", {}, (404, "PGRST202")),
        ("POST", "/rpc/add", {"a": 1, "c": 2}, (404, "PGRST202")),
        ("POST", "/rpc/add", {"b": 1}, (404, "PGRST202")),
        ("POST", "/rpc/one", {"a": 1}, (300, "PGRST203")),
        ("POST", "/rpc/add?token=abc", {"a": 1}, (400, "PGRST100")),
        ("POST", "/rpc/echo?apikeys=abc", {"a": 1}, (400, "PGRST100")),
        ("GET", "/", None, (501, "NotImplemented")),
        ("PUT", "/things?id=eq.1", {"id": 1}, (501, "NotImplemented")),
        ("GET", "/things?select=id,notes(id)", None, (501, "NotImplemented")),
        ("GET", "/things?select=id.count()", None, (501, "NotImplemented")),
        ("GET", "/things?notes.id=eq.1", None, (501, "NotImplemented")),
        ("GET", "/things?name=fts.x", None, (501, "NotImplemented")),
        ("GET", "/things?name=like(any).{a}", None, (501, "NotImplemented")),
        ("DELETE", "/things?id=eq.1&limit=1", None, (501, "NotImplemented")),
    ],
)
async def test_errors_have_postgrests_statuses_and_codes(
    unchanged: Project, method: str, path: str, body: Any, expected: tuple[int, str]
) -> None:
    assert await unchanged.error(method, path, body) == expected


async def test_unsupported_headers_are_refused(unchanged: Project) -> None:
    assert await unchanged.error("GET", "/things", Accept_Profile="hidden") == (406, "PGRST106")
    assert await unchanged.error("POST", "/things", {"id": 10}, Content_Profile="hidden") == (406, "PGRST106")
    assert await unchanged.error("GET", "/things", Accept="text/html") == (406, "PGRST107")
    assert await unchanged.error("GET", "/things", Accept="text/csv") == (501, "NotImplemented")
    assert await unchanged.error("POST", "/things", {"id": 10}, Prefer="missing=default") == (501, "NotImplemented")
    assert await unchanged.error("POST", "/rpc/echo", {}, Content_Type="text/xml") == (400, "PGRST102")
    assert await unchanged.error("POST", "/things", {"id": 10}, Content_Type="text/csv") == (501, "NotImplemented")
    assert await unchanged.error("POST", "/things", {"id": 10}, Content_Type="text/html") == (400, "PGRST102")
    user = f"Bearer {unchanged.sign_in(uuid4())}"
    assert await unchanged.error("GET", "/closed", Authorization=user) == (403, "42501")


@pytest.mark.parametrize(
    "evil", ["x'; drop table things; --", 'x"; drop table things; --', "x)); drop table things; --", "$1", "\\"]
)
async def test_no_part_of_a_request_becomes_sql(project: Project, evil: str) -> None:
    quoted = '"' + evil.replace("\\", "\\\\").replace('"', '\\"') + '"'
    http, url = project.http, f"{project.url}/rest/v1"
    for query in (
        {"select": quoted},
        {"select": f"{quoted}:id"},
        {"select": f"data->{quoted}"},
        {"select": f"id::{evil}"},
        {"order": quoted},
        {quoted: "eq.1"},
        {"name": f"eq.{evil}"},
        {"name": f"in.({quoted})"},
        {"or": f"(name.eq.{quoted})"},
        {"id": f"{evil}.1"},
        {"limit": evil},
    ):
        assert (await http.get(f"{url}/things", params=query)).status_code in {200, 400}
    assert (await http.post(f"{url}/things", json={evil: 1})).status_code == 400
    assert (await http.post(f"{url}/things", json={"id": 11, "name": evil})).status_code == 201
    assert (
        await http.post(
            f"{url}/things",
            params={"on_conflict": quoted},
            json={"id": 12},
            headers={"Prefer": "resolution=ignore-duplicates"},
        )
    ).status_code == 400
    assert (await http.get(f"{url}/{evil.replace('/', '')}")).status_code == 404
    assert (await http.post(f"{url}/rpc/{evil}", json={evil: 1})).status_code == 404
    assert (await http.post(f"{url}/rpc/add", json={"a": 1, evil: 1})).status_code == 404
    assert (await http.get(f"{url}/things", params={"select": f"{quoted}:id", "id": "eq.1"})).json() == [{evil: 1}]
    assert await project.db.fetchval("select name from things where id = 11") == evil


async def test_pages_of_every_origin_may_send_requests(unchanged: Project) -> None:
    asked = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "apikey,authorization,content-profile,prefer,x-client-info"
    response = await unchanged.http.options(f"{unchanged.url}/rest/v1/things", headers=asked)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "*"
    assert "x-client-info" in response.headers["access-control-allow-headers"]
    response = await unchanged.send("GET", "/things", Origin="http://localhost:3000")
    assert "content-range" in response.headers["access-control-expose-headers"]
    assert (await unchanged.http.get(f"{unchanged.url}/auth/v1/user")).status_code == 501
