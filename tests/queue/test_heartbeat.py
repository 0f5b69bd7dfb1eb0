"""Beats against a real database: what a daemon believes of itself, and when others may take its runs."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from uuid import UUID, uuid4

import asyncpg
import pytest

from daemon.errors import DaemonFenced
from daemon.heartbeat import Heartbeat, silence
from daemon.listener import Listener
from daemon.queue import Queue
from tests.postgres import connect, wait_until
from tests.proxies import Proxy, proxied
from tests.runs import event_names, insert_run, register, run_row

Db = asyncpg.Connection

LEASE = 0.6
"""Seconds, where a test waits for real time to pass."""


class Beating:
    """A daemon that does nothing but live."""

    def __init__(self, queue: Queue, daemon: UUID, lease: float) -> None:
        self.queue = queue
        self.daemon = daemon
        self.lease = lease
        self.fenced: list[UUID] = []
        self.session_lock = False
        self.heartbeat = Heartbeat(
            queue,
            lease=timedelta(seconds=lease),
            daemon=lambda: self.daemon,
            state=lambda: (0, self.session_lock, False),
            fenced=self._rejoin,
        )

    async def _rejoin(self, former: UUID) -> None:
        self.fenced.append(former)
        self.daemon = await register(self.queue, lease=self.lease)


@asynccontextmanager
async def beating(dsn: str, *, lease: float = LEASE) -> AsyncIterator[Beating]:
    async with Queue(dsn) as queue:
        it = Beating(queue, await register(queue, lease=lease), lease)
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
    found = await db.fetchrow("select * from private.daemons where id = $1", daemon)
    assert found is not None
    return found


async def hold_a_run(db: Db, queue: Queue, daemon: UUID) -> str:
    run = await insert_run(db)
    turned = await queue.turn(daemon, slots=1, thorough=True)
    assert [claimed.id for claimed in turned.claimed] == [run]
    return run


async def silent(db: Db, daemon: UUID, seconds: float, *, session_lock: bool = False) -> None:
    """As if no beat of the daemon had come for so long."""
    await db.execute(
        """update private.daemons set session_lock = $3, started_at = started_at - interval '1 day',
        fresh_since = fresh_since - interval '1 day', seen_at = private.now() - $2::interval where id = $1""",
        daemon,
        timedelta(seconds=seconds),
        session_lock,
    )


async def beaten(db: Db, *daemons: UUID) -> None:
    """As if beats of the daemons, with their sessions' locks, had come for a day, the last one just now."""
    await db.execute(
        """update private.daemons
        set fresh_since = fresh_since - interval '1 day', seen_at = private.now(), session_lock = true
        where id = any ($1)""",
        daemons,
    )


async def taken_over(db: Db, judge: UUID, *, after: float) -> int:
    """How many runs the judge takes over if only its own beats have come for `after` seconds."""
    async with db.transaction():
        await db.execute("select set_config('image_jobs.clock_offset', $1, true)", f"{after} s")
        await db.execute("update private.daemons set seen_at = private.now() where id = $1", judge)
        taken: int = await db.fetchval("select private.take_over($1)", judge)
        return taken


async def test_a_beat_says_how_many_runs_are_in_flight_and_keeps_the_lease_fresh(database: str, db: Db) -> None:
    async with beating(database) as it:
        await asyncio.wait_for(it.heartbeat.wait_fresh(), 5)
        first = (await row(db, it.daemon))["seen_at"]

        async def seen_again() -> bool:
            return (await row(db, it.daemon))["seen_at"] > first + timedelta(seconds=2 * LEASE)

        await wait_until(seen_again)
        assert it.heartbeat.fresh
        assert it.fenced == []


