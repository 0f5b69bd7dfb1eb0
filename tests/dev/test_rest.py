"""The REST stand-in: what supabase-py makes of it, and PostgREST's answers where clients do not show them."""

import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import httpx
import pytest
from postgrest import APIError
from supabase import AsyncClient, AsyncClientOptions, acreate_client

from daemon.dev.api import one_port
from daemon.dev.keys import Keys
from daemon.dev.rest import rest_app
from tests.postgres import Cluster, connect
from tests.servers import served

SECRET = "a secret of the tests, and of nobody else"

THINGS = """
create table public.things (
  id integer primary key,
  name text unique,
  "odd ""name" text,
  size numeric(6, 2),
  tags text[],
  data jsonb,
  born timestamptz,
  code varchar(4)
);
create table public.notes (id integer generated always as identity primary key, text text default 'empty');
create view public.big_things as select id, name, size from public.things where size > 10;
create table public.closed (id integer primary key);
create schema hidden;
create table hidden.secrets (id integer);
grant select, insert, update, delete on public.things, public.notes to anon;
grant select on public.big_things to anon;

create function public.add(a integer, b integer default 10) returns integer language sql immutable as 'select a + b';
create function public.both(n integer) returns table (x integer, y text) language sql stable
as 'select i, i::text from generate_series(1, n) i';
create function public.nothing() returns void language sql as '';
create function public.thing(wanted integer) returns public.things language sql stable
as 'select * from public.things where id = wanted';
create function public.echo(json) returns jsonb language sql
as $$ select jsonb_build_object('text', $1::text, 'headers', current_setting('request.headers')::json,
  'method', current_setting('request.method'), 'path', current_setting('request.path')) $$;
create function public.touch() returns integer language sql volatile as 'insert into public.notes default values returning id';
create function public.teapot(kind text) returns text language plpgsql volatile as $$
begin
  case kind
    when 'PT' then raise sqlstate 'PT418' using message = 'I am a teapot', detail = 'short', hint = 'and stout';
    when 'PGRST' then raise sqlstate 'PGRST' using
      message = '{"code": "T", "message": "tea"}', detail = '{"status": 419, "headers": {"X-Tea": "black"}}';
    when 'broken' then raise sqlstate 'PGRST' using message = 'tea', detail = 'black';
    when 'plain' then raise exception 'no tea';
    else perform set_config('response.status', '202', true),
      set_config('response.headers', '[{"X-Tea": "green"}]', true);
  end case;
  return 'served';
end $$;
create function public.who() returns json language sql stable
as $$ select json_build_object('role', current_setting('role'), 'user', current_user, 'session', session_user,
  'claims', current_setting('request.jwt.claims')::json, 'timeout', current_setting('statement_timeout')) $$;
create function public.one(a integer) returns text language sql as $$ select 'integer' $$;
create function public.one(a text) returns text language sql as $$ select 'text' $$;
"""


ROWS: list[tuple[Any, ...]] = [
    (1, "ant", "a", 1.5, ["small"], {"legs": 6, "at": {"home": ["hill", "wood"]}}, None, "ant"),
    (2, "bear", "b", 250, ["big", "brown"], {"legs": 4}, None, "bear"),
    (3, 'a, "cat"', None, 4, [], {"legs": 4, "name": "x"}, None, None),
]


