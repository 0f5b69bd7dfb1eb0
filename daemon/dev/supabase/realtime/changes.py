"""postgres_changes: what is written to a table goes out to those who may read it.

As on the real server: read from the log through a slot that is asked every 100 ms; each change is looked up once per
subscriber, in its role; of a deleted row there is nothing to look up, so everybody hears its key, and no filter but one on
the key lets it through; a value too large for its row is missing where it has not changed.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
import structlog

from daemon.database import Connection
from daemon.dev.realtime.access import AS_CLAIMED
from daemon.dev.realtime.bindings import OPERATORS, Binding, check
from daemon.dev.realtime.frames import Message
from daemon.dev.realtime.rooms import Channel
from daemon.dev.realtime.wal import Change, Row, changes
from daemon.dev.rest.statements import quoted

log = structlog.stdlib.get_logger()

INTERVAL = 0.1
MAX_BYTES = 1 << 20
LARGE_VALUE = 64
"""Bytes of a value that is left out of a row beyond `MAX_BYTES`."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column. `name` of its type is short, as in `int4`; `sql_type` is what SQL calls it."""

    name: str
    type: str
    sql_type: str
    in_key: bool


@dataclass(frozen=True, slots=True)
class Table:
    schema: str
    name: str
    rls: bool
    columns: Sequence[Column]


class Changes:
    """Follows the log for as long as somebody wants to hear of it.

    Args:
        dsn: Where to read it, as a role with REPLICATION.
        pool: Connections to the same database, of a role that may become every API role.
    """

    def __init__(self, dsn: str, pool: "asyncpg.Pool[asyncpg.Record]") -> None:
        self._dsn = dsn
        self._pool = pool
        self._channels: dict[Channel, Sequence[Binding]] = {}
        self._wanted = asyncio.Event()
        self._following = asyncio.Event()

    async def subscribe(self, channel: Channel, bindings: Sequence[Binding]) -> None:
        """From the moment that this returns the channel hears.

        Raises:
            BindingRefused: If there is no such table, or no such column.
        """
        async with self._pool.acquire() as connection:
            for one in bindings:
                # A pool's connection is one but for its class.
                await check(connection, one)  # pyright: ignore[reportArgumentType]
        self._wanted.set()
        await self._following.wait()
        self._channels[channel] = bindings

    def unsubscribe(self, channel: Channel) -> None:
        self._channels.pop(channel, None)

    async def run(self) -> None:
        """Follows, for ever. Once begun it goes on when nobody is left: the log is let go of all the same."""
        await self._wanted.wait()
        connection = await asyncpg.connect(self._dsn)
        try:
            slot = f"realtime_{connection.get_server_pid()}"
            await connection.execute(
                "select pg_create_logical_replication_slot($1, 'pgoutput', temporary => true)", slot
            )
            self._following.set()
            while True:
                await asyncio.sleep(INTERVAL)
                rows = await connection.fetch(
                    """select data from pg_logical_slot_get_binary_changes(
                      $1, null, 100, 'proto_version', '1', 'publication_names', 'supabase_realtime')""",
                    slot,
                )
                tables: dict[int, Table] = {}
                for change in changes(row["data"] for row in rows):
                    if change.table not in tables:
                        tables[change.table] = await _table(connection, change.table)
                    for channel, bindings in list(self._channels.items()):
                        await self._tell(channel, bindings, change, tables[change.table])
        finally:
            await connection.close()

    async def _tell(self, channel: Channel, bindings: Sequence[Binding], change: Change, table: Table) -> None:
        fitting = [one for one in bindings if one.fits(change.kind, table.schema, table.name)]
        if not fitting:
            return
        try:
            async with self._pool.acquire() as pooled, pooled.transaction(readonly=True):
                connection: Any = pooled
                ids = [one.id for one in fitting if await _passes(connection, one, change, table)]
                if not ids:
                    return
                await connection.execute(AS_CLAIMED, channel.claims["role"], json.dumps(dict(channel.claims)))
                data = await _seen(connection, change, table)
        except asyncpg.PostgresError as error:  # the table is another one by now, or a policy of it fails
            log.warning("realtime.change_lost", table=table.name, error=str(error))
            return
        if data is not None:
            channel.send(Message(channel.topic, "postgres_changes", {"data": data, "ids": ids}))


