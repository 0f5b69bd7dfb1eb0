"""Every SQLSTATE there is, at connect and at any statement: the loops of a daemon live, and work goes on afterwards."""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Mapping
from datetime import timedelta
from itertools import pairwise

import asyncpg
import pytest
import structlog
from asyncpg.exceptions._base import PostgresMessageMeta
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daemon.providers import Provider, create
from daemon.queue.client import Queue
from daemon.queue.dispatcher import Dispatcher
from daemon.queue.heartbeat import Heartbeat, State
from daemon.queue.listener import Listener
from daemon.retention import Retention
from daemon.run import ClaimedRun
from daemon.settings import Settings
from daemon.storage.client import Storage
from daemon.worker.cancellations import Cancellations
from daemon.worker.orphans import Orphans
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
IN_THE_BACKGROUND = (
    "image_jobs.sweep_webhooks",
    "image_jobs.sweep_calls",
    "image_jobs.unmatched_deliveries",
    "image_jobs.take_cancellations",
    "image_jobs.walk",
    "image_jobs.take_file_removals",
    "image_jobs.take_source_removals",
)
REFUSALS = st.lists(st.builds(Refusal, SQLSTATES, severity=st.sampled_from(["ERROR", "FATAL"])), min_size=1, max_size=3)


class Loops:
    """The loops of a daemon that talk with the database, and nothing else."""

    def __init__(
        self, dsn: str, queue: Queue, wiring: Wiring, providers: Mapping[str, Provider], storage: Storage
    ) -> None:
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
            Orphans(queue, signals, providers),
            Cancellations(queue, signals, providers),
            Retention(queue, signals, storage, ["images"], keep=timedelta(days=7)),
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
    # Nothing is asked of provider and storage: there are no jobs, and no files.
    openai = create("openai", Settings(_env_file=None, OPENAI_API_KEY="key"))
    assert openai is not None
    async with Queue(pooler.dsn) as queue, Storage("http://127.0.0.1:1", "key", bucket="images") as storage:
        it = Loops(pooler.dsn, queue, await wired(queue, lease=6), {"openai": openai}, storage)
        try:
            await wait_until(lambda: it.listener.hears)
            yield it
        finally:
            for task in it.tasks:
                task.cancel()
            await asyncio.gather(*it.tasks, return_exceptions=True)
            await openai.aclose()


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


@pytest.mark.timeout(240)
@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    where=st.sampled_from(STATEMENTS),
    refusals=REFUSALS,
    behind=st.sampled_from(IN_THE_BACKGROUND),
    others=REFUSALS,
)
async def test_loops_survive_any_sqlstate_at_a_statement(
    loops: Loops,
    pooler: Pooler,
    db: "asyncpg.Connection[asyncpg.Record]",
    *,
    where: str,
    refusals: list[Refusal],
    behind: str,
    others: list[Refusal],
) -> None:
    if where in ("LISTEN", "pg_try_advisory"):
        await pooler.cut()
    with pooler.refusing_statements(where, *refusals) as passed, pooler.refusing_statements(behind, *others) as swept:

        def both_passed() -> bool:
            loops.assert_alive()
            return passed.is_set() and swept.is_set()

        loops.wiring.signals.connected()
        await wait_until(both_passed, timeout=20)
        await assert_working(loops, db)


BACKGROUND = (
    ("image_jobs.sweep_webhooks", "orphans.not_swept", "orphans.swept_again"),
    ("image_jobs.take_cancellations", "cancellations.not_taken", "cancellations.taken_again"),
    ("image_jobs.walk", "retention.not_done", "retention.resumed"),
    ("image_jobs.take_file_removals", "file_removals.not_taken", "file_removals.taken_again"),
    ("image_jobs.take_source_removals", "source_removals.not_taken", "source_removals.taken_again"),
)
"""Statements that nobody waits for, and how a loop that is refused them says so, and that it is over."""


async def test_background_loops_log_an_outage_once(loops: Loops, pooler: Pooler) -> None:
    """Four refusals each: one line, and pauses of at least 0.1, 0.2 and 0.4 s between them."""
    refused: dict[str, list[float]] = {statement: [] for statement, _, _ in BACKGROUND}

    def refuse(sql: str) -> Refusal | None:
        times = next((times for statement, times in refused.items() if statement in sql), None)
        if times is None or len(times) == 4:
            return None
        times.append(time.monotonic())
        return Refusal("42501", severity="ERROR")

    def over() -> bool:
        loops.assert_alive()
        return {log["event"] for log in logs} >= {back for _, _, back in BACKGROUND}

    with structlog.testing.capture_logs() as logs:
        pooler.refuse_statement = refuse
        loops.wiring.signals.connected()
        await wait_until(over, timeout=40)
    for statement, event, _ in BACKGROUND:
        assert [log["error"] for log in logs if log["event"] == event] == [
            "InsufficientPrivilegeError (42501): refused by the pooler of these tests"
        ]
        pauses = [after - before for before, after in pairwise(refused[statement])]
        assert all(pause >= least for pause, least in zip(pauses, (0.1, 0.2, 0.4), strict=True)), pauses
