"""What claiming ten runs costs, whatever else is in the table."""

import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from datetime import timedelta
from statistics import median

import asyncpg

from daemon.queue import Queue
from tests.bench.report import table
from tests.postgres import Cluster, connect
from tests.runs import insert_runs, register

Db = asyncpg.Connection

MANY = 100_000
ROUNDS = 30

# Rows as they stand after inserts and claims, without the minutes that these would take.
ROWS = """
insert into runs (id, kind, subject_id, status, processor, metadata, progress, priority, due_at, attempt, max_attempts,
  claim, ticket, provider_job_id, created_at, updated_at, lane, rank)
select 'old_' || n, 'image_gen', md5((n % 100)::text)::uuid, $1::text, $2::text,
  '{"promptSpec": {"basePrompt": "a red fox"}}', 0, 0, now() + $3::interval, 1, 3, nextval('private.claims'),
  nextval('private.tickets'), case when $1::text = 'running' then 'order' end, now(), now(),
  split_part($2::text, ':', 1), case when $1::text = 'pending' and $3::interval = interval '0' then n / 100 end
from generate_series(1, $4::integer) n
"""
NOW = timedelta()


async def fill(sudo: Db, status: str, processor: str, due_in: timedelta) -> None:
    """Fills the table past its triggers."""
    await sudo.execute("set session_replication_role = replica")
    await sudo.execute(ROWS, status, processor, due_in, MANY)


async def nothing(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """An empty queue."""


async def dead(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Runs that were claimed and have ended; an old transaction keeps vacuum from their index entries."""
    await fill(sudo, "pending", "demo:painter", NOW)
    old = await connect(dsn)
    stack.push_async_callback(old.close)
    await old.execute("begin isolation level repeatable read")
    await old.execute("select from runs limit 1")
    await sudo.execute(
        """update runs set status = 'completed', rank = null, due_at = null, finished_at = now(),
        payload = '{"imageUrl": "https://example.supabase.co/x.png"}'"""
    )
    await sudo.execute("update private.lanes set floor = $1 where lane = 'demo'", MANY // 100)


async def parked(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Runs that wait for their provider."""
    await fill(sudo, "running", "demo:painter", timedelta(hours=1))


async def counted(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """The same, and they count towards a limit."""
    await parked(sudo, stack, dsn)
    await sudo.execute("insert into provider_limits (provider, max_running) values ('demo', $1)", 2 * MANY)


async def paused(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Due runs of a provider that may not start any."""
    await fill(sudo, "pending", "openai:gpt-image-2", NOW)
    await sudo.execute("update provider_limits set paused = true where provider = 'openai'")


async def delayed(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Runs that are not due yet."""
    await fill(sudo, "pending", "demo:painter", timedelta(days=1))


async def waiting(sudo: Db, stack: AsyncExitStack, dsn: str) -> None:
    """Due runs in the same lane."""
    await fill(sudo, "pending", "demo:painter", NOW)


SCENES = {
    "an empty queue": nothing,
    f"behind {MANY:,} dead entries": dead,
    f"beside {MANY:,} parked": parked,
    f"beside {MANY:,} parked that a limit counts": counted,
    f"beside {MANY:,} of a paused provider": paused,
    f"beside {MANY:,} delayed": delayed,
    f"before {MANY:,} others": waiting,
}


async def claim(db: Db, daemon: object, *, thorough: bool) -> float:
    """Seconds to claim ten runs; they are put back."""
    transaction = db.transaction()
    await transaction.start()
    started = time.perf_counter()
    claimed = await db.fetch("select private.claim_runs($1, 10, $2)", daemon, thorough)
    seconds = time.perf_counter() - started
    await transaction.rollback()
    assert len(claimed) == 10
    return seconds


async def test_claiming_costs_the_same_whatever_else_is_there(durable: Cluster) -> None:
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
            await insert_runs(db, 10)
            queue = await stack.enter_async_context(Queue(dsn))
            places[name] = db, await register(queue, providers=("demo", "openai"))
        for _ in range(ROUNDS):
            for name, (db, daemon) in places.items():
                for thorough, found in costs[name].items():
                    found.append(await claim(db, daemon, thorough=thorough))
    least = {thorough: median(found) for thorough, found in costs["an empty queue"].items()}
    table(
        "Claiming 10 runs, milliseconds (thorough: the look at whole lanes, once a second of idleness)",
        ("", "ms", "ratio", "thorough, ms", "ratio"),
        [
            (name, *(cell for how in (False, True) for cell in _cells(median(found[how]), least[how])))
            for name, found in costs.items()
        ],
    )


def _cells(seconds: float, least: float) -> tuple[str, str]:
    return f"{1000 * seconds:.1f}", f"{seconds / least:.1f} x"
