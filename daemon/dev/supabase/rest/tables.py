"""Tables and views: select, insert, update, delete."""

from collections.abc import Sequence
from typing import Any

import asyncpg
from starlette.requests import Request
from starlette.responses import Response

from daemon.database import Connection
from daemon.dev.supabase.keys import Keys
from daemon.dev.supabase.rest import bodies, statements
from daemon.dev.supabase.rest.catalogue import Relation, relation
from daemon.dev.supabase.rest.errors import RestError, no_column, no_table, not_implemented
from daemon.dev.supabase.rest.requests import (
    Preferences,
    Query,
    ResponseFormat,
    caller,
    check_json,
    check_schema,
    parse_accept,
    parse_prefer,
    parse_query,
)
from daemon.dev.supabase.rest.results import fetch, known_casts, page, respond
from daemon.dev.supabase.rest.statements import Statement, counted, quoted
from daemon.dev.supabase.rest.transactions import transaction


class Tables:
    """Handles requests for `/<table>`.

    Args:
        pool: Connections of a role that may become each of the API roles.
        keys: Of the project.
    """

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", keys: Keys) -> None:
        self._pool = pool
        self._keys = keys

    async def read(self, request: Request, name: str) -> Response:
        """GET and HEAD."""
        claims, shape, prefer, query = self._parse(request)
        async with transaction(self._pool, request, claims) as (connection, overrides):
            table = await _relation(connection, name)
            statement = Statement(name, table.types)
            columns = statement.columns(await known_casts(connection, query.select))
            source, where = f" from public.{quoted(name)}", statement.where(query.filters)
            ordering, limit = statement.ordering(query.ordering), statement.page(query.offset, query.limit)
            total = f"select count(*){source}{where}" if prefer.count else "null"
            text = counted(
                f"select {columns}{source}{where}{ordering}{limit}",
                total=total,
                single=shape.single,
                strip_nulls=shape.strip_nulls,
            )
            row = await fetch(connection, text, statement.parameters, shape)
            status, span = page(row, query.offset)
        headers = {"Content-Range": span, "Preference-Applied": prefer.applied}
        return respond(request, shape, overrides, status=status, body=row["body"], headers=headers)

    async def insert(self, request: Request, name: str) -> Response:
        """POST: an object or an array of objects; with `resolution`, an upsert."""
        claims, shape, prefer, query = self._parse(request)
        _refuse_pages(query)
        if prefer.returning == "headers-only":
            raise not_implemented("the preference return=headers-only")
        check_json(request)
        body = bodies.read(await request.body(), same_keys=query.columns is None)
        async with transaction(self._pool, request, claims) as (connection, overrides):
            table = await _relation(connection, name)
            columns = _known(table, query.columns or body.keys)
            statement = Statement(name, table.types)
            text = statements.insert(
                statement,
                table,
                body.array,
                columns,
                conflict=(query.on_conflict or table.key) if prefer.resolution else (),
                merge=prefer.resolution == "merge-duplicates",
                returning=await _returning(connection, statement, query, prefer),
            )
            text = counted(text, single=shape.single, strip_nulls=shape.strip_nulls)
            row = await fetch(connection, text, statement.parameters, shape)
        all_were_there = row["updated"] is not None and row["updated"] >= row["rows"]
        headers = {"Content-Range": f"*/{row['rows'] if prefer.count else '*'}", "Preference-Applied": prefer.applied}
        content = row["body"] if prefer.returning == "representation" else None
        return respond(request, shape, overrides, status=200 if all_were_there else 201, body=content, headers=headers)

    async def update(self, request: Request, name: str) -> Response:
        """PATCH: all rows that pass the filters; at least one filter is required."""
        claims, shape, prefer, query = self._parse(request)
        _refuse_pages(query)
        check_json(request)
        body = bodies.read(await request.body())
        if body.is_array:
            raise not_implemented("PATCH with an array")
        async with transaction(self._pool, request, claims) as (connection, overrides):
            table = await _relation(connection, name)
            columns = _known(table, query.columns or body.keys)
            statement = Statement(name, table.types)
            where = statement.where(query.filters)
            returning = await _returning(connection, statement, query, prefer)
            if columns:
                _need_filters(query, "UPDATE")
                text = statements.update(statement, table, body.text, columns, where=where, returning=returning)
            else:
                text = f"select {returning} from public.{quoted(name)} where false"  # noqa: S608 - as above
                statement.parameters.clear()
            text = counted(text, single=shape.single, strip_nulls=shape.strip_nulls)
            row = await fetch(connection, text, statement.parameters, shape)
        span = f"0-{row['rows'] - 1}" if row["rows"] else "*"
        headers = {
            "Content-Range": f"{span}/{row['rows'] if prefer.count else '*'}",
            "Preference-Applied": prefer.applied,
        }
        content = row["body"] if prefer.returning == "representation" else None
        return respond(request, shape, overrides, status=204 if content is None else 200, body=content, headers=headers)

    async def delete(self, request: Request, name: str) -> Response:
        """DELETE: all rows that pass the filters; at least one filter is required."""
        claims, shape, prefer, query = self._parse(request)
        _refuse_pages(query)
        async with transaction(self._pool, request, claims) as (connection, overrides):
            table = await _relation(connection, name)
            statement = Statement(name, table.types)
            where = statement.where(query.filters)
            returning = await _returning(connection, statement, query, prefer)
            _need_filters(query, "DELETE")
            text = f"delete from public.{quoted(name)}{where} returning {returning}"  # noqa: S608 - as above
            text = counted(text, single=shape.single, strip_nulls=shape.strip_nulls)
            row = await fetch(connection, text, statement.parameters, shape)
        headers = {"Content-Range": f"*/{row['rows'] if prefer.count else '*'}", "Preference-Applied": prefer.applied}
        content = row["body"] if prefer.returning == "representation" else None
        return respond(request, shape, overrides, status=204 if content is None else 200, body=content, headers=headers)

    def _parse(self, request: Request) -> tuple[dict[str, Any], ResponseFormat, Preferences, Query]:
        check_schema(request)
        return caller(request, self._keys), parse_accept(request), parse_prefer(request), parse_query(request)


async def _relation(connection: Connection, name: str) -> Relation:
    found = await relation(connection, name)
    if found is None:
        raise no_table(name)
    return found


async def _returning(connection: Connection, statement: Statement, query: Query, prefer: Preferences) -> str:
    """Return the `returning` list: no columns unless they are requested, since that takes the right to read them."""
    if prefer.returning != "representation":
        return "1"
    return statement.columns(await known_casts(connection, query.select))


def _known(table: Relation, columns: Sequence[str]) -> Sequence[str]:
    for name in columns:
        if name not in table.columns:
            raise no_column(name, table.name)
    return columns


def _refuse_pages(query: Query) -> None:
    if query.ordering or query.limit is not None or query.offset:
        raise not_implemented("order, limit and offset of what is written")


def _need_filters(query: Query, what: str) -> None:
    """Refuse a write without a filter, as the extension safeupdate does on Supabase."""
    if not query.filters:
        raise RestError(400, "21000", f"{what} requires a WHERE clause")
