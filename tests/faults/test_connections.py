"""How many connections a daemon has, what each is for, and that none is waited for without end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import timedelta
from uuid import UUID

import asyncpg
import pytest

from daemon.queue.client import Queue
from daemon.queue.connections import Connections
from daemon.queue.heartbeat import Heartbeat, State
from daemon.queue.identity import Identity
from daemon.queue.lease import Lease
from daemon.queue.listener import Listener
from daemon.queue.signals import Signals
from daemon.run import ProviderJob
from tests.support.fault_harness import FaultHarness
from tests.support.pooler import Pooler, pooled
from tests.support.postgres import connect, wait_until
from tests.support.runs import register
from tests.support.wiring import wired

CONNECTIONS = 5
"""That a daemon holds at most; the README says so."""


@pytest.fixture
async def pooler(database: str) -> AsyncIterator[Pooler]:
    async with pooled(database) as it:
        yield it


async def unregistered(daemon: UUID) -> None:
    """A daemon of these tests has no row."""


async def test_a_network_dark_after_connect_is_given_up(database: str, pooler: Pooler) -> None:
    signals = Signals()
    listener = Listener(
        pooler.dsn,
        Identity(unregistered, Lease(timedelta(seconds=30)), signals),
        signals,
        drop=lambda claims: None,
        reply_timeout=timedelta(seconds=0.5),
    )
    pooler.silent = True
    task = asyncio.create_task(listener.run())
    try:
        await wait_until(lambda: pooler.sessions >= 2, timeout=20)
        pooler.silent = False
        await wait_until(lambda: listener.hears, timeout=20)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_calls_on_locked_rows_do_not_stop_heartbeats(
    database: str, db: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    jobs = [ProviderJob("demo", f"job-{number}", None) for number in range(10)]
    for job in jobs:
        await db.execute(
            "insert into image_jobs.webhook_deliveries (provider, delivery_id, provider_job_id, type, received_at)"
            " values ('demo', $1, $1, 'done', now())",
            job.id,
        )
    async with Queue(database) as queue:
        wiring = await wired(queue, lease=2)
        beats: list[bool] = []
        heartbeat = Heartbeat(queue, wiring.identity, wiring.lease, lambda: State(0, False, False))
        beating = asyncio.create_task(heartbeat.run())
        await wait_until(lambda: wiring.lease.fresh)
        locker = await connect(database)
        async with locker.transaction():
            await locker.execute("select from image_jobs.webhook_deliveries for update")
            calls = [asyncio.create_task(queue.attach_provider_job(job, None, None)) for job in jobs]
            for _ in range(40):
                await asyncio.sleep(0.1)
                beats.append(wiring.lease.fresh)
            for each in calls:
                each.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        await locker.close()
        beating.cancel()
        await asyncio.gather(beating, return_exceptions=True)
    assert all(beats)


async def test_slow_calls_do_not_keep_a_daemon_from_registering(
    database: str, db: "asyncpg.Connection[asyncpg.Record]"
) -> None:
    await db.execute(
        "insert into image_jobs.webhook_deliveries (provider, delivery_id, provider_job_id, type, received_at)"
        " values ('demo', '1', '1', 'done', now())"
    )
    locker = await connect(database)
    async with Queue(database) as queue:
        async with locker.transaction():
            await locker.execute("select from image_jobs.webhook_deliveries for update")
            job = ProviderJob("demo", "1", None)
            calls = [asyncio.create_task(queue.attach_provider_job(job, None, None)) for _ in range(3)]

            async def two_wait() -> bool:
                query = "select count(*) from pg_stat_activity where wait_event_type = 'Lock'"
                return await db.fetchval(query) >= 2

            await wait_until(two_wait)
            async with asyncio.timeout(10):  # a call beside would be given up after 20
                await register(queue)
        await asyncio.gather(*calls)
    await locker.close()


async def test_calls_beside_leave_nothing_in_their_session(database: str) -> None:
    setting = (
        "select pg_backend_pid(), current_setting('request.jwt.claims', true), current_setting('application_name')"
    )
    async with Connections(database, 20) as connections:
        async with connections.beside() as connection:
            pid = connection.get_server_pid()
            await connection.execute("select set_config('request.jwt.claims', '{}', false)")
        async with connections.beside() as connection:
            assert tuple(await connection.fetchrow(setting)) == (pid, "", "image-jobs")


@pytest.mark.timeout(90)
async def test_a_daemon_holds_at_most_five_connections(harness: FaultHarness) -> None:
    most = 0
    counting = await connect(harness.project.dsn)

    async def count() -> None:
        nonlocal most
        while True:
            held = await counting.fetchval(
                "select count(*) from pg_stat_activity where datname = current_database()"
                " and application_name like 'image-jobs%'"
            )
            most = max(most, held)
            await asyncio.sleep(0.01)

    task = asyncio.create_task(count())
    async with harness.run_daemon(IMAGE_JOBS_CONCURRENCY="32") as it:
        await it.started()
        demos = [{"throttle": 1, "times": 1}, {"noop": True}, {"submit": 0.5}, {"slow": 1}]
        for demo in demos:
            await harness.insert_runs(30, "demo:painter", prompt={"size": "64x64"}, demo=demo)

        # Rows that somebody has locked meanwhile, so that calls wait.
        async with AsyncExitStack() as stack:
            locker = await connect(harness.project.dsn)
            stack.push_async_callback(locker.close)
            async with locker.transaction():
                await locker.execute("select from runs where random() < 0.3 for update")
                await locker.execute("select from image_jobs.limits_in_force for update")
                await asyncio.sleep(3)
        await harness.assert_all_end_once(timeout=60)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await counting.close()
    assert 2 <= most <= CONNECTIONS
