"""The cost of claiming ten runs, beside a hundred thousand other rows of every kind."""

import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from datetime import timedelta
from statistics import median

import asyncpg
import pytest

from daemon.queue.client import Queue
from tests.bench.full_tables import SECONDARY
from tests.bench.report import table
from tests.support.postgres import Cluster, connect
from tests.support.runs import insert_runs, register

Db = asyncpg.Connection

MANY = 100_000
ROUNDS = 30

# Rows as inserts and claims leave them, without the minutes that these would take.
ROWS = """
insert into runs (id, kind, subject_id, status, processor, metadata, progress, priority, due_at, attempt, max_attempts,
  claim, ticket, provider_job_id, created_at, updated_at, lane, rank, queue_state)
select 'old_' || n, 'image_gen', md5((n % 100)::text)::uuid, $1::text, $2::text,
  '{"promptSpec": {"basePrompt": "a red fox"}}', 0, 0, now() + $3::interval, 1, 3, nextval('image_jobs.claims'),
  nextval('image_jobs.tickets'), case when $1::text = 'running' then 'job' end, now(), now(),
  split_part($2::text, ':', 1), case when $1::text = 'pending' and $3::interval = interval '0' then n / 100 end, $1::text
from generate_series(1, $4::integer) n
"""
NOW = timedelta()


async def fill(sudo: Db, status: str, processor: str, due_in: timedelta) -> None:
    """Fill the table past its triggers, and make its indexes afterwards."""
    await sudo.execute("set session_replication_role = replica")
    indexes = await sudo.fetch(f"{SECONDARY} and i.indrelid = 'runs'::regclass")
    for index in indexes:
        await sudo.execute(f"drop index {index['name']}")
    await sudo.execute(ROWS, status, processor, due_in, MANY)
    for index in indexes:
        await sudo.execute(index["definition"])