async def _seen(connection: Connection, change: Change, table: Table) -> dict[str, Any] | None:
    """The change as the role that the transaction has sees it; None if it does not see the row."""
    data: dict[str, Any] = {
        "schema": table.schema,
        "table": table.name,
        "type": change.kind,
        "commit_timestamp": change.committed_at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "errors": None,
    }
    key = [column for column in table.columns if column.in_key]
    if not key:
        return {**data, "errors": ["Error 400: Bad Request, no primary key"]}
    readable = await _readable(connection, table)
    if not all(column in readable for column in key):
        return {**data, "errors": ["Error 401: Unauthorized"]}
    if change.kind != "DELETE" and not await _visible(connection, change.new, table, key):
        return None
    data["columns"] = [{"name": column.name, "type": column.type} for column in readable]
    new, old = change.new, change.old
    if change.size > MAX_BYTES:
        data["errors"] = ["Error 413: Payload Too Large"]
        new, old = _small(new), _small(old)
    if change.kind != "DELETE":
        data["record"] = await _as_json(connection, new, readable)
    if change.kind == "UPDATE":
        data["old_record"] = await _as_json(connection, old or new, readable if old else key)
    if change.kind == "DELETE":
        data["old_record"] = await _as_json(connection, old, key if table.rls else readable)
    return data


async def _passes(connection: Connection, one: Binding, change: Change, table: Table) -> bool:
    """Whether the filter lets the change through. What is not in the log passes no filter."""
    if one.column is None:
        return True
    row = change.old if change.kind == "DELETE" else change.new
    column = next((each for each in table.columns if each.name == one.column), None)
    if column is None or one.column not in row or (change.kind == "DELETE" and table.rls and not column.in_key):
        return False
    sql_type = column.sql_type
    return bool(
        await connection.fetchval(
            f"select ($1::text)::{sql_type} {OPERATORS[one.operator]} any (($2::text[])::{sql_type}[])",
            row[one.column],
            one.values,
        )
    )


async def _visible(connection: Connection, row: Row, table: Table, key: Sequence[Column]) -> bool:
    """Whether the policies of the table show the row to the role that the transaction has."""
    where = " and ".join(
        f"{quoted(column.name)} = (${number}::text)::{column.sql_type}" for number, column in enumerate(key, 1)
    )
    source = f"{quoted(table.schema)}.{quoted(table.name)}"
    return bool(
        await connection.fetchval(
            f"select exists (select from {source} where {where})",  # noqa: S608 - names are quoted, values parameters
            *(row[column.name] for column in key),
        )
    )


async def _readable(connection: Connection, table: Table) -> list[Column]:
    """The columns that the role that the transaction has may read."""
    names = await connection.fetchval(
        """select array(select name from unnest($1::text[]) as name
          where has_column_privilege(format('%I.%I', $2::text, $3::text), name, 'select'))""",
        [column.name for column in table.columns],
        table.schema,
        table.name,
    )
    return [column for column in table.columns if column.name in names]


async def _as_json(connection: Connection, row: Row, columns: Sequence[Column]) -> dict[str, Any]:
    """The values of a row as the database writes them in JSON."""
    there = [column for column in columns if column.name in row]
    values = ", ".join(
        f"(($1::text[])[{number}])::{column.sql_type} as {quoted(column.name)}"
        for number, column in enumerate(there, 1)
    )
    text = await connection.fetchval(
        f"select to_jsonb(logged)::text from (select {values}) as logged",  # noqa: S608 - as above
        [row[column.name] for column in there],
    )
    return json.loads(text)


def _small(row: Row) -> Row:
    return {name: value for name, value in row.items() if value is None or len(value.encode()) <= LARGE_VALUE}


async def _table(connection: Connection, oid: int) -> Table:
    rows = await connection.fetch(
        """select n.nspname::text as schema, c.relname::text as table, c.relrowsecurity as rls, a.attname::text as name,
          t.typname::text as type, pg_catalog.format_type(a.atttypid, -1) as sql_type,
          coalesce(a.attnum = any (i.indkey), false) as in_key
        from pg_catalog.pg_class c
        join pg_catalog.pg_namespace n on n.oid = c.relnamespace
        join pg_catalog.pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
        join pg_catalog.pg_type t on t.oid = a.atttypid
        left join pg_catalog.pg_index i on i.indrelid = c.oid and i.indisprimary
        where c.oid = $1::oid order by a.attnum""",
        oid,
    )
    columns = [Column(row["name"], row["type"], row["sql_type"], row["in_key"]) for row in rows]
    if not rows:
        return Table("", "", rls=True, columns=())  # dropped since: nobody listens to that
    return Table(rows[0]["schema"], rows[0]["table"], rows[0]["rls"], columns)