@dataclass(frozen=True)
class Project:
    """A running stand-in, and ways to ask it."""

    url: str
    http: httpx.AsyncClient
    keys: Keys
    db: "asyncpg.Connection[asyncpg.Record]"

    async def client(self, token: str | None = None) -> AsyncClient:
        """supabase-py, of a user or of nobody."""
        client = await acreate_client(
            self.url,
            self.keys.anon_key,
            AsyncClientOptions(httpx_client=self.http, auto_refresh_token=False, persist_session=False),
        )
        if token:
            client.postgrest.auth(token)
        return client

    def sign_in(self, user: UUID) -> str:
        return self.keys.sign({"role": "authenticated", "sub": str(user), "exp": int(time.time()) + 60})

    async def ask(
        self, method: str, path: str, body: Any = None, *, content: bytes | str | None = None, **headers: str
    ) -> httpx.Response:
        """A request in detail; `Accept_Profile` is the header Accept-Profile."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            content = json.dumps(body)
        return await self.http.request(method, f"{self.url}/rest/v1{path}", content=content, headers=sent)

    async def error(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """Status and code of the error that a request ends with."""
        answer = await self.ask(method, path, body, **headers)
        return answer.status_code, answer.json()["code"]


@asynccontextmanager
async def running(postgres: Cluster) -> AsyncIterator[Project]:
    keys = Keys(SECRET, anon_key="sb_publishable_test", service_role_key="sb_secret_test")
    async with postgres.database() as dsn, closing_connection(dsn) as db:
        await db.execute(THINGS)
        await db.executemany("insert into things values ($1, $2, $3, $4, $5, $6, $7, $8)", ROWS)
        as_gateway = postgres.server.dsn(dsn.rpartition("/")[2], user="authenticator")
        async with asyncpg.create_pool(as_gateway, min_size=1, max_size=4) as pool:
            app = one_port({"/rest/v1": rest_app(pool, keys)})
            async with served(app) as url, httpx.AsyncClient(timeout=20) as http:
                yield Project(url, http, keys, db)


@asynccontextmanager
async def closing_connection(dsn: str) -> AsyncIterator["asyncpg.Connection[asyncpg.Record]"]:
    connection = await connect(dsn)
    try:
        yield connection
    finally:
        await connection.close()


@pytest.fixture
async def project(postgres: Cluster) -> AsyncIterator[Project]:
    """A project of one's own."""
    async with running(postgres) as one:
        yield one


@pytest.fixture(scope="module")
async def unchanged(postgres: Cluster) -> AsyncIterator[Project]:
    """A project that nobody changes."""
    async with running(postgres) as one:
        yield one


async def ids(project: Project, query: str) -> list[int]:
    answer = await project.ask("GET", f"/things?select=id&order=id&{query}")
    assert answer.status_code == 200, answer.text
    return [row["id"] for row in answer.json()]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("id=eq.2", [2]),
        ("id=neq.2", [1, 3]),
        ("size=gt.4", [2]),
        ("size=gte.4", [2, 3]),
        ("size=lt.4", [1]),
        ("size=lte.4", [1, 3]),
        ("name=like.*ea*", [2]),
        ("name=ilike.BEA*", [2]),
        ("name=match.^a", [1, 3]),
        ("name=imatch.^A", [1, 3]),
        ("code=is.null", [3]),
        ("code=is.not_null", [1, 2]),
        ("code=not.is.null", [1, 2]),
        ("code=isdistinct.ant", [2, 3]),
        ("code=eq.bearish", []),
        ("id=in.(1,3)", [1, 3]),
        ("id=in.()", []),
        ('name=in.("a, \\"cat\\"",ant)', [1, 3]),
        ("id=not.in.(1,3)", [2]),
        ("tags=cs.{big}", [2]),
        ("tags=cd.{small,big}", [1, 3]),
        ("tags=ov.{brown,small}", [1, 2]),
        ('data=cs.{"legs":4}', [2, 3]),
        ("data->>legs=eq.6", [1]),
        ("data->legs=gt.4", [1]),
        ("data->at->home->>1=eq.wood", [1]),
        ("or=(id.eq.1,name.eq.bear)", [1, 2]),
        ('or=(name.eq."a, \\"cat\\"",id.eq.1)', [1, 3]),
        ("or=(and(id.gt.1,size.lt.10),id.in.(1))", [1, 3]),
        ("and=(id.gte.1,not.or(id.eq.1,id.eq.2))", [3]),
        ("not.and=(id.gte.1,id.lte.2)", [3]),
        ("or=(tags.cs.{big,brown},id.not.gt.1)", [1, 2]),
        ("id=gt.1&id=lt.3", [2]),
        ('"odd \\"name"=eq.b', [2]),
    ],
)
async def test_a_filter_lets_through_what_postgrest_lets_through(
    unchanged: Project, query: str, expected: list[int]
) -> None:
    assert await ids(unchanged, query) == expected