async def empty(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Insert nothing."""


async def hold_back_vacuum(stack: AsyncExitStack, dsn: str) -> None:
    """Open a transaction that keeps vacuum from all that dies from now on."""
    old = await connect(dsn)
    stack.push_async_callback(old.close)
    await old.execute("begin isolation level repeatable read")
    await old.execute("select from runs limit 1")


async def end_runs(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Complete all runs; their index entries stay."""
    await hold_back_vacuum(stack, dsn)
    await sudo.execute(
        """update runs set status = 'completed', queue_state = null, rank = null, due_at = null, finished_at = now(),
        payload = '{"imageUrl": "https://example.supabase.co/x.png"}'"""
    )


async def dead_entries(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Insert runs that were claimed and have ended."""
    await fill(sudo, "pending", "demo:painter", NOW)
    await end_runs(sudo, stack, dsn)
    await sudo.execute(
        "insert into image_jobs.watermarks (lane, priority, watermark) values ('demo', 0, $1)", MANY // 100
    )


async def dead_delayed(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Insert runs that were put off, and have ended."""
    await fill(sudo, "pending", "demo:painter", -timedelta(hours=1))
    await end_runs(sudo, stack, dsn)


async def dead_parked(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Insert runs that were parked, and have ended."""
    await fill(sudo, "running", "demo:painter", -timedelta(hours=1))
    await end_runs(sudo, stack, dsn)


VERSIONS = {
    "watermarks (lane, priority, watermark)": "'demo', 0, 0",
    "recent_starts (limit_id, at, starts)": "(select max(id) from image_jobs.provider_limits), '{}', '{}'",
    "limits_in_force (provider, limits, models)": """'demo', (
        select jsonb_agg(to_jsonb(l)) from image_jobs.provider_limits l where l.provider = 'demo'), '{}'""",
    "provider_streaks (provider)": "'demo'",
    "due_marks (queue, due_at)": "'', now()",
}
"""Tables of which a row takes the place of the last; the newest stays."""
DEAD = {
    "wake (provider, awake_until)": "'demo', now() - n * interval '1 s'",
    "stale_nodes (node_id, due_at)": "n, now() - interval '1 hour'",
    "provider_blocks (provider, model, until)": "'demo', n, now() - interval '1 s'",
    "set_aside (run_id, until, sqlstate, reason)": "n, now() - interval '1 s', '42000', 'No.'",
    "daemons (id, name, version, slots, lease, providers, started_at, seen_at, fresh_since, ended_at, ended)": """
        gen_random_uuid(), 'old', '0', 1, '30 s', array['demo'], now(), now(), now(), now(), 'stopped'""",
}
"""Tables whose rows go."""


async def dead_state(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Leave dead entries in every other table that claims read, set by set, as writing them one by one would."""
    await sudo.execute("insert into image_jobs.provider_limits (provider, per_minute) values ('demo', $1)", 10 * MANY)
    await hold_back_vacuum(stack, dsn)
    await sudo.execute("set session_replication_role = replica")
    for columns, values in VERSIONS.items():
        name = columns.split()[0]
        await sudo.execute(
            f"""insert into image_jobs.{columns} select {values} from generate_series(1, {MANY}) n;
            delete from image_jobs.{name} where version < (select max(version) from image_jobs.{name})"""
        )
    for columns, values in DEAD.items():
        name = columns.split()[0]
        await sudo.execute(
            f"""create temp table before as select ctid as place from image_jobs.{name};
            insert into image_jobs.{columns} select {values} from generate_series(1, {MANY}) n;
            delete from image_jobs.{name} where ctid <> all (array(select place from before)); drop table before"""
        )


async def parked(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Insert parked runs."""
    await fill(sudo, "running", "demo:painter", timedelta(hours=1))


async def counted(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Insert parked runs that count towards a limit."""
    await parked(sudo, stack, dsn)
    await sudo.execute("insert into image_jobs.provider_limits (provider, max_running) values ('demo', $1)", 2 * MANY)


async def paused(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Insert due runs of a paused provider."""
    await fill(sudo, "pending", "openai:gpt-image-2", NOW)
    await sudo.execute("update image_jobs.provider_limits set paused = true where provider = 'openai'")


async def blocked(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Insert due runs of a blocked model, in front of the others in the same lane."""
    await fill(sudo, "pending", "demo:sculptor", NOW)
    await sudo.execute("select image_jobs.block_provider('demo', 'sculptor', '1 hour', 'Slow down.')")


async def delayed(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Insert runs that are not due yet."""
    await fill(sudo, "pending", "demo:painter", timedelta(days=1))


async def waiting(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Insert due runs in the same lane."""
    await fill(sudo, "pending", "demo:painter", NOW)


SCENES = {
    "an empty queue": empty,
    f"behind {MANY:,} dead entries": dead_entries,
    f"behind {MANY:,} dead that were put off": dead_delayed,
    f"behind {MANY:,} dead that were parked": dead_parked,
    f"behind {MANY:,} dead entries of every other table": dead_state,
    f"beside {MANY:,} parked": parked,
    f"beside {MANY:,} parked that a limit counts": counted,
    f"beside {MANY:,} of a paused provider": paused,
    f"behind {MANY:,} of a blocked model": blocked,
    f"beside {MANY:,} delayed": delayed,
    f"before {MANY:,} others": waiting,
}


async def claim(db: Db, daemon: object, *, full_scan: bool) -> float:
    """Claim ten runs and roll back. Returns the seconds."""
    transaction = db.transaction()
    await transaction.start()
    started = time.perf_counter()
    claimed = await db.fetch("select image_jobs.claim_runs($1, 10, $2)", daemon, full_scan)
    seconds = time.perf_counter() - started
    await transaction.rollback()
    assert len(claimed) == 10
    return seconds


@pytest.mark.timeout(500)
async def test_claim_cost_is_independent_of_other_rows(durable: Cluster) -> None:
    costs: Mapping[str, dict[bool, list[float]]] = {name: {False: [], True: []} for name in SCENES}
    async with AsyncExitStack() as stack:
        places: dict[str, tuple[Db, object]] = {}
        for name, scene in SCENES.items():
            dsn = await stack.enter_async_context(durable.database())
            sudo = await connect(dsn.replace("postgres@", "supabase_admin@"))
            await scene(sudo, stack, dsn)
            await sudo.execute("analyze")
            await sudo.close()
            db = await connect(dsn)
            stack.push_async_callback(db.close)
            await insert_runs(db, 11)
            queue = await stack.enter_async_context(Queue(dsn))
            daemon = await register(queue, providers=("demo", "openai"))
            # Moves what it reads from, past what is dead.
            await db.fetch("select image_jobs.claim_runs($1, 1, false)", daemon)
            places[name] = db, daemon
        for _ in range(ROUNDS):
            for name, (db, daemon) in places.items():
                for full_scan, found in costs[name].items():
                    found.append(await claim(db, daemon, full_scan=full_scan))
    least = {full_scan: median(found) for full_scan, found in costs["an empty queue"].items()}
    table(
        "Claiming 10 runs, milliseconds (full scan: whole lanes, after a second of idleness)",
        ("", "ms", "ratio", "full scan, ms", "ratio"),
        [
            (name, *(cell for how in (False, True) for cell in _cells(median(found[how]), least[how])))
            for name, found in costs.items()
        ],
    )


def _cells(seconds: float, least: float) -> tuple[str, str]:
    return f"{1000 * seconds:.1f}", f"{seconds / least:.1f} x"
