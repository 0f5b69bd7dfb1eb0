"""The listener against a real database, over networks that fail."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from uuid import uuid4

import asyncpg
import pytest
import structlog

from daemon.listener import DROP, WAKE, Listener
from tests.postgres import connect, wait_until
from tests.proxies import Proxy, proxied
from tests.runs import insert_run

Db = asyncpg.Connection


class Listening:
    """A listener under way, and what it heard."""

    def __init__(self, dsn: str, ping: float) -> None:
        self.daemon = uuid4()
        self.woken = 0
        self.connected = 0
        self.dropped: set[int] = set()
        self.listener = Listener(
            dsn,
            daemon=lambda: self.daemon,
            wake=self._on_wake,
            connected=self._on_connected,
            drop=self.dropped.update,
            ping=timedelta(seconds=ping),
            answer_timeout=timedelta(seconds=1),
        )

    def _on_wake(self) -> None:
        self.woken += 1

    def _on_connected(self) -> None:
        self.connected += 1


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
    """What is said now arrives."""
    await wait_until(lambda: it.listener.hears)
    before = it.woken
    await db.execute("select pg_notify($1, '')", WAKE)
    await wait_until(lambda: it.woken > before)


async def test_an_insert_wakes_it_and_a_claim_that_is_gone_is_dropped(database: str, db: Db) -> None:
    async with listening(database) as it:
        assert it.listener.hears
        await insert_run(db)
        await wait_until(lambda: it.woken)
        await db.execute("select pg_notify($1, '7,8')", DROP)
        await wait_until(lambda: it.dropped)
        assert it.dropped == {7, 8}
        assert it.connected == 1


async def test_its_session_holds_the_lock_of_the_daemon_also_after_the_daemon_got_a_new_id(
    database: str, db: Db
) -> None:
    free = "select pg_try_advisory_lock(private.session_lock_key($1))"
    async with listening(database, ping=0.1) as it:
        await wait_until(lambda: it.listener.session_lock)
        assert not await db.fetchval(free, it.daemon)
        it.daemon = uuid4()
        assert not it.listener.session_lock
        await wait_until(lambda: it.listener.session_lock)
        assert not await db.fetchval(free, it.daemon)

    async def freed() -> bool:
        return await db.fetchval(free, it.daemon)

    await wait_until(freed)


async def test_a_session_before_it_that_still_holds_the_lock_does_not_keep_it_from_listening(
    database: str, db: Db
) -> None:
    it = Listening(database, ping=0.1)
    ghost = await connect(database)
    await ghost.execute("select pg_advisory_lock(private.session_lock_key($1))", it.daemon)
    task = asyncio.create_task(it.listener.run())
    await wait_until(lambda: it.connected)
    await hears_again(db, it)
    assert not it.listener.session_lock
    await ghost.close()
    await wait_until(lambda: it.listener.session_lock)
    assert it.connected == 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_it_comes_back_when_the_connection_is_cut(proxy: Proxy, db: Db) -> None:
    async with listening(proxy.dsn) as it:
        for times in (2, 3):
            await proxy.cut()
            await wait_until(lambda times=times: it.connected == times)
            await hears_again(db, it)


async def test_it_comes_back_when_the_server_ends_its_session(database: str, db: Db) -> None:
    end = "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = 'image-jobs listener'"
    async with listening(database) as it:
        assert await db.fetchval(end) == 1
        await wait_until(lambda: it.connected == 2)
        await hears_again(db, it)


async def test_it_comes_back_when_the_database_was_away_for_a_while(proxy: Proxy, db: Db) -> None:
    with structlog.testing.capture_logs() as logs:
        async with listening(proxy.dsn) as it:
            async with proxy.refusing():
                await wait_until(lambda: sum(line["event"] == "listener.disconnected" for line in logs) >= 3)
                assert not it.listener.hears
                assert not it.listener.session_lock
            await wait_until(lambda: it.connected == 2)
            await hears_again(db, it)


async def test_each_outage_is_the_first_one_again(proxy: Proxy) -> None:
    with structlog.testing.capture_logs() as logs:
        async with listening(proxy.dsn) as it:
            for times in (2, 3, 4):
                await proxy.cut()
                await wait_until(lambda times=times: it.connected == times)
    assert {line["failures"] for line in logs if line["event"] == "listener.disconnected"} == {1}


async def test_a_connection_on_which_nothing_arrives_any_more_is_noticed_by_its_ping(proxy: Proxy, db: Db) -> None:
    async with listening(proxy.dsn, ping=0.1) as it:
        async with proxy.swallowing():
            await wait_until(lambda: not it.listener.hears)
            assert it.connected == 1
        await wait_until(lambda: it.connected == 2)
        await hears_again(db, it)


async def test_a_pooler_that_swallows_notifications_is_found_out_and_the_cure_is_logged(proxy: Proxy) -> None:
    proxy.deaf = True
    with structlog.testing.capture_logs() as logs:
        async with listening(proxy.dsn) as it:
            assert not it.listener.hears
            assert not it.listener.session_lock
    (warning,) = (line for line in logs if line["event"] == "listener.deaf")
    assert "session pooler (port 5432)" in warning["cure"]
