"""How long a client waits while 100,000 old runs are pruned, and while they are deleted by hand."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta

import asyncpg
import pytest

from daemon.cli.prune import prune_before
from daemon.queue.client import Queue
from tests.bench.report import percentile, table
from tests.support.postgres import connect
from tests.support.runs import completed, insert_runs, register

Db = asyncpg.Connection

MANY = 100_000
OLD = """
insert into runs (id, kind, subject_id, status, processor, metadata, payload, progress, priority, attempt, max_attempts, claim, ticket,
  created_at, updated_at, started_at, finished_at, lane)
select 'old_' || n, 'image_gen', md5((n % 1000)::text)::uuid, 'completed', 'demo:painter',
  '{"promptSpec": {"basePrompt": "a red fox"}}', '{"imageUrl": "https://example.supabase.co/x.png"}', 100, 0, 1, 3,
  nextval('image_jobs.claims'), nextval('image_jobs.tickets'), long_ago, long_ago, long_ago, long_ago, 'demo'
from generate_series(1, $1::integer) n, (select now() - interval '1 year' as long_ago) then_
"""
EVENTS = """
insert into run_events (id, run_id, kind, payload, seq)
select gen_random_uuid(), 'old_' || n, 'log', '{"event": "created"}', nextval('image_jobs.event_numbers')
from generate_series(1, $1::integer) n, generate_series(1, 5)
"""


async def client(db: Db, queue: Queue, waits: list[float]) -> None:
    """Insert a run, settle it, ask for one's own, again and again."""
    daemon = await register(queue, providers=("demo",))
    while True:
        started = time.perf_counter()
        await insert_runs(db, 1)
        waits.append(time.perf_counter() - started)
        started = time.perf_counter()
        result = await queue.sync(daemon, slots=10)
        waits.append(time.perf_counter() - started)
        done = [{"id": run.id, "claim": run.claim, **completed()} for run in result.claimed]
        started = time.perf_counter()
        await queue.sync(daemon, slots=0, settlements=done)
        waits.append(time.perf_counter() - started)
        started = time.perf_counter()
        await db.fetch(
            'select id from public.image_jobs j join runs r on r.id = j."jobId" where subject_id = $1 limit 20', daemon
        )
        waits.append(time.perf_counter() - started)


async def alone(_: Db) -> None:
    """Do nothing for a while."""
    await asyncio.sleep(10)


async def prune(db: Db) -> None:
    """Prune, as `image-jobs prune` does."""
    assert (await prune_before(db, timedelta(days=90))).runs == MANY


async def delete(db: Db) -> None:
    """Delete in one statement, as an operator may."""
    await db.execute("delete from runs where finished_at < now() - interval '90 days'")


@pytest.mark.timeout(600)
async def test_clients_wait_for_no_pruning(database: str) -> None:
    rows: list[tuple[str, ...]] = []
    ways: dict[str, Callable[[Db], Awaitable[None]]] = {"alone": alone, "prune": prune, "delete by hand": delete}
    sudo = await connect(database.replace("postgres@", "supabase_admin@"))
    db, other = await connect(database), await connect(database)
    async with Queue(database) as queue:
        for name, way in ways.items():
            await sudo.execute("set session_replication_role = replica")
            await sudo.execute("delete from runs")
            await sudo.execute("delete from run_events")
            await sudo.execute(OLD, MANY)
            await sudo.execute(EVENTS, MANY)
            await sudo.execute("vacuum analyze")
            waits: list[float] = []
            working = asyncio.create_task(client(db, queue, waits))
            started = time.perf_counter()
            await way(other)
            seconds = time.perf_counter() - started
            working.cancel()
            with suppress(asyncio.CancelledError):
                await working
            figures = (percentile(waits, 50), percentile(waits, 99), max(waits))
            rows.append((name, f"{seconds:.1f}", str(len(waits)), *(f"{1000 * each:.1f}" for each in figures)))
    for connection in (sudo, db, other):
        await connection.close()
    table(f"A client beside {MANY:,} old runs that go, ms", ("", "s", "statements", "p50", "p99", "max"), rows)
