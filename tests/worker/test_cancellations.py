"""Cancellations at real providers' interfaces, from a real database: one slow provider or row delays no other."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import asyncpg
import pytest

from daemon.providers import create
from daemon.providers.openai.models import MAINLINE
from daemon.queue.client import Queue
from daemon.queue.signals import Signals
from daemon.settings import Settings
from daemon.worker.cancellations import AT_ONCE, Cancellations
from tests.fakes import midjourney_api, openai_api
from tests.fakes.midjourney_api import MidjourneyAPI
from tests.fakes.openai_responses import COST, IMAGE_USAGE, USAGE, ResponsesAPI
from tests.support.postgres import connect, wait_until
from tests.support.protocol import new_daemon
from tests.support.runs import insert_run, register

Db = asyncpg.Connection


@pytest.fixture
async def openai() -> AsyncIterator[ResponsesAPI]:
    async with ResponsesAPI() as api:
        yield api


@pytest.fixture
async def midjourney() -> AsyncIterator[MidjourneyAPI]:
    async with MidjourneyAPI() as api:
        yield api


@pytest.fixture
async def queue(database: str, openai: ResponsesAPI, midjourney: MidjourneyAPI) -> AsyncIterator[Queue]:
    """Open the database, with cancellations at work beside it."""
    settings = Settings(
        _env_file=None,
        OPENAI_API_KEY=openai_api.KEY,
        OPENAI_BASE_URL=openai.base_url,
        MIDJOURNEY_API_URL=midjourney.url,
        MIDJOURNEY_API_KEY=midjourney_api.KEY,
    )
    async with AsyncExitStack() as stack:
        queue = await stack.enter_async_context(Queue(database))
        providers = {}
        for name in ("openai", "midjourney"):
            provider = providers[name] = create(name, settings)
            assert provider is not None
            stack.push_async_callback(provider.aclose)
        working = asyncio.create_task(Cancellations(queue, Signals(), providers).run())
        yield queue
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def cancel(db: Db, provider: str, count: int) -> None:
    """Insert `count` runs of a provider, each with a job to cancel there."""
    await db.execute(
        """with made as (
          insert into runs (kind, subject_id, status, processor, metadata)
          select 'image_gen', gen_random_uuid(), 'pending', $1 || ':x', '{"promptSpec": {"basePrompt": "a red fox"}}'
          from generate_series(1, $2) returning id
        )
        insert into image_jobs.cancellations (provider, provider_job_id, run_id, requested_at, due_at)
        select $1, 'job-' || row_number() over (), id, now(), now() from made""",
        provider,
        count,
    )


async def left(db: Db, provider: str) -> int:
    return await db.fetchval("select count(*) from image_jobs.cancellations where provider = $1", provider)


async def test_silent_provider_delays_no_other_cancellations(
    db: Db, queue: Queue, openai: ResponsesAPI, midjourney: MidjourneyAPI
) -> None:
    for number in range(1, AT_ONCE + 1):
        openai.known(f"job-{number}")
        openai.hold()
    await cancel(db, "openai", AT_ONCE)
    await wait_until(lambda: len(openai.cancelled) == AT_ONCE, timeout=20)
    await cancel(db, "midjourney", 3 * AT_ONCE)

    async def done() -> bool:
        return await left(db, "midjourney") == 0

    await wait_until(done, timeout=20)
    assert len(midjourney.requests) == 3 * AT_ONCE
    assert await left(db, "openai") == AT_ONCE


async def test_cancellations_of_a_provider_are_bounded(db: Db, queue: Queue, openai: ResponsesAPI) -> None:
    for number in range(1, 4 * AT_ONCE + 1):
        openai.known(f"job-{number}")
    go = [openai.hold() for _ in range(AT_ONCE)]
    await cancel(db, "openai", 4 * AT_ONCE)
    await wait_until(lambda: len(openai.cancelled) == AT_ONCE, timeout=20)
    for event in go:
        event.set()

    async def done() -> bool:
        return await left(db, "openai") == 0

    await wait_until(done, timeout=30)
    assert len(openai.cancelled) == len(set(openai.cancelled)) == 4 * AT_ONCE


async def test_locked_runs_do_not_delay_the_heartbeat(
    database: str, db: Db, queue: Queue, midjourney: MidjourneyAPI
) -> None:
    daemon = await register(queue)
    await cancel(db, "midjourney", AT_ONCE)
    locker = await connect(database)
    async with locker.transaction():
        await locker.execute("select from runs for update")
        await wait_until(lambda: len(midjourney.requests) == AT_ONCE, timeout=20)
        for _ in range(5):
            await queue.heartbeat(daemon, in_flight=0, session_lock=False, draining=False)
    await locker.close()

    async def done() -> bool:
        return await left(db, "midjourney") == 0

    await wait_until(done, timeout=20)


@pytest.mark.parametrize("drawn", [False, True], ids=["nothing drawn", "drawn"])
async def test_cancelled_response_says_what_its_call_cost(
    db: Db, queue: Queue, openai: ResponsesAPI, drawn: bool
) -> None:
    tools = [{"type": "image_generation", "model": "gpt-image-2.5-flare"}]
    counted = {"usage": USAGE, "tool_usage": {"image_gen": IMAGE_USAGE}} if drawn else {}
    openai.known("job-1", model=MAINLINE, status="in_progress", tools=tools, **counted)
    run = await insert_run(db, processor="openai:gpt-image-2.5-flare")
    daemon = await new_daemon(db, "openai")
    await daemon.park(await daemon.claim_one(), "job-1")
    await db.execute("update runs set status = 'cancelled' where id = $1", run)

    async def closed() -> asyncpg.Record | None:
        return await db.fetchrow("select state, cost::float8 from image_jobs.calls where state <> 'open'")

    assert tuple(await wait_until(closed, timeout=20)) == (
        ("charged", pytest.approx(COST)) if drawn else ("free", None)
    )
