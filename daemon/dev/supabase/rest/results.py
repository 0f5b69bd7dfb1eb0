"""The answer to a statement: rows as JSON, and where they stand among all of them."""

from dataclasses import replace

import asyncpg
from starlette.requests import Request
from starlette.responses import Response

from daemon.database import Connection
from daemon.dev.rest.answers import RestError, bad_range, not_single
from daemon.dev.rest.catalogue import type_name
from daemon.dev.rest.grammar import Selected
from daemon.dev.rest.requests import Form
from daemon.dev.rest.transactions import Said


async def known_casts(connection: Connection, selected: list[Selected]) -> list[Selected]:
    """The same columns, their casts in the words of the catalogue.

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


async def fetch(connection: Connection, statement: str, parameters: list[object], form: Form) -> "asyncpg.Record":
    """The one row of a statement that `counted` has made.

    Raises:
        RestError: If one row was asked for and there is another number of them; what was done is undone.
    """
    # Prepared anew each time: a plan that is kept fails as soon as somebody adds a column.
    row = await (await connection.prepare(statement)).fetchrow(*parameters)
    assert row is not None
    if form.single and row["rows"] != 1:
        raise not_single(row["rows"])
    return row


def page(row: "asyncpg.Record", offset: int) -> tuple[int, str]:
    """Status and Content-Range of a page that begins at `offset`.

    Raises:
        RestError: If it begins behind the end.
    """
    rows, total = row["rows"], row["total"]
    if total is not None and offset > total:
        raise bad_range(f"An offset of {offset} was requested, but there are only {total} rows.")
    status = 206 if total is not None and rows < total else 200
    span = f"{offset}-{offset + rows - 1}" if rows else "*"
    return status, f"{span}/{'*' if total is None else total}"


def answer(
    request: Request, form: Form, said: Said, *, status: int, body: str | None, headers: dict[str, str]
) -> Response:
    """The response; what SQL has said about it comes last.

    Args:
        request: To a HEAD there is no body, only the headers of one.
        form: Names the type of the body.
        said: Status and headers from `response.status` and `response.headers`.
        status: If SQL says nothing else.
        body: None for none.
        headers: Others; empty ones are left out.
    """
    given = {name: value for name, value in headers.items() if value} | said.headers
    content = b"" if body is None or request.method == "HEAD" else body.encode()
    response = Response(content, said.status or status, media_type=None if body is None else form.media_type)
    if status == 204 or request.method == "HEAD":
        del response.headers["content-length"]
    for name, value in given.items():
        response.headers[name] = value
    return response