async def test_columns_can_be_renamed_cast_and_taken_out_of_json(unchanged: Project) -> None:
    client = await unchanged.client()
    found = (
        await client.table("things")
        .select('id, wide:size::text, data->>legs, home:data->at->home->0, "odd \\"name"')
        .eq("id", 1)
        .execute()
    )
    assert found.data == [{"id": 1, "wide": "1.50", "legs": "6", "home": "hill", 'odd "name': "a"}]


async def test_a_count_comes_with_the_page(unchanged: Project) -> None:
    client = await unchanged.client()
    found = await client.table("things").select("id", count="exact").order("id", desc=True).range(1, 1).execute()
    assert (found.data, found.count) == ([{"id": 2}], 3)
    answer = await unchanged.ask("GET", "/things?select=id", Prefer="count=exact", Range="0-1")
    assert (answer.status_code, answer.headers["content-range"]) == (206, "0-1/3")
    head = await unchanged.ask("HEAD", "/things", Prefer="count=exact")
    assert (head.status_code, head.headers["content-range"], head.content) == (200, "0-2/3", b"")
    assert await unchanged.error("GET", "/things?offset=9", Prefer="count=exact") == (416, "PGRST103")
    assert (await unchanged.ask("GET", "/things?id=eq.9")).headers["content-range"] == "*/*"


async def test_rows_can_be_sorted_by_json_with_nulls_where_one_wants_them(unchanged: Project) -> None:
    answer = await unchanged.ask("GET", "/things?select=id&order=data->legs.desc,code.asc.nullsfirst&limit=3")
    assert [row["id"] for row in answer.json()] == [1, 3, 2]


async def test_a_single_row_is_an_object_and_no_row_an_error(unchanged: Project) -> None:
    client = await unchanged.client()
    assert (await client.table("things").select("name").eq("id", 1).single().execute()).data == {"name": "ant"}
    assert await client.table("things").select("name").eq("id", 9).maybe_single().execute() is None
    with pytest.raises(APIError) as caught:
        await client.table("things").select("name").single().execute()
    assert caught.value.code == "PGRST116"
    assert caught.value.details == "The result contains 3 rows"
    answer = await unchanged.ask("GET", "/things", Accept="application/vnd.pgrst.object+json")
    assert answer.status_code == 406


async def test_nulls_can_be_left_out(unchanged: Project) -> None:
    answer = await unchanged.ask(
        "GET", "/things?id=eq.3&select=id,code", Accept="application/vnd.pgrst.array+json;nulls=stripped"
    )
    assert answer.json() == [{"id": 3}]


async def test_inserts_answer_with_rows_only_if_asked(project: Project) -> None:
    client = await project.client()
    made = await client.table("things").insert({"id": 4, "name": "dog", "data": {"a": [1, None]}}).execute()
    assert (made.data[0]["name"], made.data[0]["data"]) == ("dog", {"a": [1, None]})
    made = await client.table("things").insert([{"id": 5}, {"id": 6, "name": "elk"}], count="exact").execute()
    assert ([row["name"] for row in made.data], made.count) == ([None, "elk"], 2)
    answer = await project.ask("POST", "/things", {"id": 7}, Prefer="return=minimal")
    assert (answer.status_code, answer.content, answer.headers["preference-applied"]) == (201, b"", "return=minimal")
    answer = await project.ask("POST", "/notes?select=text", {}, Prefer="return=representation")
    assert (answer.status_code, answer.json()) == (201, [{"text": "empty"}])
    answer = await project.ask("POST", "/things", [], Prefer="return=representation")
    assert (answer.status_code, answer.json()) == (201, [])