async def test_the_lease_counts_from_before_the_beat_was_sent(database: str, db: Db) -> None:
    lock = "select from private.daemons where id = $1 for update"

    async def waiting() -> int:
        return await db.fetchval("select count(*) from pg_stat_activity where wait_event_type = 'Lock'")

    async with Queue(database) as queue, AsyncExitStack() as stack:
        it = Beating(queue, await register(queue, lease=2), 2)
        first, second = await connect(database), await connect(database)
        stack.push_async_callback(second.close)
        await stack.enter_async_context(second.transaction())
        async with first.transaction():
            await first.execute(lock, it.daemon)
            beats = asyncio.create_task(it.heartbeat.run())
            await wait_until(waiting)
            sent = time.monotonic()
            # In line behind the beat, so that there is only one.
            then = asyncio.create_task(second.execute(lock, it.daemon))

            async def both_wait() -> bool:
                return await waiting() == 2 and time.monotonic() > sent + 0.5

            await wait_until(both_wait)
            assert not it.heartbeat.fresh
        await first.close()
        await then
        await it.heartbeat.wait_fresh()
        beats.cancel()
        await asyncio.gather(beats, return_exceptions=True)
        await wait_until(lambda: not it.heartbeat.fresh)
        assert time.monotonic() < sent + 2.3


async def test_whoever_vouches_for_the_session_lock_is_believed_for_six_seconds_only(database: str) -> None:
    async with Queue(database) as queue:
        it = Beating(queue, await register(queue), 30)
        now = time.monotonic()
        it.heartbeat.renewed(now - 7)
        assert it.heartbeat.fresh
        it.heartbeat.renewed(now - 7, session_lock=True)
        assert not it.heartbeat.fresh
    assert [silence(lease) for lease in (3, 30, 60)] == [3, 6, 12]


@pytest.mark.parametrize("outage", ["swallowed", "refused"])
async def test_it_is_not_fresh_while_the_database_is_away_and_is_again_once_it_is_back(
    proxy: Proxy, db: Db, outage: str
) -> None:
    async with beating(proxy.dsn) as it:
        await it.heartbeat.wait_fresh()
        async with proxy.swallowing() if outage == "swallowed" else proxy.refusing():
            await wait_until(lambda: not it.heartbeat.fresh)
            waiting = asyncio.create_task(it.heartbeat.wait_fresh())
            await asyncio.sleep(0)
            assert not waiting.done()
        await asyncio.wait_for(waiting, 15)
        assert it.heartbeat.fresh
        assert it.fenced == []


