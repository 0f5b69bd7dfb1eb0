"""A request is a transaction, as PostgREST makes it: the caller's role, the request's settings, the response's settings."""

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from starlette.requests import Request

from daemon.database import Connection
from daemon.dev.supabase.rest.errors import RestError, from_postgres

_BEGIN = """select
  set_config('search_path', 'public, extensions', true),
  set_config('role', $1, true),
  set_config('request.jwt.claims', $2, true),
  set_config('request.method', $3, true),
  set_config('request.path', $4, true),
  set_config('request.headers', $5, true),
  set_config('request.cookies', $6, true),
  -- Settings of a role take effect at log-in, and no session logs in as this one.
  set_config('statement_timeout', coalesce((
    select split_part(s.setting, '=', 2) from pg_catalog.pg_roles r, unnest(r.rolconfig) as s (setting)
    where r.rolname = $1 and s.setting like 'statement\\_timeout=%'
  ), current_setting('statement_timeout')), true)"""
_END = "select current_setting('response.status', true) as status, current_setting('response.headers', true) as headers"


@dataclass(slots=True)
class Overrides:
    """Status and headers that SQL has set in `response.status` and `response.headers`; filled when the block ends."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict[str, str])


@asynccontextmanager
async def transaction(
    pool: "asyncpg.Pool[asyncpg.Record]", request: Request, claims: Mapping[str, Any]
) -> AsyncGenerator[tuple[Connection, Overrides]]:
    """Open a transaction for a request; a GET's is read-only. It commits, unless the block raises.

    Raises:
        RestError: For an error of the database.
    """
    overrides = Overrides()
    headers = {name: value for name, value in request.headers.items() if name != "cookie"}
    try:
        async with pool.acquire() as connection, connection.transaction(readonly=request.method in {"GET", "HEAD"}):
            await connection.execute(
                _BEGIN,
                claims["role"],
                json.dumps(claims),
                request.method,
                "/" + request.path_params["path"],
                json.dumps(headers),
                json.dumps(request.cookies),
            )
            yield connection, overrides  # pyright: ignore[reportReturnType] - a pool's connection is one but for its class
            _read_overrides(overrides, await connection.fetchrow(_END))
    except asyncpg.PostgresError as error:
        raise from_postgres(error, claims["role"]) from None


def _read_overrides(overrides: Overrides, row: "asyncpg.Record | None") -> None:
    assert row is not None
    if row["status"]:
        try:
            overrides.status = int(row["status"])
        except ValueError:
            raise RestError(500, "PGRST112", "response.status guc must be a valid status code") from None
    try:
        for pair in json.loads(row["headers"] or "[]"):
            ((name, value),) = pair.items()
            overrides.headers[name] = str(value)
    except (ValueError, TypeError, AttributeError):
        message = "response.headers guc must be a JSON array composed of objects with a single key and a string value"
        raise RestError(500, "PGRST111", message) from None
