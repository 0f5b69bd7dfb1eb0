"""Walk large tables after a migration, and not in its transaction, so that no writer waits for that.

A migration's text says what can wait: all that stands below `if current_setting('image_jobs.indexes', true) …`.
"""

import asyncio
import re

from daemon.database import Connection

LARGE = 64 * 2**20
"""Bytes of the tables that an application had before us; below, a migration itself builds their indexes in an instant."""

_TABLES = ("runs", "run_events", "workflow_nodes")
_INDEX = re.compile(
    rf"^create (unique )?index if not exists (\w+)(\s+on public\.(?:{'|'.join(_TABLES)}) [^;]*);", re.MULTILINE
)
_PROBE = re.compile(r"^do \$probe\$.*?^\$probe\$;", re.MULTILINE | re.DOTALL)
_WORKFLOWS = re.compile(r"^insert into image_jobs\.workflows \(id\)\nselect [^;]*;", re.MULTILINE)
_LOCK = "hashtextextended('image_jobs.indexes', 0)"


async def are_postponed(connection: Connection) -> bool:
    """Return whether the tables are so large that their indexes are built afterwards."""
    sizes = "select coalesce(sum(pg_table_size(to_regclass('public.' || name))), 0) from unnest($1::text[]) name"
    return await connection.fetchval(sizes, _TABLES) > LARGE


async def build_indexes(connection: Connection, sql: str, *, timeout: float) -> list[str]:
    """Build the indexes of a migration that are missing, or were left invalid, and do what else it has postponed.

    Args:
        connection: Outside of a transaction.
        sql: The migration's text.
        timeout: Seconds that one statement may take.

    Returns:
        The names of those that were built.

    Raises:
        asyncpg.PostgresError: If one cannot be built, or if the probe fails. What was built stays.
    """
    if not await _missing(connection, sql):
        return []
    await connection.execute(f"set statement_timeout = '{timeout}s'")
    while True:
        # Not a lock that is waited for: the build of another migrator would wait for the transaction that waits.
        if await connection.fetchval(f"select pg_try_advisory_lock({_LOCK})"):
            break
        await asyncio.sleep(0.5)
    try:
        built = await _missing(connection, sql)
        for statement in _WORKFLOWS.findall(sql):
            await connection.execute(statement)
        for name, (unique, rest) in built.items():
            await connection.execute(f"drop index concurrently if exists public.{name}")
            await connection.execute(f"create {unique}index concurrently {name}{rest}")
        if probe := _PROBE.search(sql):
            await connection.execute(probe[0])
    finally:
        await connection.execute(f"select pg_advisory_unlock({_LOCK})")
    return list(built)


async def _missing(connection: Connection, sql: str) -> dict[str, tuple[str, str]]:
    wanted = {name: (unique, rest) for unique, name, rest in _INDEX.findall(sql)}
    valid = (
        "select c.relname from pg_index i join pg_class c on c.oid = i.indexrelid where i.indisvalid "
        "and c.oid = any (array(select to_regclass('public.' || name) from unnest($1::text[]) name))"
    )
    there = {str(row[0]) for row in await connection.fetch(valid, list(wanted))}
    return {name: definition for name, definition in wanted.items() if name not in there}
