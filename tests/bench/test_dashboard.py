"""The dashboard and the alerts on a million runs, of which 20,000 lie in the last day, with 20,000 that wait."""

import time

import asyncpg
import pytest

from tests.bench.report import percentile, table
from tests.support.postgres import connect

Db = asyncpg.Connection

MANY, WAITING = 1_000_000, 20_000
RUNS = """
insert into runs (id, kind, subject_id, status, processor, metadata, payload, progress, priority, attempt, max_attempts, claim, ticket,
  created_at, updated_at, started_at, finished_at, lane)
select 'old_' || n, 'image_gen', md5((n % 1000)::text)::uuid, case when n % 20 = 0 then 'failed' else 'completed' end,
  (array['demo:painter', 'openai:gpt-image-1', 'openai:dall-e-3', 'google:imagen-4.0-generate-001'])[1 + n % 4],
  '{"promptSpec": {"basePrompt": "a red fox"}}', case when n % 20 = 0
    then jsonb_build_object('error', 'No.', 'hint', 'Ask again.', 'code', (array['content_policy', 'polling_timeout', 'timeout'])[1 + n % 3])
    else jsonb_build_object('imageUrl', 'https://example.supabase.co/x.png', 'timings', jsonb_build_object('generateMs', n % 9000)) end,
  100, 0, 1, 3, $1 - n, $1 - n, ended, ended, ended, ended, 'demo'
from generate_series(1, $1::integer) n
cross join lateral (select image_jobs.now() - n * interval '4.32 s' as ended) then_
"""
PENDING = """
insert into runs (id, kind, subject_id, status, processor, metadata, progress, priority, attempt, max_attempts, claim, ticket,
  created_at, updated_at, started_at, due_at, lane, rank, workflow_rank, queue_state)
select 'new_' || n, 'image_gen', md5((n % 1000)::text)::uuid, 'pending', 'openai:gpt-image-1',
  '{"promptSpec": {"basePrompt": "a red fox"}}', 0, 0, 0, 3, 2000000 + n, 2000000 + n, now(), now(), now(), now(), 'openai', n, n, 'pending'
from generate_series(1, $1::integer) n
"""
CALLS = """
insert into image_jobs.calls (id, run_id, provider, model, requested_model, estimate, cost, state, opened_at, closed_at, ticket, sent_at, image, image_at)
select $1 - n, 'old_' || n, split_part(r.processor, ':', 1), split_part(r.processor, ':', 2), split_part(r.processor, ':', 2),
  0.04, 0.04, 'charged', r.finished_at, r.finished_at, $1 - n, r.finished_at, true, r.finished_at
from generate_series(1, $1::integer) n join runs r on r.id = 'old_' || n
"""
EVENTS = """
insert into run_events (id, run_id, kind, payload, seq, run_kind, ts)
select gen_random_uuid(), r.id, case when r.status = 'failed' then 'error' else 'log' end, jsonb_build_object('event',
  case when r.status = 'failed' then 'incident' else 'completed' end), nextval('image_jobs.event_numbers'), 'image_gen', r.finished_at
from runs r, generate_series(1, 2)
"""


async def seed(dsn: str) -> None:
    """Fill the tables, without triggers."""
    sudo = await connect(dsn.replace("postgres@", "supabase_admin@"))
    await sudo.execute("set session_replication_role = replica")
    await sudo.execute(RUNS, MANY)
    await sudo.execute(CALLS, MANY)
    await sudo.execute(EVENTS)
    await sudo.execute(PENDING, WAITING)
    await sudo.execute("vacuum analyze")
    await sudo.close()


@pytest.mark.timeout(900)
async def test_a_million_runs_are_looked_at_in_time(database: str, db: Db) -> None:
    await seed(database)
    rows: list[tuple[str, ...]] = []
    for query, most in (
        ("select image_jobs.dashboard()", 200),
        ("select image_jobs.dashboard('1 day')", None),
        ("select * from image_jobs.alerts", 50),
    ):
        waits: list[float] = []
        for _ in range(20):
            started = time.perf_counter()
            await db.fetch(query)
            waits.append(1000 * (time.perf_counter() - started))
        rows.append((query, f"{percentile(waits, 50):.0f}", f"{percentile(waits, 95):.0f}", str(most or "")))
    table(f"{MANY:,} runs, {WAITING:,} waiting: ms", ("query", "p50", "p95", "at most"), rows)
