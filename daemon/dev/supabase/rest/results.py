"""Responses: rows as JSON, Content-Range, status."""

from dataclasses import replace

import asyncpg
from starlette.requests import Request
from starlette.responses import Response

from daemon.database import Connection
from daemon.dev.supabase.rest.catalogue import type_name
from daemon.dev.supabase.rest.errors import RestError, bad_range, not_single
from daemon.dev.supabase.rest.grammar import Selected
from daemon.dev.supabase.rest.requests import ResponseFormat
from daemon.dev.supabase.rest.transactions import Overrides


async def known_casts(connection: Connection, selected: list[Selected]) -> list[Selected]:
    """Replace the types of casts by those of the catalogue, which are safe SQL.

    Raises:
        RestError: If there is no such type.
    """
    found: list[Selected] = []
    for each in selected:
        known = each.cast and await type_name(connection, each.cast)
        if each.cast and not known:
            raise RestError(400, "42704", f'type "{each.cast}" does not exist')
        found.append(replace(each, cast=known))
    return found


async def fetch(
    connection: Connection, statement: str, parameters: list[object], shape: ResponseFormat
) -> "asyncpg.Record":
    """Run a statement of `counted`, and return its one row.

    Raises:
        RestError: If a single row is required and there is another number of them; the transaction is rolled back.
    """
    # Prepared anew each time: a cached plan fails as soon as a column is added.
    row = await (await connection.prepare(statement)).fetchrow(*parameters)
    assert row is not None
    if shape.single and row["rows"] != 1:
        raise not_single(row["rows"])
    return row


def page(row: "asyncpg.Record", offset: int) -> tuple[int, str]:
    """Return status and Content-Range of a page that begins at `offset`.

    Raises:
        RestError: If it begins behind the end.
    """
    rows, total = row["rows"], row["total"]
    if total is not None and offset > total:
        raise bad_range(f"An offset of {offset} was requested, but there are only {total} rows.")
    status = 206 if total is not None and rows < total else 200
    span = f"{offset}-{offset + rows - 1}" if rows else "*"
    return status, f"{span}/{'*' if total is None else total}"


def respond(
    request: Request,
    shape: ResponseFormat,
    overrides: Overrides,
    *,
    status: int,
    body: str | None,
    headers: dict[str, str],
) -> Response:
    """Make the response.

    Args:
        request: To a HEAD there is no body, only the headers of one.
        shape: Has the media type of the body.
        overrides: Status and headers that SQL has set.
        status: If SQL has set none.
        body: None for none.
        headers: Further ones; empty ones are left out.
    """
    given = {name: value for name, value in headers.items() if value} | overrides.headers
    content = b"" if body is None or request.method == "HEAD" else body.encode()
    response = Response(content, overrides.status or status, media_type=None if body is None else shape.media_type)
    if status == 204 or request.method == "HEAD":
        del response.headers["content-length"]
    for name, value in given.items():
        response.headers[name] = value
    return response