async def test_a_beat_that_gets_no_answer_is_given_up_in_time_for_the_next(
    proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("daemon.queue.BEAT_TIMEOUT", 0.3)
    async with Queue(proxy.dsn) as queue:
        daemon = await register(queue)
        async with proxy.swallowing():
            started = time.monotonic()
            with pytest.raises(TimeoutError):
                await queue.heartbeat(daemon, in_flight=0, session_lock=False, draining=False)
            assert time.monotonic() - started < 2


async def test_throttled_runs_by_the_hundred_do_not_keep_the_heartbeat_waiting(database: str, db: Db) -> None:
    async with beating(database) as it:
        await it.heartbeat.wait_fresh()
        async with db.transaction():
            await db.execute("insert into provider_limits (provider) values ('demo')")
            blocks = [
                asyncio.create_task(it.queue.block("demo", None, timedelta(seconds=1), "429")) for _ in range(100)
            ]
            until = time.monotonic() + 2 * LEASE
            await wait_until(lambda: time.monotonic() > until)
            assert it.heartbeat.fresh
        await asyncio.gather(*blocks)


async def test_a_fenced_daemon_is_told_under_which_id_and_goes_on_under_a_new_one(database: str, db: Db) -> None:
    async with beating(database) as it:
        former = it.daemon
        await it.heartbeat.wait_fresh()
        await db.execute("update private.daemons set ended_at = now(), ended = 'taken over' where id = $1", former)
        await wait_until(lambda: it.daemon != former)
        assert it.fenced == [former]
        await asyncio.wait_for(it.heartbeat.wait_fresh(), 5)
        assert (await row(db, it.daemon))["ended_at"] is None


async def test_nobody_takes_over_before_its_own_lease_has_passed_unbroken(database: str, db: Db) -> None:
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


async def test_after_an_outage_the_lease_before_judging_begins_anew(proxy: Proxy, db: Db) -> None:
    async with beating(proxy.dsn) as judge:

        async def may_judge() -> bool:
            found = await row(db, judge.daemon)
            return found["seen_at"] - found["fresh_since"] > timedelta(seconds=LEASE)

        await wait_until(may_judge)
        async with proxy.refusing():
            await wait_until(lambda: not judge.heartbeat.fresh)
            back = await db.fetchval("select private.now()")
            async with Queue(proxy.direct) as queue:
                victim = await register(queue, lease=LEASE)
            await silent(db, victim, 3600)

        async def taken() -> bool:
            return (await row(db, victim))["ended"] == "taken over"

        await wait_until(taken)
        assert (await row(db, victim))["ended_at"] - back >= timedelta(seconds=LEASE)


async def test_after_an_outage_longer_than_the_lease_two_daemons_let_each_other_live(proxy: Proxy, db: Db) -> None:
    async with AsyncExitStack() as stack:
        both = [await stack.enter_async_context(beating(proxy.dsn)) for _ in range(2)]
        runs = [await hold_a_run(db, it.queue, it.daemon) for it in both]
        before = await db.fetch("select id, claim from runs order by id")

        async def may_judge() -> bool:
            return await db.fetchval("select bool_and(seen_at - fresh_since > lease) from private.daemons")

        await wait_until(may_judge)
        async with proxy.refusing():

            async def lapsed() -> bool:
                return await db.fetchval("select bool_and(private.now() - seen_at > 2 * lease) from private.daemons")

            await wait_until(lapsed)
            assert not any(it.heartbeat.fresh for it in both)
        await wait_until(may_judge)
        assert [it.fenced for it in both] == [[], []]
        assert await db.fetch("select id, claim from runs order by id") == before
        assert len(runs) == 2


class Session:
    """A daemon's LISTEN session."""

    def __init__(self, dsn: str, daemon: UUID) -> None:
        self.listener = Listener(
            dsn, daemon=lambda: daemon, wake=lambda: None, connected=lambda: None, drop=lambda _: None
        )
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


async def test_a_daemon_whose_session_has_ended_is_taken_over_after_six_seconds(database: str, db: Db) -> None:
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


async def test_a_daemon_whose_session_lives_keeps_its_runs_until_the_lease_ends(database: str, db: Db) -> None:
    async with Queue(database) as queue:
        victim, judge = await register(queue), await register(queue)
        await hold_a_run(db, queue, victim)
        async with session(database, judge), session(database, victim):
            await beaten(db, victim, judge)
            assert await taken_over(db, judge, after=29) == 0
            assert await taken_over(db, judge, after=31) == 1


async def test_a_restart_that_freed_every_lock_makes_nobody_dead_after_six_seconds(database: str, db: Db) -> None:
    async with Queue(database) as queue:
        victim, judge = await register(queue), await register(queue)
        await hold_a_run(db, queue, victim)
        await silent(db, victim, 7, session_lock=True)
        await beaten(db, judge)
        # The first one back: its session began after the last beat of the other.
        async with session(database, judge):
            assert await queue.take_over(judge) == 0


async def test_with_a_long_lease_one_beat_at_least_must_be_missed(database: str, db: Db) -> None:
    async with Queue(database) as queue:
        victim, judge = await register(queue, lease=60), await register(queue, lease=60)
        await hold_a_run(db, queue, victim)
        async with session(database, judge):
            await beaten(db, victim, judge)
            assert await taken_over(db, judge, after=11) == 0
            assert await taken_over(db, judge, after=13) == 1


async def test_a_daemon_that_was_never_registered_is_fenced(database: str) -> None:
    async with Queue(database) as queue:
        with pytest.raises(DaemonFenced):
            await queue.heartbeat(uuid4(), in_flight=0, session_lock=False, draining=False)