async def test_upserts_change_or_leave_what_is_there(project: Project) -> None:
    client = await project.client()
    await client.table("things").upsert([{"id": 1, "name": "bee"}, {"id": 8, "name": "fox"}]).execute()
    await client.table("things").upsert({"id": 9, "name": "fox"}, on_conflict="name", ignore_duplicates=True).execute()
    found = await client.table("things").select("id,name,size").in_("id", [1, 8, 9]).order("id").execute()
    assert found.data == [{"id": 1, "name": "bee", "size": 1.5}, {"id": 8, "name": "fox", "size": None}]
    answer = await project.ask("POST", "/things", {"id": 1}, Prefer="resolution=merge-duplicates")
    assert answer.status_code == 200


async def test_updates_and_deletes_touch_what_the_filters_let_through(project: Project) -> None:
    client = await project.client()
    changed = await client.table("things").update({"code": "x", "tags": ["new"]}).gt("id", 1).execute()
    assert [(row["id"], row["tags"]) for row in changed.data] == [(2, ["new"]), (3, ["new"])]
    assert (await project.ask("PATCH", "/things?id=eq.1", {"code": "y"})).status_code == 204
    assert (await client.table("things").update({}).eq("id", 1).execute()).data == []
    gone = await client.table("things").delete(count="exact").eq("code", "x").execute()
    assert gone.count == 2
    assert await ids(project, "") == [1]


async def test_what_is_not_one_row_is_not_changed_either(project: Project) -> None:
    single = "application/vnd.pgrst.object+json"
    wish = {"Accept": single, "Prefer": "return=representation"}
    assert await project.error("PATCH", "/things?id=gt.1", {"code": "x"}, **wish) == (406, "PGRST116")
    assert await ids(project, "code=eq.x") == []


async def test_a_new_column_is_there_at_once(project: Project) -> None:
    client = await project.client()
    for column in (None, "fresh"):
        if column:
            await project.db.execute("alter table things add column fresh integer default 7")
        found = await client.table("things").select("*").eq("id", 1).single().execute()
        assert found.data.get("fresh") == (7 if column else None)


async def test_without_a_filter_nothing_is_changed_or_deleted(unchanged: Project) -> None:
    assert await unchanged.error("PATCH", "/things", {"code": "x"}) == (400, "21000")
    assert await unchanged.error("DELETE", "/things") == (400, "21000")


async def test_functions_take_named_arguments(unchanged: Project) -> None:
    client = await unchanged.client()
    assert (await client.rpc("add", {"a": 1}).execute()).data == 11
    assert (await client.rpc("add", {"a": 1, "b": 2}, get=True).execute()).data == 3
    assert (await client.rpc("both", {"n": 3}).gt("x", 1).order("x", desc=True).limit(1).execute()).data == [
        {"x": 3, "y": "3"}
    ]
    assert (await client.rpc("thing", {"wanted": 2}).select("name").execute()).data == {"name": "bear"}
    assert (await client.rpc("both", {"n": 2}, count="exact", get=True).execute()).count == 2
    answer = await unchanged.ask("POST", "/rpc/nothing")
    assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize(
    "body", [b'{"b":1.0,\r\n "a" : 2e+05, "a":3 } \n', '{"\u00e4":"\\u0000"}'.encode(), b'[{"a":1},{"a":2}]']
)
async def test_an_unnamed_argument_gets_the_body_byte_for_byte(unchanged: Project, body: bytes) -> None:
    answer = await unchanged.ask("POST", "/rpc/echo", content=body, X_Signature="s", Cookie="c=1")
    said = answer.json()
    assert said["text"].encode() == body
    assert (said["method"], said["path"]) == ("POST", "/rpc/echo")
    assert said["headers"]["x-signature"] == "s"
    assert "cookie" not in said["headers"]


