"""Tallies: each is counted by a daemon with metrics, and logged by one daemon, whichever of them comes first."""

import pytest

from tests.support.protocol import Db, move_clock

pytestmark = pytest.mark.one_postgres

CANCELLED = "insert into image_jobs.tallies (metric, provider, model, result, count) values ('runs', 'demo', 'painter', 'cancelled', 40)"
FAILED = """insert into image_jobs.tallies (metric, provider, model, result, count, run_id)
values ('runs', 'demo', 'painter', 'failed', 1, 'job_1')"""


async def take(db: Db, *, counts: bool) -> list[tuple[str, bool]]:
    """Take tallies as a daemon with or without metrics; return the result of each, and whether it was logged before."""
    rows = await db.fetch("select t from image_jobs.take_tallies($1) t", counts)
    return sorted((row["t"]["result"], row["t"]["logged"]) for row in rows)


async def test_a_daemon_without_metrics_leaves_them_to_others(db: Db) -> None:
    await db.execute(CANCELLED)
    await db.execute(FAILED)
    assert await take(db, counts=False) == [("failed", False)]
    assert await take(db, counts=False) == []
    assert await take(db, counts=True) == [("cancelled", False), ("failed", True)]
    assert await take(db, counts=True) == []


async def test_tallies_end_where_no_daemon_counts(db: Db) -> None:
    await db.execute(CANCELLED)
    await move_clock(db, "4 min")
    await take(db, counts=False)
    assert await db.fetchval("select count(*) from image_jobs.tallies") == 1
    await move_clock(db, "6 min")
    await take(db, counts=False)
    assert await db.fetchval("select count(*) from image_jobs.tallies") == 0
