"""Every SQLSTATE there is, at connect and at any statement: the loops of a daemon live, and work goes on afterwards."""

import asyncio
import os
from collections.abc import AsyncIterator
from datetime import timedelta

import asyncpg
import pytest
from asyncpg.exceptions._base import PostgresMessageMeta
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.queue.client import Queue
from daemon.queue.dispatcher import Dispatcher
from daemon.queue.heartbeat import Heartbeat, State
from daemon.queue.listener import Listener
from daemon.run import ClaimedRun
from tests.support.pooler import Pooler, Refusal, pooled
from tests.support.postgres import wait_until
from tests.support.runs import insert_run
from tests.support.wiring import Wiring, completed, wired

OURS = "IJ001"
"""Others took this daemon for dead: it registers anew, which is another test's business."""
KNOWN = sorted(PostgresMessageMeta._message_map.keys() - {OURS})
"""All that asyncpg has a class for."""
SQLSTATES = st.sampled_from(KNOWN) | st.from_regex(r"\A[0-9A-Z]{5}\Z").filter(lambda code: code != OURS)
EXAMPLES = int(os.environ.get("IMAGE_JOBS_TEST_EXAMPLES", "20"))
"""By hand a few hundred."""
STATEMENTS = (
    "image_jobs.sync",
    "image_jobs.heartbeat",
    "image_jobs.take_over",
    "LISTEN",
    "pg_try_advisory",
    "select 1",
)


class Loops:
    """The loops of a daemon that talk with the database, and nothing else."""

    def __init__(self, dsn: str, queue: Queue, wiring: Wiring) -> None:
        self.claimed: list[ClaimedRun] = []
        self.wiring = wiring
        identity, signals = wiring.identity, wiring.signals
        self.listener = Listener(
            dsn,
            identity,
            signals,
            drop=lambda claims: None,
            ping=timedelta(seconds=0.2),
            reply_timeout=timedelta(seconds=1),
        )
        loops = (
            Dispatcher(
                queue,
                identity,
                signals,
                wiring.outbox,
                unreachable=wiring.unreachable,
                slots=4,
                start=self.claimed.append,
                drop=lambda claims: None,
            ),
            self.listener,
            Heartbeat(queue, identity, wiring.lease, lambda: State(0, self.listener.session_lock, False)),
        )
        self.tasks = [asyncio.create_task(each.run(), name=type(each).__name__) for each in loops]

    def assert_alive(self) -> None:
        for task in self.tasks:
            assert not task.done(), f"{task.get_name()} ended: {task.exception()!r}"


@pytest.fixture
async def pooler(database: str) -> AsyncIterator[Pooler]:
    async with pooled(database) as it:
        yield it


@pytest.fixture
async def loops(pooler: Pooler) -> AsyncIterator[Loops]:
    async with Queue(pooler.dsn) as queue:
        it = Loops(pooler.dsn, queue, await wired(queue, lease=6))
        try:
            await wait_until(lambda: it.listener.hears)
            yield it
        finally:
            for task in it.tasks:
                task.cancel()
            await asyncio.gather(*it.tasks, return_exceptions=True)


async def assert_working(loops: Loops, db: "asyncpg.Connection[asyncpg.Record]") -> None:
    """A new run is claimed and settled, notifications arrive, and the lease is fresh."""
    run = await insert_run(db)

    def claimed() -> list[ClaimedRun]:
        loops.assert_alive()
        return [each for each in loops.claimed if each.id == run]

    def back() -> bool:
        loops.assert_alive()
        return loops.listener.hears and loops.wiring.lease.fresh

    for each in await wait_until(claimed, timeout=20):
        assert (await loops.wiring.outbox.settle(each, completed())).result == "settled"
    await wait_until(back, timeout=20)


async def wait_for_refusals(loops: Loops, pooler: Pooler, count: int) -> None:
    def refused() -> bool:
        loops.assert_alive()
        return len(pooler.refused) >= count

    await wait_until(refused, timeout=20)


@pytest.mark.timeout(120)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(codes=st.lists(SQLSTATES, min_size=1, max_size=5))
async def test_loops_survive_any_sqlstate_at_connect(
    loops: Loops, pooler: Pooler, db: "asyncpg.Connection[asyncpg.Record]", codes: list[str]
) -> None:
    refusals = iter([Refusal(code) for code in codes])
    pooler.refused.clear()
    pooler.refuse_session = lambda: next(refusals, None)
    await pooler.cut()
    loops.wiring.signals.wake()
    await wait_for_refusals(loops, pooler, len(codes))
    await assert_working(loops, db)


@pytest.mark.timeout(120)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    where=st.sampled_from(STATEMENTS),
    refusals=st.lists(
        st.builds(Refusal, SQLSTATES, severity=st.sampled_from(["ERROR", "FATAL"])), min_size=1, max_size=3
    ),
)
async def test_loops_survive_any_sqlstate_at_a_statement(
    loops: Loops, pooler: Pooler, db: "asyncpg.Connection[asyncpg.Record]", where: str, refusals: list[Refusal]
) -> None:
    pooler.refused.clear()
    if where in ("LISTEN", "pg_try_advisory"):
        await pooler.cut()
    with pooler.refusing_statements(where, *refusals):
        loops.wiring.signals.wake()
        await wait_for_refusals(loops, pooler, len(refusals))
        await assert_working(loops, db)
