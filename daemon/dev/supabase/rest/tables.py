"""Tables and views: select, insert, update, delete."""

from collections.abc import Sequence
from typing import Any

import asyncpg
from starlette.requests import Request
from starlette.responses import Response

from daemon.database import Connection
from daemon.dev.keys import Keys
from daemon.dev.rest import bodies, statements
from daemon.dev.rest.answers import RestError, no_column, no_table, not_implemented
from daemon.dev.rest.catalogue import Relation, relation
from daemon.dev.rest.requests import (
    Form,
    Preferences,
    Query,
    caller,
    check_json,
    check_schema,
    form,
    preferences,
    query,
)
from daemon.dev.rest.results import answer, fetch, known_casts, page
from daemon.dev.rest.statements import Statement, counted, quoted
from daemon.dev.rest.transactions import transaction


class Tables:
    """Answers requests for `/<table>`.

    Args:
        pool: Connections of a role that may become each of the API roles.
        keys: Who may ask.
    """

    def __init__(self, pool: "asyncpg.Pool[asyncpg.Record]", keys: Keys) -> None:
        self._pool = pool
        self._keys = keys

    async def read(self, request: Request, name: str) -> Response:
        """GET and HEAD."""
        claims, shape, wishes, asked = self._asked(request)
        async with transaction(self._pool, request, claims) as (connection, said):
            table = await _relation(connection, name)
            statement = Statement(name, table.types)
            columns = statement.columns(await known_casts(connection, asked.select))
            source, where = f" from public.{quoted(name)}", statement.where(asked.filters)
            order, cut = statement.order_by(asked.order), statement.page(asked.offset, asked.limit)
            total = f"select count(*){source}{where}" if wishes.count else "null"
            text = counted(
                f"select {columns}{source}{where}{order}{cut}",
                total=total,
                single=shape.single,
                strip_nulls=shape.strip_nulls,
            )
            row = await fetch(connection, text, statement.parameters, shape)
            status, span = page(row, asked.offset)
        headers = {"Content-Range": span, "Preference-Applied": wishes.applied}
        return answer(request, shape, said, status=status, body=row["body"], headers=headers)

    async def insert(self, request: Request, name: str) -> Response:
        """POST: an object or an array of objects; with `resolution`, those that are there already are no error."""
        claims, shape, wishes, asked = self._asked(request)
        _refuse_pages(asked)
        if wishes.answer == "headers-only":
            raise not_implemented("the preference return=headers-only")
        check_json(request)
        body = bodies.read(await request.body(), same_keys=asked.columns is None)
        async with transaction(self._pool, request, claims) as (connection, said):
            table = await _relation(connection, name)
            columns = _known(table, asked.columns or body.keys)
            statement = Statement(name, table.types)
            text = statements.insert(
                statement,
                table,
                body.array,
                columns,
                conflict=(asked.on_conflict or table.key) if wishes.resolution else (),
                merge=wishes.resolution == "merge-duplicates",
                returning=await _returning(connection, statement, asked, wishes),
            )
            text = counted(text, single=shape.single, strip_nulls=shape.strip_nulls)
            row = await fetch(connection, text, statement.parameters, shape)
        all_were_there = row["updated"] is not None and row["updated"] >= row["rows"]
        headers = {"Content-Range": f"*/{row['rows'] if wishes.count else '*'}", "Preference-Applied": wishes.applied}
        content = row["body"] if wishes.answer == "representation" else None
        return answer(request, shape, said, status=200 if all_were_there else 201, body=content, headers=headers)

    async def update(self, request: Request, name: str) -> Response:
        """PATCH: all rows that pass the filters; there must be one."""
        claims, shape, wishes, asked = self._asked(request)
        _refuse_pages(asked)
        check_json(request)
        body = bodies.read(await request.body())
        if body.is_array:
            raise not_implemented("PATCH with an array")
        async with transaction(self._pool, request, claims) as (connection, said):
            table = await _relation(connection, name)
            columns = _known(table, asked.columns or body.keys)
            statement = Statement(name, table.types)
            where = statement.where(asked.filters)
            returning = await _returning(connection, statement, asked, wishes)
            if columns:
                _need_filters(asked, "UPDATE")
                text = statements.update(statement, table, body.text, columns, where=where, returning=returning)
            else:
                text = f"select {returning} from public.{quoted(name)} where false"  # noqa: S608 - as above
                statement.parameters.clear()
            text = counted(text, single=shape.single, strip_nulls=shape.strip_nulls)
            row = await fetch(connection, text, statement.parameters, shape)
        span = f"0-{row['rows'] - 1}" if row["rows"] else "*"
        headers = {
            "Content-Range": f"{span}/{row['rows'] if wishes.count else '*'}",
            "Preference-Applied": wishes.applied,
        }
        content = row["body"] if wishes.answer == "representation" else None
        return answer(request, shape, said, status=204 if content is None else 200, body=content, headers=headers)

    async def delete(self, request: Request, name: str) -> Response:
        """DELETE: all rows that pass the filters; there must be one."""
        claims, shape, wishes, asked = self._asked(request)
        _refuse_pages(asked)
        async with transaction(self._pool, request, claims) as (connection, said):
            table = await _relation(connection, name)
            statement = Statement(name, table.types)
            where = statement.where(asked.filters)
            returning = await _returning(connection, statement, asked, wishes)
            _need_filters(asked, "DELETE")
            text = f"delete from public.{quoted(name)}{where} returning {returning}"  # noqa: S608 - as above
            text = counted(text, single=shape.single, strip_nulls=shape.strip_nulls)
            row = await fetch(connection, text, statement.parameters, shape)
        headers = {"Content-Range": f"*/{row['rows'] if wishes.count else '*'}", "Preference-Applied": wishes.applied}
        content = row["body"] if wishes.answer == "representation" else None
        return answer(request, shape, said, status=204 if content is None else 200, body=content, headers=headers)

    def _asked(self, request: Request) -> tuple[dict[str, Any], Form, Preferences, Query]:
        check_schema(request)
        return caller(request, self._keys), form(request), preferences(request), query(request)


async def _relation(connection: Connection, name: str) -> Relation:
    found = await relation(connection, name)
    if found is None:
        raise no_table(name)
    return found


async def _returning(connection: Connection, statement: Statement, asked: Query, wishes: Preferences) -> str:
    """What to answer with; nothing of the row if it is not asked for, since that takes the right to read it."""
    if wishes.answer != "representation":
        return "1"
    return statement.columns(await known_casts(connection, asked.select))


def _known(table: Relation, columns: Sequence[str]) -> Sequence[str]:
    for name in columns:
        if name not in table.columns:
            raise no_column(name, table.name)
    return columns


def _refuse_pages(asked: Query) -> None:
    if asked.order or asked.limit is not None or asked.offset:
        raise not_implemented("order, limit and offset of what is written")


def _need_filters(asked: Query, what: str) -> None:
    """Supabase's servers have the extension safeupdate."""
    if not asked.filters:
        raise RestError(400, "21000", f"{what} requires a WHERE clause")
