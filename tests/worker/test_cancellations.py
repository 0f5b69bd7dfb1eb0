"""Cancellations at real providers' interfaces, from a real database: nobody waits for somebody who has nothing to do with it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import asyncpg
import pytest

from daemon.cancellations import AT_ONCE, Cancellations
from daemon.providers import create
from daemon.queue import Queue
from daemon.settings import Settings
from tests.fakes import midjourney_api, openai_api
from tests.fakes.midjourney_api import MidjourneyAPI
from tests.fakes.openai_responses import ResponsesAPI
from tests.postgres import connect, wait_until
from tests.runs import register

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
    """The database, and cancellations at work beside it."""
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
        working = asyncio.create_task(Cancellations(queue, providers).run())
        yield queue
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)


async def cancel(db: Db, provider: str, count: int) -> None:
    """So many runs of a provider, each with an order, that are to be cancelled there."""
    await db.execute(
        """with made as (
          insert into runs (kind, subject_id, status, processor, metadata)
          select 'image_gen', gen_random_uuid(), 'pending', $1 || ':x', '{"promptSpec": {"basePrompt": "a red fox"}}'
          from generate_series(1, $2) returning id
        )
        insert into private.cancellations (provider, provider_job_id, run_id, requested_at, due_at)
        select $1, 'order-' || row_number() over (), id, now(), now() from made""",
        provider,
        count,
    )


async def left(db: Db, provider: str) -> int:
    return await db.fetchval("select count(*) from private.cancellations where provider = $1", provider)


async def test_a_provider_that_does_not_answer_keeps_the_orders_of_no_other_waiting(
    db: Db, queue: Queue, openai: ResponsesAPI, midjourney: MidjourneyAPI
) -> None:
    for number in range(1, AT_ONCE + 1):
        openai.known(f"order-{number}")
        openai.hold()
    await cancel(db, "openai", AT_ONCE)
    await wait_until(lambda: len(openai.cancelled) == AT_ONCE, timeout=20)
    await cancel(db, "midjourney", 3 * AT_ONCE)

    async def done() -> bool:
        return await left(db, "midjourney") == 0

    await wait_until(done, timeout=20)
    assert len(midjourney.requests) == 3 * AT_ONCE
    assert await left(db, "openai") == AT_ONCE


async def test_a_provider_is_never_told_more_at_once_than_it_can_hear(
    db: Db, queue: Queue, openai: ResponsesAPI
) -> None:
    for number in range(1, 4 * AT_ONCE + 1):
        openai.known(f"order-{number}")
    go = [openai.hold() for _ in range(AT_ONCE)]
    await cancel(db, "openai", 4 * AT_ONCE)
    await wait_until(lambda: len(openai.cancelled) == AT_ONCE, timeout=20)
    for event in go:
        event.set()

    async def done() -> bool:
        return await left(db, "openai") == 0

    await wait_until(done, timeout=30)
    assert len(openai.cancelled) == len(set(openai.cancelled)) == 4 * AT_ONCE


async def test_runs_that_somebody_has_locked_do_not_keep_the_daemon_from_living(
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
