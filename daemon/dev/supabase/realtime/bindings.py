"""Subscriptions to changes of tables: event, table, filter."""

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import asyncpg

from daemon.database import Connection

OPERATORS: Mapping[str, str] = {"eq": "=", "neq": "<>", "lt": "<", "lte": "<=", "gt": ">", "gte": ">=", "in": "="}


class BindingRefused(Exception):
    """A subscription that is refused, with the server's message."""


@dataclass(frozen=True, slots=True)
class Binding:
    """One subscription of a channel. `config` is the client's object, which the reply repeats."""

    id: int
    config: Mapping[str, Any]
    event: str
    schema: str
    table: str | None
    column: str | None = None
    operator: str = "eq"
    value: str = ""

    @property
    def values(self) -> list[str]:
        """The operands of the filter: one value, or those of a list."""
        return self.value.strip("()").split(",") if self.operator == "in" else [self.value]

    def fits(self, kind: str, schema: str, table: str) -> bool:
        """Whether a change matches event, schema and table; the filter is not evaluated."""
        return self.event in {"*", kind} and self.schema == schema and self.table in {None, "*", table}

    def described(self) -> str:
        """Format the subscription as the server does in its errors."""
        filters = f'{{"{self.column}", "{self.operator}", "{self.value}", false}}' if self.column else ""
        where = f"schema: {self.schema}" + (f", table: {self.table}" if self.table else "")
        return f"[event: {self.event}, {where}, filters: [{filters}], select: nil]"


def parse_binding(config: Mapping[str, Any]) -> Binding:
    """Parse a subscription. Equal subscriptions get the same id.

    Raises:
        BindingRefused: If it cannot be parsed, or is not implemented here.
    """
    table = config.get("table")
    found = Binding(
        zlib.crc32(json.dumps(config, sort_keys=True).encode()) >> 4,
        config,
        str(config.get("event", "*")),
        str(config.get("schema", "public")),
        None if table is None else str(table),
    )
    text = config.get("filter")
    if text:
        column, equals, rest = str(text).partition("=")
        operator, dot, value = rest.partition(".")
        if not equals or not dot:
            raise BindingRefused(f"Error parsing `filter` params: {text}")
        if operator not in OPERATORS or ("," in value and operator != "in"):
            raise BindingRefused(f"image-jobs dev does not have the filter {text}.")
        found = Binding(
            found.id, config, found.event, found.schema, found.table, column=column, operator=operator, value=value
        )
    if config.get("select"):
        raise BindingRefused("image-jobs dev does not have a selection of columns.")
    return found


async def check_binding(connection: Connection, one: Binding) -> None:
    """Require that the table is in the publication, and has the column of the filter.

    Raises:
        BindingRefused: With the message of the real server.
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
