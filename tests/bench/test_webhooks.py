"""Latency of a webhook that is verified and kept, beside two baselines: an RPC that does nothing, and one that inserts."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from itertools import count

import asyncpg
import pytest

from tests.bench.report import percentile, table
from tests.support.postgres import connect, signed_in
from tests.support.webhooks import SECRET, signed

Db = asyncpg.Connection

SAMPLES = 400
FEW, MANY = 1_000, 100_000
FLOOD = 4
"""Connections that send refused calls one after the other."""

BASELINES = """
create table public.kept (id bigint generated always as identity primary key, body text);
create function public.nothing(json) returns jsonb language sql volatile
as $$ select jsonb_build_object('received', true) $$;
create function public.insert(json) returns jsonb language sql volatile security definer
as $$ insert into public.kept (body) values ($1::text) returning jsonb_build_object('received', true) $$;
"""
RUNS = """
insert into runs (id, kind, subject_id, status, processor, metadata, progress, priority, due_at, attempt, max_attempts,
  claim, ticket, provider_job_id, created_at, updated_at, lane, queue_state)
select 'old_' || n, 'image_gen', md5((n % 100)::text)::uuid, 'running', 'openai:gpt-image-2',
  '{"promptSpec": {"basePrompt": "a red fox"}}', 0, 0, now() + interval '1 hour', 1, 3, nextval('image_jobs.claims'),
  nextval('image_jobs.tickets'), 'job_' || n, now(), now(), 'openai', 'running'
from generate_series(1, $1) n
"""
DELIVERIES = """
insert into image_jobs.webhook_deliveries (provider, delivery_id, provider_job_id, type, body, received_at)
select 'openai', 'old_' || n, 'unknown_' || n, 'response.completed', $2, now() from generate_series(1, $1) n
"""
numbers = count(1)


def body(size: int = 0) -> str:
    """A padded delivery for one of the runs that exist in every scene."""
    job = f"job_{next(numbers) % FEW}"
    return json.dumps({"type": "response.completed", "data": {"id": job}, "text": "word " * (size // 5)})


async def call(db: Db, function: str, text: str, headers: Mapping[str, str]) -> float:
    """Call a function as PostgREST does. Returns the seconds in the database."""
    started = time.perf_counter()
    async with signed_in(db, role="anon"):
        await db.execute("select set_config('request.headers', $1, true)", json.dumps(dict(headers)))
        await db.fetchval(f"select {function}($1::text::json)", text)
        status = await db.fetchval("select current_setting('response.status', true)")
    seconds = time.perf_counter() - started
    assert not status or function == "webhook_openai"
    return seconds


async def fill(dsn: str, many: int) -> None:
    """Insert so many parked runs and kept deliveries, past the triggers."""
    sudo = await connect(dsn.replace("postgres@", "supabase_admin@"))
    await sudo.execute("set session_replication_role = replica")
    await sudo.execute(RUNS, many)
    await sudo.execute(DELIVERIES, many, body())
    await sudo.execute("analyze")
    await sudo.close()


@asynccontextmanager
async def flood(dsn: str) -> AsyncIterator[list[float]]:
    """Send refused calls without pause. Yields the seconds that each took."""
    durations: list[float] = []
    text = body()
    wrong = signed(text) | {"webhook-signature": "v1,AAAA"}

    async def send() -> None:
        db = await connect(dsn)
        try:
            while True:
                durations.append(await call(db, "webhook_openai", text, wrong))
        finally:
            db.terminate()

    tasks = [asyncio.create_task(send()) for _ in range(FLOOD)]
    yield durations
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize(
    ("many", "size", "flooded"), [(FEW, 0, False), (FEW, 65_536, False), (MANY, 0, False), (MANY, 0, True)]
)
async def test_delivery_is_verified_and_kept(database: str, db: Db, many: int, size: int, flooded: bool) -> None:
    await db.execute(BASELINES)
    await db.execute("select image_jobs.set_webhook_secrets($1)", {"openai": [SECRET]})
    durations: dict[str, list[float]] = {"nothing": [], "insert": [], "webhook_openai": []}
    async with AsyncExitStack() as stack:
        await fill(database, many)
        refused = await stack.enter_async_context(flood(database)) if flooded else []
        for number in range(SAMPLES):
            text = body(size)
            headers = signed(text, message=f"msg_{number}")
            for function, seconds in durations.items():
                seconds.append(await call(db, function, text, headers))
    counted = await db.fetchrow("select sum(accepted), sum(duplicates), sum(refused) from image_jobs.webhook_counters")
    assert counted is not None
    assert (counted[0], counted[1]) == (SAMPLES, 0)
    rows = [
        ("baseline: an RPC that does nothing", durations["nothing"]),
        ("baseline: an RPC that inserts a row", durations["insert"]),
        ("webhook_openai", durations["webhook_openai"]),
    ]
    if refused:
        rows.append((f"a refused one, {FLOOD} at once", refused))
    ratios = [
        (
            f"ratio to {name}",
            *(f"{percentile(durations['webhook_openai'], p) / percentile(least, p):.1f} x" for p in (50, 99)),
        )
        for name, least in (("nothing", durations["nothing"]), ("an insert", durations["insert"]))
    ]
    table(
        f"Milliseconds of a webhook of {size or 100:,} bytes for one of {many:,} runs"
        + (", while others are refused" if flooded else ""),
        ("", "p50", "p99"),
        [(name, *(f"{1000 * percentile(seconds, p):.1f}" for p in (50, 99))) for name, seconds in rows] + ratios,
    )
