"""The REST stand-in: calls of functions, their bodies and responses."""

from collections.abc import AsyncIterator

import pytest

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


async def test_functions_take_named_arguments(unchanged: Project) -> None:
    client = await unchanged.client()
    assert (await client.rpc("add", {"a": 1}).execute()).data == 11
    assert (await client.rpc("add", {"a": 1, "b": 2}, get=True).execute()).data == 3
    assert (await client.rpc("both", {"n": 3}).gt("x", 1).order("x", desc=True).limit(1).execute()).data == [
        {"x": 3, "y": "3"}
    ]
    assert (await client.rpc("thing", {"wanted": 2}).select("name").execute()).data == {"name": "bear"}
    assert (await client.rpc("both", {"n": 2}, count="exact", get=True).execute()).count == 2
    response = await unchanged.send("POST", "/rpc/nothing")
    assert (response.status_code, response.content) == (204, b"")


@pytest.mark.parametrize(
    "body", [b'{"b":1.0,\r\n "a" : 2e+05, "a":3 } \n', '{"\u00e4":"\\u0000"}'.encode(), b'[{"a":1},{"a":2}]']
)
async def test_an_unnamed_argument_gets_the_body_byte_for_byte(unchanged: Project, body: bytes) -> None:
    response = await unchanged.send("POST", "/rpc/echo", content=body, X_Signature="s", Cookie="c=1")
    echoed = response.json()
    assert echoed["text"].encode() == body
    assert (echoed["method"], echoed["path"]) == ("POST", "/rpc/echo")
    assert echoed["headers"]["x-signature"] == "s"
    assert "cookie" not in echoed["headers"]


@pytest.mark.parametrize("body", [b"[1,2]", b"5", b'"text"', b"null"])
async def test_a_body_without_objects_becomes_an_empty_array(unchanged: Project, body: bytes) -> None:
    assert (await unchanged.send("POST", "/rpc/echo", content=body)).json()["text"] == "[]"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "PGRST102"),
        (b'\xef\xbb\xbf{"a":1}', "PGRST102"),
        (b'{"a":NaN}', "PGRST102"),
        (b"\xff", "PGRST102"),
        (b"[" * 100_000, "PGRST102"),
        (b'[{"a":1},{"b":1}]', "PGRST102"),
        (b"", "22P02"),
    ],
)
async def test_an_invalid_body_is_refused(unchanged: Project, body: bytes, code: str) -> None:
    response = await unchanged.send("POST", "/rpc/echo", content=body)
    assert (response.status_code, response.json()["code"]) == (400, code)


async def test_a_get_is_read_only(project: Project) -> None:
    assert await project.error("GET", "/rpc/touch") == (405, "25006")
    assert (await project.send("POST", "/rpc/touch")).status_code == 200


async def test_a_function_can_set_status_headers_and_error(unchanged: Project) -> None:
    response = await unchanged.send("POST", "/rpc/teapot", {"kind": "PT"})
    body = {"code": "PT418", "message": "I am a teapot", "details": "short", "hint": "and stout"}
    assert (response.status_code, response.json()) == (418, body)
    response = await unchanged.send("POST", "/rpc/teapot", {"kind": "PGRST"})
    assert (response.status_code, response.json()["code"], response.headers["x-tea"]) == (419, "T", "black")
    assert await unchanged.error("POST", "/rpc/teapot", {"kind": "broken"}) == (500, "PGRST121")
    assert await unchanged.error("POST", "/rpc/teapot", {"kind": "plain"}) == (400, "P0001")
    response = await unchanged.send("POST", "/rpc/teapot", {"kind": "set"})
    assert (response.status_code, response.json(), response.headers["x-tea"]) == (202, "served", "green")
