"""Syncs that find nothing: they neither write nor lock."""

from uuid import UUID

import asyncpg
import pytest

from daemon.queue.client import Queue
from tests.support.runs import completed, insert_runs, register

pytestmark = pytest.mark.every_postgres

Db = asyncpg.Connection


async def writes(db: Db, daemon: UUID, full_scan: bool) -> bool:
    """Return whether a sync with free slots writes or locks anything."""
    async with db.transaction():
        await db.execute("select image_jobs.sync($1, 4, $2, '[]', '[]', null, null)", daemon, full_scan)
        return await db.fetchval("select pg_current_xact_id_if_assigned() is not null")


@pytest.mark.one_postgres
async def test_a_sync_writes_only_while_something_happens(database: str, db: Db) -> None:
    async with Queue(database) as queue:
        daemon = await register(queue)
        for hour in (1, 2):
            await insert_runs(db, 1)
            (run,) = (await queue.sync(daemon, slots=4, full_scan=True)).claimed
            await queue.sync(daemon, slots=0, settlements=[{**completed(), "id": run.id, "claim": run.claim}])
            # The marks of the scans move behind what there was.
            await db.execute(f"set image_jobs.clock_offset = '{hour} hours'")
            assert await writes(db, daemon, False)
            for minutes in (2, 4):
                await db.execute(f"set image_jobs.clock_offset = '{hour} hours {minutes} minutes'")
                assert [await writes(db, daemon, full_scan) for full_scan in (False, True)] == [False, False]


@pytest.mark.one_postgres
async def test_a_fenced_daemon_is_refused_with_nothing_to_do(database: str, db: Db) -> None:
    async with Queue(database) as queue:
        daemon = await register(queue)
    await db.execute("update image_jobs.daemons set ended_at = now(), ended = 'taken over'")
    with pytest.raises(asyncpg.PostgresError, match="taken for dead"):
        await writes(db, daemon, False)
