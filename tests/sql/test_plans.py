"""What a write costs must not depend on how many rows the table has, nor on when it was last analysed."""

from typing import Any

import asyncpg

from daemon.queue import Queue
from tests.runs import completed, insert_runs, register

Db = asyncpg.Connection

READ = """
select coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) from pg_stat_xact_user_tables where relname = 'runs'
"""
FEW = 5


async def rows_read(
    db: Db, daemon: object, *, settlements: list[dict[str, Any]], progress: list[dict[str, Any]]
) -> int:
    """How many rows of `runs` one turn reads."""
    async with db.transaction():
        before = await db.fetchval(READ)
        answers = await db.fetch(
            "select part from private.turn($1, 0, false, $2, $3, null, null)", daemon, settlements, progress
        )
        assert len(answers) == FEW
        return (await db.fetchval(READ)) - before


async def test_a_turn_reads_only_the_rows_that_it_writes(database: str, db: Db) -> None:
    await insert_runs(db, 1500)
    async with Queue(database) as queue:
        daemon = await register(queue, slots=FEW)
        claimed = (await queue.turn(daemon, slots=FEW, thorough=True)).claimed
    await db.execute("analyze runs")
    entries = [{"id": run.id, "claim": run.claim} for run in claimed]
    progress = [{**entry, "progress": 5, "events": []} for entry in entries]
    assert await rows_read(db, daemon, settlements=[], progress=progress) < 20 * FEW
    settlements = [{**completed(), **entry} for entry in entries]
    assert await rows_read(db, daemon, settlements=settlements, progress=[]) < 20 * FEW


async def test_passing_runs_on_reads_no_run_without_a_fallback_and_no_more_than_its_share_of_the_others(db: Db) -> None:
    await insert_runs(db, 1500, processor="openai:gpt-image-2")
    await db.execute("update provider_limits set paused = true where provider in ('openai', 'google')")

    async def read() -> int:
        async with db.transaction():
            before = await db.fetchval(READ)
            await db.execute("select private.pass_on()")
            return (await db.fetchval(READ)) - before

    assert await read() == 0
    await insert_runs(db, 1500, processor="openai:gpt-image-2", fallback=["google:gemini-3-pro-image"])
    await db.execute("analyze runs")
    assert await read() < 210
