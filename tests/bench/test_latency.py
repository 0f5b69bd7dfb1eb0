"""Latency from the insert of a run to the start of its work, beside a baseline: a bare INSERT with NOTIFY."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import uuid4

import asyncpg
import pytest

from daemon.run import ClaimedRun
from tests.bench.idle_provider import IdleProvider, idle_provider
from tests.bench.report import percentile, table
from tests.support.postgres import connect, wait_until
from tests.support.runs import insert_run, insert_runs

Db = asyncpg.Connection

SAMPLES = 120

BASELINE = """
create table baseline (id bigint generated always as identity primary key, content jsonb);
create function notify_baseline() returns trigger language plpgsql as $$ begin notify baseline; return null; end $$;
create trigger notify_baseline after insert on baseline for each statement execute function notify_baseline();
"""


class Latency:
    """Measures from an insert to the start of the run."""

    def __init__(self, it: IdleProvider, db: Db) -> None:
        self._it = it
        self._db = db
        self._arrived = asyncio.Event()
        self._id = ""
        self._at = 0.0
        it.start = self._on_start

    def _on_start(self, run: ClaimedRun) -> None:
        if run.id == self._id:
            self._at = time.perf_counter()
            self._it.settle(run)
            self._arrived.set()

    async def of_a_run(self) -> float:
        """Seconds from sending an insert of one run to the start of its work."""
        self._id = f"run_{uuid4().hex}"
        self._arrived.clear()
        sent = time.perf_counter()
        await self._db.execute(
            """insert into runs (id, kind, subject_id, status, processor, metadata)
            values ($1, 'image_gen', $2, 'pending', 'demo:painter', '{"promptSpec": {"basePrompt": "a red fox"}}')""",
            self._id,
            uuid4(),
        )
        await self._arrived.wait()
        return self._at - sent


@asynccontextmanager
async def open_baseline(dsn: str, db: Db) -> AsyncIterator["Baseline"]:
    """The least latency that Postgres allows."""
    await db.execute(BASELINE)
    listening = await connect(dsn)
    it = Baseline(db)
    await listening.add_listener("baseline", lambda *_: it.on_notify())
    yield it
    await listening.close()


class Baseline:
    """Measures from an insert into a table of one column to its notification."""

    def __init__(self, db: Db) -> None:
        self._db = db
        self._arrived = asyncio.Event()
        self._at = 0.0

    def on_notify(self) -> None:
        """Take the time of the notification."""
        self._at = time.perf_counter()
        self._arrived.set()

    async def of_a_row(self) -> float:
        """Seconds from sending an insert to the notification."""
        self._arrived.clear()
        sent = time.perf_counter()
        await self._db.execute(
            "insert into baseline (content) values ($1)", {"promptSpec": {"basePrompt": "a red fox"}}
        )
        await self._arrived.wait()
        return self._at - sent


async def report_progress(it: IdleProvider, held: list[ClaimedRun]) -> None:
    """Report progress of each run in flight once a second, one after the other."""
    done = 0
    while True:
        await asyncio.sleep(1 / len(held))
        done += 1
        it.outbox.record(held[done % len(held)], progress=min(99, done // len(held)), message="Drawing.")


@pytest.mark.parametrize(("in_flight", "per_second"), [(0, 12), (100, 12), (0, 100)])
async def test_latency_from_insert_to_provider(database: str, db: Db, in_flight: int, per_second: int) -> None:
    async with idle_provider(database, slots=200) as it, open_baseline(database, db) as baseline:
        held: list[ClaimedRun] = []
        it.start = held.append
        background = None
        if in_flight:
            await insert_runs(db, in_flight)
            await wait_until(lambda: len(held) == in_flight)
            background = asyncio.create_task(report_progress(it, held))
        latency = Latency(it, db)
        ours: list[float] = []
        bare: list[float] = []
        for _ in range(SAMPLES):
            started = time.perf_counter()
            ours.append(await latency.of_a_run())
            bare.append(await baseline.of_a_row())
            await asyncio.sleep(max(0.0, started + 1 / per_second - time.perf_counter()))
        if background is not None:
            background.cancel()
            await asyncio.gather(background, return_exceptions=True)
    table(
        f"Milliseconds from INSERT to provider, {in_flight} runs in flight, {per_second} inserts a second",
        ("", "p50", "p95", "p99"),
        [
            (name, *(f"{1000 * percentile(values, percent):.1f}" for percent in (50, 95, 99)))
            for name, values in (("daemon", ours), ("baseline: INSERT and NOTIFY", bare))
        ]
        + [("ratio", *(f"{percentile(ours, p) / percentile(bare, p):.1f} x" for p in (50, 95, 99)))],
    )


async def test_insert_beside_a_bare_insert(database: str, db: Db) -> None:
    await db.execute(BASELINE)
    ours: list[float] = []
    bare: list[float] = []
    for _ in range(SAMPLES):
        started = time.perf_counter()
        await insert_run(db)
        inserted = time.perf_counter()
        await db.execute("insert into baseline (content) values ($1)", {"promptSpec": {"basePrompt": "a red fox"}})
        ours.append(inserted - started)
        bare.append(time.perf_counter() - inserted)
    table(
        "Milliseconds of one INSERT of a run",
        ("", "p50", "p95"),
        [
            (name, *(f"{1000 * percentile(values, percent):.1f}" for percent in (50, 95)))
            for name, values in (("runs", ours), ("baseline: a bare table with NOTIFY", bare))
        ],
    )
