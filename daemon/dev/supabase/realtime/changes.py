"""postgres_changes: sends changes of published tables to the subscribers that may read the row.

As on the real server: a replication slot is read every 100 ms, and at once after a full batch; each changed row is selected once per subscriber, in its
role. A deleted row cannot be selected: its key is sent to all subscribers, and only filters on the key match. A value too
large for its row is missing where it has not changed.
"""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
import structlog

from daemon.database import Connection
from daemon.dev.supabase.realtime.access import AS_CLAIMED
from daemon.dev.supabase.realtime.bindings import OPERATORS, Binding, check_binding
from daemon.dev.supabase.realtime.frames import Message
from daemon.dev.supabase.realtime.limits import RateLimit
from daemon.dev.supabase.realtime.rooms import Channel
from daemon.dev.supabase.realtime.wal import Change, Row, decode
from daemon.dev.supabase.rest.statements import quoted

log = structlog.stdlib.get_logger()

INTERVAL = 0.1
"""Seconds until the slot is read again, once it is empty."""
BATCH = 100
"""Messages of the log that are read at once; a transaction is never split."""
MAX_BYTES = 1 << 20
LARGE_VALUE = 64
"""Bytes of a value that is left out of a row beyond `MAX_BYTES`."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column. `type` is the short name, as in `int4`; `sql_type` is the one of SQL."""

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
    """Reads the replication stream from the first subscription on.

    Args:
        dsn: Of the database, as a role with REPLICATION.
        pool: Connections to the same database, of a role that may become every API role.
        limit: Of the project's messages.
    """

    def __init__(self, dsn: str, pool: "asyncpg.Pool[asyncpg.Record]", limit: RateLimit) -> None:
        self._dsn = dsn
        self._limit = limit
        self._pool = pool
        self._channels: dict[Channel, Sequence[Binding]] = {}
        self._subscribed = asyncio.Event()
        self._following = asyncio.Event()

    async def subscribe(self, channel: Channel, bindings: Sequence[Binding]) -> None:
        """Add a channel: once this returns, it gets every change.

        Raises:
            BindingRefused: If there is no such table, or no such column.
        """
        async with self._pool.acquire() as connection:
            for one in bindings:
                # A pool's connection is one but for its class.
                await check_binding(connection, one)  # pyright: ignore[reportArgumentType]
        self._subscribed.set()
        await self._following.wait()
        self._channels[channel] = bindings

    def unsubscribe(self, channel: Channel) -> None:
        self._channels.pop(channel, None)

    async def run(self) -> None:
        """Send changes until cancelled. It goes on without subscribers: an unread slot would keep the log."""
        await self._subscribed.wait()
        connection = await asyncpg.connect(self._dsn)
        try:
            slot = f"realtime_{connection.get_server_pid()}"
            await connection.execute(
                "select pg_create_logical_replication_slot($1, 'pgoutput', temporary => true)", slot
            )
            self._following.set()
            rows: Sequence[asyncpg.Record] = ()
            while True:
                if len(rows) < BATCH:  # else there may be more
                    await asyncio.sleep(INTERVAL)
                rows = await connection.fetch(
                    """select data from pg_logical_slot_get_binary_changes(
                      $1, null, $2, 'proto_version', '1', 'publication_names', 'supabase_realtime')""",
                    slot,
                    BATCH,
                )
                tables: dict[int, Table] = {}
                for change in decode(row["data"] for row in rows):
                    if change.table not in tables:
                        tables[change.table] = await _table(connection, change.table)
                    for channel, bindings in list(self._channels.items()):
                        await self._send(channel, bindings, change, tables[change.table])
        finally:
            await connection.close()

    async def _send(self, channel: Channel, bindings: Sequence[Binding], change: Change, table: Table) -> None:
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
                data = await _payload(connection, change, table)
        except asyncpg.PostgresError as error:  # the table was replaced, or a policy of it fails
            log.warning("realtime.change_lost", table=table.name, error=str(error))
            return
        if data is not None and self._limit.admits():
            channel.send(Message(channel.topic, "postgres_changes", {"data": data, "ids": ids}))


async def _payload(connection: Connection, change: Change, table: Table) -> dict[str, Any] | None:
    """Format a change for the transaction's role; None if it may not see the row."""
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
    """Whether a change matches the filter. A value that is not in the log matches none."""
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
    """Whether the table's policies show the row to the transaction's role."""
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
    """Return the columns that the transaction's role may read."""
    names = await connection.fetchval(
        """select array(select name from unnest($1::text[]) as name
          where has_column_privilege(format('%I.%I', $2::text, $3::text), name, 'select'))""",
        [column.name for column in table.columns],
        table.schema,
        table.name,
    )
    return [column for column in table.columns if column.name in names]


async def _as_json(connection: Connection, row: Row, columns: Sequence[Column]) -> dict[str, Any]:
    """Convert the values of a row to JSON, in the database."""
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
        return Table("", "", rls=True, columns=())  # dropped since: no binding matches it
    return Table(rows[0]["schema"], rows[0]["table"], rows[0]["rls"], columns)
