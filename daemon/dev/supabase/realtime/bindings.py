"""What a client wants to hear of changes to tables: event, table, filter."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg

from daemon.database import Connection

OPERATORS: Mapping[str, str] = {"eq": "=", "neq": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">=", "in": "="}


class BindingRefused(Exception):
    """What the server answers when it cannot listen to that."""


@dataclass(frozen=True, slots=True)
class Binding:
    """One of the wishes of a channel. `asked` is what the client sent, which the reply repeats."""

    id: int
    asked: Mapping[str, Any]
    event: str
    schema: str
    table: str | None
    column: str | None = None
    operator: str = "eq"
    value: str = ""

    @property
    def values(self) -> list[str]:
        """What the filter compares with: one value, or those of a list."""
        return self.value.strip("()").split(",") if self.operator == "in" else [self.value]

    def fits(self, kind: str, schema: str, table: str) -> bool:
        """Whether a change is one of these, but for the filter."""
        return self.event in {"*", kind} and self.schema == schema and self.table in {None, "*", table}

    def described(self) -> str:
        """As the server prints it in its errors."""
        filters = f'{{"{self.column}", "{self.operator}", "{self.value}", false}}' if self.column else ""
        where = f"schema: {self.schema}" + (f", table: {self.table}" if self.table else "")
        return f"[event: {self.event}, {where}, filters: [{filters}], select: nil]"


def binding(asked: Mapping[str, Any]) -> Binding:
    """Reads a wish. The same wish always gets the same id.

    Raises:
        BindingRefused: If it is for something that is not to be had here.
    """
    table = asked.get("table")
    found = Binding(
        zlib.crc32(json.dumps(asked, sort_keys=True).encode()) >> 4,
        asked,
        str(asked.get("event", "*")),
        str(asked.get("schema", "public")),
        None if table is None else str(table),
    )
    text = asked.get("filter")
    if text:
        column, equals, rest = str(text).partition("=")
        operator, dot, value = rest.partition(".")
        if not equals or not dot:
            raise BindingRefused(f"Error parsing `filter` params: {text}")
        if operator not in OPERATORS or ("," in value and operator != "in"):
            raise BindingRefused(f"image-jobs dev does not have the filter {text}.")
        found = Binding(
            found.id, asked, found.event, found.schema, found.table, column=column, operator=operator, value=value
        )
    if asked.get("select"):
        raise BindingRefused("image-jobs dev does not have a selection of columns.")
    return found


async def check(connection: Connection, one: Binding) -> None:
    """Whether there is such a table in the publication, and such a column in the table.

    Raises:
        BindingRefused: In the words of the real server.
    """
    unable = "Unable to subscribe to changes with given parameters."
    oid = await connection.fetchval(
        """select c.oid from pg_catalog.pg_publication_tables p
        join pg_catalog.pg_namespace n on n.nspname = p.schemaname
        join pg_catalog.pg_class c on c.relnamespace = n.oid and c.relname = p.tablename
        where p.pubname = 'supabase_realtime' and p.schemaname = $1 and ($2::text is null or $2 in ('*', p.tablename))
        limit 1""",
        one.schema,
        one.table,
    )
    if oid is None:
        enabled = "Please check Realtime is enabled for the given connect parameters:"
        raise BindingRefused(f"{unable} {enabled} {one.described()}")
    if one.column is None:
        return
    happened = f"{unable} An exception happened so please check your connect parameters: {one.described()}. Exception:"
    sql_type = await connection.fetchval(
        """select pg_catalog.format_type(atttypid, -1) from pg_catalog.pg_attribute
        where attrelid = $1::oid and attname = $2 and attnum > 0 and not attisdropped""",
        oid,
        one.column,
    )
    if sql_type is None:
        raise BindingRefused(f"{happened} ERROR P0001 (raise_exception) invalid column for filter {one.column}")
    try:
        await connection.fetchval(f"select ($1::text[])::{sql_type}[] is null", one.values)
    except asyncpg.DataError as error:
        raise BindingRefused(f"{happened} ERROR {error.sqlstate} {error}") from None
