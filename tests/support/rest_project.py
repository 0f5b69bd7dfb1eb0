"""A project with the REST stand-in, a few tables and functions, and helpers for requests."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import asyncpg
import httpx
from supabase import AsyncClient, AsyncClientOptions, acreate_client

from daemon.dev.supabase.gateway import one_port
from daemon.dev.supabase.keys import Keys
from daemon.dev.supabase.rest import rest_app
from tests.support.postgres import Cluster, connect
from tests.support.servers import served

SECRET = "a secret that only the tests have"


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
    """A running stand-in: its address, its keys, and helpers for requests."""

    url: str
    http: httpx.AsyncClient
    keys: Keys
    db: "asyncpg.Connection[asyncpg.Record]"

    async def client(self, token: str | None = None) -> AsyncClient:
        """Make a supabase-py client, with a user's token or anonymous."""
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

    async def send(
        self, method: str, path: str, body: Any = None, *, content: bytes | str | None = None, **headers: str
    ) -> httpx.Response:
        """Send a request; `Accept_Profile` is the header Accept-Profile."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        if body is not None:
            content = json.dumps(body)
        return await self.http.request(method, f"{self.url}/rest/v1{path}", content=content, headers=sent)

    async def error(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """Send a request, and return status and code of its error."""
        response = await self.send(method, path, body, **headers)
        return response.status_code, response.json()["code"]


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
