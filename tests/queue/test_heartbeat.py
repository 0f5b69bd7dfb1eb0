"""Beats against a real database: the local lease, and when others may take the runs over."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from uuid import UUID, uuid4

import asyncpg
import pytest

from daemon.errors import DaemonFenced
from daemon.queue.client import Queue
from daemon.queue.heartbeat import Heartbeat, State
from daemon.queue.lease import silence
from daemon.queue.listener import Listener
from tests.support.postgres import connect, wait_until
from tests.support.proxies import Proxy, proxied
from tests.support.runs import event_names, insert_run, register, run_row
from tests.support.wiring import Wiring, wired

Db = asyncpg.Connection

LEASE = 0.6
"""Seconds, where a test waits for real time to pass."""


class Beating:
    """A heartbeat without a daemon around it."""

    def __init__(self, queue: Queue, wiring: Wiring) -> None:
        self.queue = queue
        self.wiring = wiring
        self.lease = wiring.lease
        self.session_lock = False
        self.heartbeat = Heartbeat(queue, wiring.identity, wiring.lease, lambda: State(0, self.session_lock, False))

    @property
    def daemon(self) -> UUID:
        return self.wiring.identity.id


@asynccontextmanager
async def beating(dsn: str, *, lease: float = LEASE) -> AsyncIterator[Beating]:
    async with Queue(dsn) as queue:
        it = Beating(queue, await wired(queue, lease=lease))
        task = asyncio.create_task(it.heartbeat.run())
        try:
            yield it
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


@pytest.fixture
async def proxy(database: str) -> AsyncIterator[Proxy]:
    async with proxied(database) as it:
        yield it


async def row(db: Db, daemon: UUID) -> asyncpg.Record:
    found = await db.fetchrow("select * from image_jobs.daemons where id = $1", daemon)
    assert found is not None
    return found


async def hold_a_run(db: Db, queue: Queue, daemon: UUID) -> str:
    run = await insert_run(db)
    synced = await queue.sync(daemon, slots=1, full_scan=True)
    assert [claimed.id for claimed in synced.claimed] == [run]
    return run


async def silent(db: Db, daemon: UUID, seconds: float, *, session_lock: bool = False) -> None:
    """Make the daemon silent for so many seconds."""
    await db.execute(
        """update image_jobs.daemons set session_lock = $3, started_at = started_at - interval '1 day',
        fresh_since = fresh_since - interval '1 day', seen_at = image_jobs.now() - $2::interval where id = $1""",
        daemon,
        timedelta(seconds=seconds),
        session_lock,
    )


async def beaten(db: Db, *daemons: UUID) -> None:
    """Make the daemons' beats, with their sessions' locks, have come for a day, the last one just now."""
    await db.execute(
        """update image_jobs.daemons
        set fresh_since = fresh_since - interval '1 day', seen_at = image_jobs.now(), session_lock = true
        where id = any ($1)""",
        daemons,
    )


async def taken_over(db: Db, judge: UUID, *, after: float) -> int:
    """Return how many runs the judge takes over if only its own beats have come for `after` seconds."""
    async with db.transaction():
        await db.execute("select set_config('image_jobs.clock_offset', $1, true)", f"{after} s")
        await db.execute("update image_jobs.daemons set seen_at = image_jobs.now() where id = $1", judge)
        taken: int = await db.fetchval("select image_jobs.take_over($1)", judge)
        return taken


async def test_beat_keeps_the_lease_fresh(database: str, db: Db) -> None:
    async with beating(database) as it:
        await asyncio.wait_for(it.lease.wait_fresh(), 5)
        first = (await row(db, it.daemon))["seen_at"]

        async def seen_again() -> bool:
            return (await row(db, it.daemon))["seen_at"] > first + timedelta(seconds=2 * LEASE)

        await wait_until(seen_again)
        assert it.lease.fresh
        assert it.wiring.registered == [it.daemon]


async def test_lease_counts_from_before_the_beat_was_sent(
    database: str, db: Db, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.queue.connections.BEAT_TIMEOUT", 60)
    lock = "select from image_jobs.daemons where id = $1 for update"

    async def waiting() -> int:
        return await db.fetchval("select count(*) from pg_stat_activity where wait_event_type = 'Lock'")

    async with Queue(database) as queue, AsyncExitStack() as stack:
        it = Beating(queue, await wired(queue, lease=LEASE))
        made = time.monotonic()
        first, second = await connect(database), await connect(database)
        stack.push_async_callback(second.close)
        async with second.transaction():
            async with first.transaction():
                await first.execute(lock, it.daemon)
                beats = asyncio.create_task(it.heartbeat.run())
                await wait_until(waiting)
                sent = time.monotonic()
                # In line behind the beat, and before the next one.
                then = asyncio.create_task(second.execute(lock, it.daemon))

                async def both_wait_for_a_lease() -> bool:
                    return await waiting() >= 2 and time.monotonic() > sent + LEASE

                await wait_until(both_wait_for_a_lease)
            await first.close()
            await then
            await wait_until(waiting)  # the next beat, so this one has arrived
            assert not it.lease.fresh
            silent = it.lease.silent
            assert time.monotonic() - silent > made
        await asyncio.wait_for(it.lease.wait_fresh(), 60)
        beats.cancel()
        await asyncio.gather(beats, return_exceptions=True)


async def test_beat_with_session_lock_is_believed_for_six_seconds(database: str) -> None:
    async with Queue(database) as queue:
        it = Beating(queue, await wired(queue))
        now = time.monotonic()
        it.lease.renew(now - 7)
        assert it.lease.fresh
        it.lease.renew(now - 7, session_lock=True)
        assert not it.lease.fresh
    assert [silence(lease) for lease in (3, 30, 60)] == [3, 6, 12]


@pytest.mark.parametrize("outage", ["swallowed", "refused"])
async def test_lease_lapses_in_an_outage_and_is_fresh_afterwards(proxy: Proxy, db: Db, outage: str) -> None:
    async with beating(proxy.dsn) as it:
        await it.lease.wait_fresh()
        async with proxy.swallowing() if outage == "swallowed" else proxy.refusing():
            await wait_until(lambda: not it.lease.fresh)
            waiting = asyncio.create_task(it.lease.wait_fresh())
            await asyncio.sleep(0)
            assert not waiting.done()
        await asyncio.wait_for(waiting, 15)
        assert it.lease.fresh
        assert it.wiring.registered == [it.daemon]


async def test_beat_without_a_reply_is_given_up_in_time(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daemon.queue.connections.BEAT_TIMEOUT", 0.3)
    async with Queue(proxy.dsn) as queue:
        daemon = await register(queue)
        async with proxy.swallowing():
            started = time.monotonic()
            with pytest.raises(TimeoutError):
                await queue.heartbeat(daemon, in_flight=0, session_lock=False, draining=False)
            assert time.monotonic() - started < 10


async def test_a_hundred_throttled_runs_do_not_delay_the_beat(database: str, db: Db) -> None:
    async with beating(database) as it:
        await it.lease.wait_fresh()
        async with db.transaction():
            await db.execute("insert into image_jobs.provider_limits (provider) values ('demo')")
            blocks = [
                asyncio.create_task(it.queue.block_provider("demo", None, timedelta(seconds=1), "429"))
                for _ in range(100)
            ]
            until = time.monotonic() + 2 * LEASE
            await wait_until(lambda: time.monotonic() > until)
            assert it.lease.fresh
        await asyncio.gather(*blocks)


async def test_fenced_daemon_goes_on_under_a_new_id(database: str, db: Db) -> None:
    async with beating(database) as it:
        former = it.daemon
        await it.lease.wait_fresh()
        await db.execute("update image_jobs.daemons set ended_at = now(), ended = 'taken over' where id = $1", former)
        await wait_until(lambda: it.daemon != former)
        assert it.wiring.registered == [former, it.daemon]
        await asyncio.wait_for(it.lease.wait_fresh(), 5)
        assert (await row(db, it.daemon))["ended_at"] is None


async def test_take_over_needs_an_unbroken_lease_of_the_judge(database: str, db: Db) -> None:
    async with Queue(database) as queue:
        victim = await register(queue, lease=LEASE)
        run = await hold_a_run(db, queue, victim)
        await silent(db, victim, 3600)
        async with beating(database) as judge:

            async def taken() -> bool:
                return (await row(db, victim))["ended"] == "taken over"

            await wait_until(taken)
            ended, judging = await row(db, victim), await row(db, judge.daemon)
            assert ended["ended_at"] - judging["started_at"] >= timedelta(seconds=LEASE)
    assert (await run_row(db, run))["status"] == "pending"
    assert "taken_over" in await event_names(db, run)


async def test_outage_restarts_the_lease_before_a_take_over(proxy: Proxy, db: Db) -> None:
    async with beating(proxy.dsn) as judge:

        async def may_judge() -> bool:
            found = await row(db, judge.daemon)
            return found["seen_at"] - found["fresh_since"] > timedelta(seconds=LEASE)

        await wait_until(may_judge)
        async with proxy.refusing():
            await wait_until(lambda: not judge.lease.fresh)
            back = await db.fetchval("select image_jobs.now()")
            async with Queue(proxy.direct) as queue:
                victim = await register(queue, lease=LEASE)
            await silent(db, victim, 3600)

        async def taken() -> bool:
            return (await row(db, victim))["ended"] == "taken over"

        await wait_until(taken)
        assert (await row(db, victim))["ended_at"] - back >= timedelta(seconds=LEASE)


async def test_two_daemons_survive_an_outage_beyond_the_lease(proxy: Proxy, db: Db) -> None:
    async with AsyncExitStack() as stack:
        both = [await stack.enter_async_context(beating(proxy.dsn)) for _ in range(2)]
        runs = [await hold_a_run(db, it.queue, it.daemon) for it in both]
        before = await db.fetch("select id, claim from runs order by id")

        async def may_judge() -> bool:
            return await db.fetchval("select bool_and(seen_at - fresh_since > lease) from image_jobs.daemons")

        await wait_until(may_judge)
        async with proxy.refusing():

            async def lapsed() -> bool:
                return await db.fetchval(
                    "select bool_and(image_jobs.now() - seen_at > 2 * lease) from image_jobs.daemons"
                )

            await wait_until(lapsed)
            assert not any(it.lease.fresh for it in both)
        await wait_until(may_judge)
        assert [it.wiring.registered for it in both] == [[it.daemon] for it in both]
        assert await db.fetch("select id, claim from runs order by id") == before
        assert len(runs) == 2


class Session:
    """A daemon's LISTEN session."""

    def __init__(self, dsn: str, daemon: UUID) -> None:
        wiring = Wiring()
        wiring.identity.id = daemon
        self.listener = Listener(dsn, wiring.identity, wiring.signals, drop=lambda _: None)
        self.task = asyncio.create_task(self.listener.run())

    async def end(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@asynccontextmanager
async def session(dsn: str, daemon: UUID) -> AsyncIterator[Session]:
    it = Session(dsn, daemon)
    try:
        await wait_until(lambda: it.listener.session_lock)
        yield it
    finally:
        await it.end()


async def test_ended_session_is_taken_over_after_six_seconds(database: str, db: Db) -> None:
    async with Queue(database) as queue:
        victim, judge = await register(queue), await register(queue)
        run = await hold_a_run(db, queue, victim)
        async with session(database, judge), session(database, victim) as life:
            await beaten(db, victim, judge)
            await life.end()
            assert await taken_over(db, judge, after=5) == 0
            # The server needs a moment to notice.
            await wait_until(lambda: taken_over(db, judge, after=7))
    assert (await row(db, victim))["ended"] == "taken over"
    assert (await run_row(db, run))["claimed_by"] is None


async def test_living_session_keeps_its_runs_until_the_lease_ends(database: str, db: Db) -> None:
    async with Queue(database) as queue:
        victim, judge = await register(queue), await register(queue)
        await hold_a_run(db, queue, victim)
        async with session(database, judge), session(database, victim):
            await beaten(db, victim, judge)
            assert await taken_over(db, judge, after=29) == 0
            assert await taken_over(db, judge, after=31) == 1


async def test_database_restart_does_not_make_daemons_dead(database: str, db: Db) -> None:
    async with Queue(database) as queue:
        victim, judge = await register(queue), await register(queue)
        await hold_a_run(db, queue, victim)
        await silent(db, victim, 7, session_lock=True)
        await beaten(db, judge)
        # The first one back: its session began after the last beat of the other.
        async with session(database, judge):
            assert await queue.take_over(judge) == 0


async def test_long_lease_needs_one_missed_beat_for_a_take_over(database: str, db: Db) -> None:
    async with Queue(database) as queue:
        victim, judge = await register(queue, lease=60), await register(queue, lease=60)
        await hold_a_run(db, queue, victim)
        async with session(database, judge):
            await beaten(db, victim, judge)
            assert await taken_over(db, judge, after=11) == 0
            assert await taken_over(db, judge, after=13) == 1


async def test_unregistered_daemon_is_fenced(database: str) -> None:
    async with Queue(database) as queue:
        with pytest.raises(DaemonFenced):
            await queue.heartbeat(uuid4(), in_flight=0, session_lock=False, draining=False)
