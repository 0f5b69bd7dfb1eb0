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
        f"""insert into image_jobs.provider_blocks (provider, model, until) select 'demo', n, now() from generate_series(1, {MANY}) n;
        delete from image_jobs.provider_blocks""",
    ),
    "streaks": (
        "",
        (),
        repeated(
            "perform image_jobs.write_streak(row('demo', (image_jobs.streak_of('demo')).version, null, 0, null, null, null, null))"
        ),
    ),
    "limits": (
        "alter table image_jobs.provider_limits disable trigger limits_changed",  # it tells clients
        (),
        f"""do $$ declare v_row tid := (select ctid from image_jobs.provider_limits where provider = 'demo'); begin
        for n in 1..{2 * MANY} loop
          update image_jobs.provider_limits set per_minute = 1000000 + n where ctid = v_row returning ctid into v_row;
        end loop; end $$""",
    ),
    "set aside": (
        "",
        (),
        f"""insert into image_jobs.set_aside (run_id, until, sqlstate, reason)
        select n, now(), '42000', 'No.' from generate_series(1, {4 * MANY}) n; delete from image_jobs.set_aside""",
    ),
    "stale nodes": (STALE, (), "delete from image_jobs.stale_nodes"),
    # Each of these walks past all that were before.
    "beats": (
        "",
        (),
        repeated("perform image_jobs.heartbeat((select id from image_jobs.daemons), 1, false, false)", 3000),
    ),
}

RARE = {"blocks", "streaks", "limits", "set aside"}


@pytest.fixture
async def old(database: str) -> AsyncIterator[Db]:
    """A connection that can hold an old snapshot."""
    connection = await connect(database)
    yield connection
    await connection.close()


@pytest.mark.parametrize("scene", [name for name in SCENES if name not in RARE])
async def test_dead_entries_cost_a_sync_nothing(db: Db, old: Db, scene: str) -> None:
    await assert_as_cheap_behind(scene, db, old)


@pytest.mark.one_postgres
@pytest.mark.parametrize("scene", sorted(RARE))
async def test_dead_entries_of_rare_things_cost_nothing(db: Db, old: Db, scene: str) -> None:
    await assert_as_cheap_behind(scene, db, old)


async def assert_as_cheap_behind(scene: str, db: Db, old: Db) -> None:
    """Count a sync's pages before and behind the dead entries of a scene."""
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
