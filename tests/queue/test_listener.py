"""The listener against a real database, over networks that fail."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from uuid import uuid4

import asyncpg
import pytest
import structlog

from daemon.queue.listener import DROP, WAKE, Listener
from daemon.queue.signals import Signals
from tests.support.postgres import connect, wait_until
from tests.support.proxies import Proxy, proxied
from tests.support.runs import insert_run
from tests.support.wiring import Wiring

Db = asyncpg.Connection


class Counting(Signals):
    """Signals that count."""

    def __init__(self) -> None:
        super().__init__()
        self.woken = 0
        self.connections = 0

    def wake(self) -> None:
        super().wake()
        self.woken += 1

    def connected(self) -> None:
        super().connected()
        self.connections += 1


class Listening:
    """A listener under way, with the notifications it received."""

    def __init__(self, dsn: str, ping: float) -> None:
        self.signals = Counting()
        self.identity = Wiring(signals=self.signals).identity
        self.dropped: set[int] = set()
        self.listener = Listener(
            dsn,
            self.identity,
            self.signals,
            drop=self.dropped.update,
            ping=timedelta(seconds=ping),
            reply_timeout=timedelta(seconds=1),
        )

    @property
    def woken(self) -> int:
        return self.signals.woken

    @property
    def connected(self) -> int:
        return self.signals.connections


@asynccontextmanager
async def listening(dsn: str, *, ping: float = 10) -> AsyncIterator[Listening]:
    it = Listening(dsn, ping)
    task = asyncio.create_task(it.listener.run())
    try:
        await wait_until(lambda: it.connected)
        yield it
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def proxy(database: str) -> AsyncIterator[Proxy]:
    async with proxied(database) as it:
        yield it


async def hears_again(db: Db, it: Listening) -> None:
    """Wait until notifications arrive."""
    await wait_until(lambda: it.listener.hears)
    before = it.woken
    await db.execute("select pg_notify($1, '')", WAKE)
    await wait_until(lambda: it.woken > before)


async def test_insert_wakes_and_lost_claims_are_dropped(database: str, db: Db) -> None:
    async with listening(database) as it:
        assert it.listener.hears
        before = it.woken
        await insert_run(db)
        await wait_until(lambda: it.woken > before)
        await db.execute("select pg_notify($1, '7,8')", DROP)
        await wait_until(lambda: it.dropped)
        assert it.dropped == {7, 8}
        assert it.connected == 1


async def test_session_locks_the_daemon_id_also_after_a_rejoin(database: str, db: Db) -> None:
    free = "select pg_try_advisory_lock(image_jobs.session_lock_key($1))"
    async with listening(database, ping=0.1) as it:
        await wait_until(lambda: it.listener.session_lock)
        assert not await db.fetchval(free, it.identity.id)
        it.identity.id = uuid4()
        assert not it.listener.session_lock
        await wait_until(lambda: it.listener.session_lock)
        assert not await db.fetchval(free, it.identity.id)

    async def freed() -> bool:
        return await db.fetchval(free, it.identity.id)

    await wait_until(freed)


async def test_lock_of_a_former_session_does_not_block_listening(database: str, db: Db) -> None:
    it = Listening(database, ping=0.1)
    ghost = await connect(database)
    await ghost.execute("select pg_advisory_lock(image_jobs.session_lock_key($1))", it.identity.id)
    task = asyncio.create_task(it.listener.run())
    await wait_until(lambda: it.connected)
    await hears_again(db, it)
    assert not it.listener.session_lock
    await ghost.close()
    await wait_until(lambda: it.listener.session_lock)
    assert it.connected == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_reconnects_when_the_connection_is_cut(proxy: Proxy, db: Db) -> None:
    async with listening(proxy.dsn) as it:
        for times in (2, 3):
            await proxy.cut()
            await wait_until(lambda times=times: it.connected == times)
            await hears_again(db, it)


async def test_reconnects_when_the_server_ends_its_session(database: str, db: Db) -> None:
    end = "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = 'image-jobs listener'"
    async with listening(database) as it:
        assert await db.fetchval(end) == 1
        await wait_until(lambda: it.connected == 2)
        await hears_again(db, it)


async def test_reconnects_after_an_outage_of_the_database(proxy: Proxy, db: Db) -> None:
    with structlog.testing.capture_logs() as logs:
        async with listening(proxy.dsn) as it:
            async with proxy.refusing():
                await wait_until(lambda: sum(line["event"] == "listener.disconnected" for line in logs) == 2)
                await asyncio.sleep(1)
                assert not it.listener.hears
                assert not it.listener.session_lock
            await wait_until(lambda: it.connected == 2)
            await hears_again(db, it)
    # A line where the trouble begins, one where it changes, one where it ends: not one for each try.
    told = [line for line in logs if line["event"] in {"listener.disconnected", "listener.reconnected"}]
    assert [line["log_level"] for line in told] == ["warning", "warning", "info"]
    assert "ConnectionRefusedError" in told[1]["error"]
    assert told[2]["failures"] > 2


async def test_failures_are_counted_anew_for_each_outage(proxy: Proxy) -> None:
    with structlog.testing.capture_logs() as logs:
        async with listening(proxy.dsn) as it:
            for times in (2, 3, 4):
                await proxy.cut()
                await wait_until(lambda times=times: it.connected == times)
    assert {line["failures"] for line in logs if line["event"] == "listener.disconnected"} == {1}


async def test_ping_notices_a_half_open_connection(proxy: Proxy, db: Db) -> None:
    async with listening(proxy.dsn, ping=0.1) as it:
        async with proxy.swallowing():
            await wait_until(lambda: not it.listener.hears)
            assert it.connected == 1
        await wait_until(lambda: it.connected == 2)
        await hears_again(db, it)


async def test_pooler_that_swallows_notifications_is_logged(proxy: Proxy) -> None:
    proxy.deaf = True
    with structlog.testing.capture_logs() as logs:
        async with listening(proxy.dsn) as it:
            assert not it.listener.hears
            assert not it.listener.session_lock
    (warning,) = (line for line in logs if line["event"] == "listener.deaf")
    assert "session pooler (port 5432)" in warning["cure"]