@pytest.mark.parametrize("body", [b"[1,2]", b"5", b'"text"', b"null"])
async def test_a_body_that_is_no_object_becomes_an_empty_array(unchanged: Project, body: bytes) -> None:
    assert (await unchanged.ask("POST", "/rpc/echo", content=body)).json()["text"] == "[]"


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
async def test_a_body_that_is_no_json_is_refused(unchanged: Project, body: bytes, code: str) -> None:
    answer = await unchanged.ask("POST", "/rpc/echo", content=body)
    assert (answer.status_code, answer.json()["code"]) == (400, code)


async def test_a_get_only_reads(project: Project) -> None:
    assert await project.error("GET", "/rpc/touch") == (405, "25006")
    assert (await project.ask("POST", "/rpc/touch")).status_code == 200


async def test_a_function_has_the_last_word_on_the_answer(unchanged: Project) -> None:
    answer = await unchanged.ask("POST", "/rpc/teapot", {"kind": "PT"})
    body = {"code": "PT418", "message": "I am a teapot", "details": "short", "hint": "and stout"}
    assert (answer.status_code, answer.json()) == (418, body)
    answer = await unchanged.ask("POST", "/rpc/teapot", {"kind": "PGRST"})
    assert (answer.status_code, answer.json()["code"], answer.headers["x-tea"]) == (419, "T", "black")
    assert await unchanged.error("POST", "/rpc/teapot", {"kind": "broken"}) == (500, "PGRST121")
    assert await unchanged.error("POST", "/rpc/teapot", {"kind": "plain"}) == (400, "P0001")
    answer = await unchanged.ask("POST", "/rpc/teapot", {"kind": "set"})
    assert (answer.status_code, answer.json(), answer.headers["x-tea"]) == (202, "served", "green")


async def test_the_token_says_who_asks(unchanged: Project) -> None:
    user = uuid4()
    who = (await (await unchanged.client(unchanged.sign_in(user))).rpc("who", {}).execute()).data
    assert (who["role"], who["user"], who["session"], who["timeout"]) == (
        *("authenticated", "authenticated", "authenticator"),
        "8s",
    )
    assert who["claims"]["sub"] == str(user)
    nobody = (await unchanged.ask("POST", "/rpc/who")).json()
    assert (nobody["role"], nobody["timeout"]) == ("anon", "3s")
    server = (await unchanged.ask("POST", f"/rpc/who?apikey={unchanged.keys.service_role_key}")).json()
    assert server["role"] == "service_role"


async def test_a_token_that_is_none_of_ours_is_refused(unchanged: Project) -> None:
    expired = unchanged.keys.sign({"role": "authenticated", "exp": 1})
    foreign = Keys("another secret that is long enough", "", "").sign({"role": "service_role"})
    for token, code in ((expired, "PGRST303"), (foreign, "PGRST301"), ("garbage", "PGRST301")):
        answer = await unchanged.ask("GET", "/things", Authorization=f"Bearer {token}")
        assert (answer.status_code, answer.json()["code"]) == (401, code)
        assert answer.headers["www-authenticate"] == "Bearer"


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
async def test_mistakes_have_the_statuses_and_codes_of_postgrest(
    unchanged: Project, method: str, path: str, body: Any, expected: tuple[int, str]
) -> None:
    assert await unchanged.error(method, path, body) == expected


async def test_headers_that_ask_for_something_else_are_refused(unchanged: Project) -> None:
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
async def test_nothing_that_is_sent_becomes_sql(project: Project, evil: str) -> None:
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


