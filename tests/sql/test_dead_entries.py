"""A sync behind dead entries: while an old transaction keeps vacuum away, what was done before must not make the next one dearer.

Pages are counted, not seconds: they say the same on every machine. `tests/bench/test_claim_cost.py` measures.
"""

from collections.abc import AsyncIterator

import asyncpg
import pytest

from tests.sql.test_limits import buffers_of
from tests.support.postgres import connect
from tests.support.protocol import new_daemon
from tests.support.runs import insert_runs

pytestmark = pytest.mark.every_postgres

Db = asyncpg.Connection

SYNC = "select part from image_jobs.sync($1, 5, $2, '[]', '[]', null, 1.0)"
MANY = 5000
PAGES = 100
"""A walk past all dead entries takes more: a page for each forty."""

RUNS = f"""
insert into runs (id, kind, subject_id, status, queue_state, processor, metadata, progress, priority, due_at, attempt, max_attempts,
  claim, ticket, provider_job_id, lane, rank)
select 'old-' || n, 'image_gen', md5((n % 100)::text)::uuid, $1::text, $1::text, 'demo:painter', '{{"promptSpec": {{"basePrompt": "a red fox"}}}}',
  0, 0, now() - interval '1 hour', 0, 3, nextval('image_jobs.claims'), nextval('image_jobs.tickets'),
  case $1::text when 'running' then 'job' end, 'demo', $2::integer * (n / 100)
from generate_series(1, {MANY}) n
"""
ENDED = """
update runs set status = 'completed', queue_state = null, rank = null, due_at = null, finished_at = now(),
  payload = '{"imageUrl": "https://example.supabase.co/x.png"}' where id like 'old-%'
"""


def repeated(statement: str, times: int = MANY) -> str:
    """Repeat a statement in the server."""
    return f"do $$ begin for n in 1..{times} loop {statement}; end loop; end $$"


MOVE = """
delete from image_jobs.watermarks m using image_jobs.lanes l
where l.lane = 'demo' and l.priority = 0 and m.lane = l.lane and m.priority = l.priority and m.version = l.version;
insert into image_jobs.watermarks (lane, priority, watermark) values ('demo', 0, 0)
"""
HOUR = 900
"""The most closings of a provider in an hour: each lasts 4 s at least. Who looks at a run that is set aside waits longer."""
STALE = f"""
insert into image_jobs.stale_nodes (node_id, due_at) select n, now() - interval '1 hour' from generate_series(1, {4 * MANY}) n
"""
SCENES = {
    "put off": (RUNS, ("pending", None), ENDED),
    "parked": (RUNS, ("running", None), ENDED),
    "watermarks": ("", (), repeated(MOVE)),
    "starts": ("", (), repeated("perform image_jobs.record_starts('demo', 'demo', 1)")),
    "blocks": (
        "",
        (),
        repeated(
            "perform image_jobs.block_until('demo', null, now(), 'x'); delete from image_jobs.provider_blocks", HOUR
        ),
    ),
    "streaks": (
        "",
        (),
        repeated(
            "insert into image_jobs.provider_streaks (provider) values ('demo'); delete from image_jobs.provider_streaks",
            HOUR,
        ),
    ),
    "set aside": (
        "",
        (),
        repeated(
            "insert into image_jobs.set_aside (run_id, until, sqlstate, reason) values ('x' || n % 9, now(), '42000', 'No.'); "
            "delete from image_jobs.set_aside",
            HOUR,
        ),
    ),
    "stale nodes": (STALE, (), "delete from image_jobs.stale_nodes"),
    # Each of these walks past all that were before.
    "beats": (
        "",
        (),
        repeated("perform image_jobs.heartbeat((select id from image_jobs.daemons), 1, false, false)", 3000),
    ),
}

RARE = {"blocks", "streaks", "set aside"}


@pytest.fixture
async def old(database: str) -> AsyncIterator[Db]:
    """A connection that can hold an old snapshot."""
    connection = await connect(database)
    yield connection
    await connection.close()


@pytest.mark.parametrize(
    "scene", [pytest.param(name, marks=pytest.mark.one_postgres if name in RARE else ()) for name in SCENES]
)
async def test_dead_entries_cost_a_sync_nothing(db: Db, old: Db, scene: str) -> None:
    fill, arguments, kill = SCENES[scene]
    await db.execute("insert into image_jobs.provider_limits (provider, per_minute) values ('demo', 1000000)")
    daemon = await new_daemon(db, "demo")
    await insert_runs(db, 30)
    await daemon.claim(1)
    before = await buffers_of(db, SYNC, daemon.id, False)
    await db.execute("alter table runs disable trigger user")
    if fill:
        await db.execute(fill, *arguments)
    async with old.transaction(isolation="repeatable_read"):
        await old.fetchval("select count(*) from runs")
        await db.execute(kill)
        await db.execute("alter table runs enable trigger user")
        await db.execute("analyze")
        await db.fetch(SYNC, daemon.id, False)  # moves what it reads from, and reads the catalogue anew
        assert await buffers_of(db, SYNC, daemon.id, False) < before + PAGES