async def test_a_page_from_anywhere_may_ask(unchanged: Project) -> None:
    asked = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
    asked["Access-Control-Request-Headers"] = "apikey,authorization,content-profile,prefer,x-client-info"
    answer = await unchanged.http.options(f"{unchanged.url}/rest/v1/things", headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "x-client-info" in answer.headers["access-control-allow-headers"]
    answer = await unchanged.ask("GET", "/things", Origin="http://localhost:3000")
    assert "content-range" in answer.headers["access-control-expose-headers"]
    assert (await unchanged.http.get(f"{unchanged.url}/auth/v1/user")).status_code == 501


async def test_a_user_starts_follows_cancels_and_requeues_a_run(project: Project) -> None:
    client = await project.client(project.sign_in(uuid4()))
    workflow = str(uuid4())
    node = {"id": "n1", "workflow_id": workflow, "node_type": "image", "node_data": {"label": "fox"}}
    await client.table("workflow_nodes").insert(node).execute()
    request = {
        "nodeId": "n1",
        "workflowId": workflow,
        "promptSpec": {"basePrompt": "a red fox"},
        "provider": "demo",
        "model": "painter",
    }
    started = (await client.rpc("start_image_job", {"request": request}).execute()).data
    assert (started["status"], started["nodeId"]) == ("pending", "n1")
    run = {"kind": "image_gen", "subject_id": workflow, "status": "pending", "processor": "demo:painter"}
    run["metadata"] = {"nodeId": "n1", "promptSpec": {"basePrompt": "a bear"}}
    inserted = (await client.table("runs").insert(run).execute()).data[0]
    jobs = await client.table("image_jobs").select("jobId,nodeId").eq("workflowId", workflow).execute()
    assert {job["jobId"] for job in jobs.data} == {started["jobId"], inserted["id"]}
    cancelled = (await client.rpc("cancel_run", {"run_id": started["jobId"]}).execute()).data
    assert cancelled["status"] == "cancelled"
    requeued = (await client.rpc("requeue_run", {"run_id": started["jobId"]}).execute()).data
    assert requeued["status"] == "pending"


async def test_refusals_come_with_a_sentence_and_a_cure(project: Project) -> None:
    user = await project.client(project.sign_in(uuid4()))
    with pytest.raises(APIError) as caught:
        await user.rpc("start_image_job", {"request": {}}).execute()
    assert (caught.value.code, caught.value.message) == ("22023", "nodeId is missing.")
    assert caught.value.hint
    with pytest.raises(APIError) as caught:
        await user.rpc("cancel_run", {"run_id": "job_of_a_stranger"}).execute()
    assert caught.value.code == "PT404"
    nobody = await project.client()
    with pytest.raises(APIError) as caught:
        await nobody.rpc("cancel_run", {"run_id": "x"}).execute()
    assert caught.value.code == "42501"


async def test_a_stranger_sees_nothing(project: Project) -> None:
    owner, stranger = [await project.client(project.sign_in(uuid4())) for _ in range(2)]
    node = {"id": "n1", "workflow_id": str(uuid4()), "node_type": "image", "node_data": {}}
    await owner.table("workflow_nodes").insert(node).execute()
    assert len((await owner.table("workflow_nodes").select("*").execute()).data) == 1
    assert (await stranger.table("workflow_nodes").select("*").execute()).data == []
    assert (await stranger.table("workflow_nodes").update({"node_type": "x"}).eq("id", "n1").execute()).data == []
    with pytest.raises(APIError) as caught:
        await stranger.table("workflow_nodes").insert({**node, "id": "n2"}).execute()
    assert caught.value.code == "42501"


async def test_a_webhook_arrives_byte_for_byte(project: Project) -> None:
    body = '{"b":1.0,\r\n "a":2,"a":3 , "id":"order-1"} '
    await project.db.execute("select private.set_webhook_secrets($1)", {"hmac": [SECRET]})
    signature = hmac.new(SECRET.encode(), body.encode(), hashlib.sha256).hexdigest()

    async def post(content: str) -> httpx.Response:
        return await project.ask(
            "POST", "/rpc/webhook_hmac", content=content, webhook_signature=signature, content_type="application/json"
        )

    accepted, damaged = await post(body), await post(body + " ")
    assert (accepted.status_code, accepted.json()) == (200, {"received": True, "duplicate": False})
    assert (damaged.status_code, damaged.json()["code"]) == (401, "PT401")
    assert await project.db.fetchval("select array_agg(body) from private.webhook_deliveries") == [body]
