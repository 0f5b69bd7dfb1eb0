"""Latency from the INSERT of a run to the start of its work, beside a bare INSERT with NOTIFY, and beside pgqueuer.

All of them live in this process, on one event loop, and are measured one after the other.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from statistics import median
from uuid import uuid4

import asyncpg
import pytest
from pgqueuer import PgQueuer
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.models import Job

from daemon.run import ClaimedRun
from tests.bench.idle_provider import IdleProvider, idle_provider
from tests.bench.machine import describe
from tests.bench.report import percentile, remark, table
from tests.bench.systems import Bare
from tests.support.postgres import Cluster, connect, wait_until
from tests.support.runs import insert_runs

ROUNDS = 5

BASELINE = """
create table baseline (id text primary key, content jsonb);
create function notify_baseline() returns trigger language plpgsql as
$$ begin perform pg_notify('baseline', new.id); return null; end $$;
create trigger notify_baseline after insert on baseline for each row execute function notify_baseline();
"""


@dataclass
class Subject:
    """One of those that are measured: how to insert, and when the work of each id has begun."""

    insert: Callable[[str], Awaitable[object]]
    arrived: dict[str, float] = field(default_factory=dict)

    def arrive(self, run: str) -> None:
        """Take the time at which the work of an id begins."""
        self.arrived[run] = time.perf_counter()

    async def measure(self, count: int, per_second: float) -> list[float]:
        """Insert at that pace, however long one takes; return the seconds from sending each INSERT to its work."""
        sent: dict[str, float] = {}
        started = time.perf_counter()
        for number in range(count):
            await asyncio.sleep(max(0.0, started + number / per_second - time.perf_counter()))
            run = f"run_{uuid4().hex}"
            sent[run] = time.perf_counter()
            await self.insert(run)
        await wait_until(lambda: sent.keys() <= self.arrived.keys(), timeout=60)
        return [self.arrived[run] - at for run, at in sent.items()]


@asynccontextmanager
async def daemon(cluster: Cluster, in_flight: int) -> AsyncIterator[Subject]:
    """The daemon without its provider."""
    async with cluster.database() as dsn, idle_provider(dsn, slots=200) as it:
        db = await connect(dsn)
        held: list[ClaimedRun] = []
        it.start = held.append
        if in_flight:
            await insert_runs(db, in_flight)
            await wait_until(lambda: len(held) == in_flight)
        reporting = asyncio.create_task(report_progress(it, held))

        async def insert(run: str) -> None:
            await db.execute(
                """insert into runs (id, kind, subject_id, status, processor, metadata) values
                ($1, 'image_gen', $2, 'pending', 'demo:painter', '{"promptSpec": {"basePrompt": "a red fox"}}')""",
                run,
                uuid4(),
            )

        subject = Subject(insert)

        def start(run: ClaimedRun) -> None:
            subject.arrive(run.id)
            it.settle(run)

        it.start = start
        yield subject
        reporting.cancel()
        await asyncio.gather(reporting, return_exceptions=True)
        await db.close()


async def report_progress(it: IdleProvider, held: list[ClaimedRun]) -> None:
    """Report progress of each run in flight once a second, one after the other."""
    done = 0
    while held:
        await asyncio.sleep(1 / len(held))
        done += 1
        it.outbox.record(held[done % len(held)], progress=min(99, done // len(held)), message="Drawing.")


@asynccontextmanager
async def pgqueuer(cluster: Cluster, in_flight: int) -> AsyncIterator[Subject]:
    """pgqueuer with a handler that does nothing, or waits."""
    async with Bare.open(cluster) as system:
        assert isinstance(system, Bare)
        connection = await asyncpg.connect(system.dsn)
        manager = PgQueuer(AsyncpgDriver(connection))
        subject = Subject(lambda run: system.enqueue([run]))
        end = asyncio.Event()

        @manager.entrypoint("work")
        async def work(job: Job) -> None:
            run = (job.payload or b"").decode()
            subject.arrive(run)
            if run.startswith("held"):
                await end.wait()

        running = asyncio.create_task(manager.qm.run())
        held = [f"held_{number}" for number in range(in_flight)] or ["first"]
        await system.enqueue(held)
        await wait_until(lambda: subject.arrived.keys() >= set(held))
        yield subject
        end.set()
        manager.qm.shutdown.set()
        await running
        await connection.close()


@asynccontextmanager
async def baseline(cluster: Cluster, _in_flight: int) -> AsyncIterator[Subject]:
    """The least latency that Postgres allows: a row is inserted, and its trigger notifies."""
    async with cluster.database("supabase") as dsn:
        db, listening = await connect(dsn), await connect(dsn)
        await db.execute(BASELINE)
        content = {"promptSpec": {"basePrompt": "a red fox"}}
        subject = Subject(lambda run: db.execute("insert into baseline values ($1, $2)", run, content))
        await listening.add_listener("baseline", lambda *args: subject.arrive(str(args[3])))
        yield subject
        await listening.close()
        await db.close()


@pytest.mark.parametrize(("in_flight", "per_second", "count"), [(0, 12, 25), (100, 12, 25), (100, 100, 200)])
async def test_latency_from_insert_to_start(durable: Cluster, in_flight: int, per_second: int, count: int) -> None:
    kinds = {"daemon": daemon, "INSERT and NOTIFY": baseline, "pgqueuer, bare": pgqueuer}
    found: dict[str, list[list[float]]] = {name: [] for name in kinds}
    before = describe(durable)
    async with AsyncExitStack() as stack:
        subjects = {name: await stack.enter_async_context(kind(durable, in_flight)) for name, kind in kinds.items()}
        for _ in range(ROUNDS):
            for name, subject in subjects.items():
                found[name].append(await subject.measure(count, per_second))
    remark(f"\n{before}")

    def typical(name: str, percent: float) -> float:
        return median(percentile(values, percent) for values in found[name])

    table(
        f"Milliseconds from INSERT to the start of the work, {in_flight} in flight, {per_second} inserts a second",
        ("", "p50", "p95", "p99", "p50 x INSERT and NOTIFY", "p50 x pgqueuer"),
        [
            (
                name,
                *(f"{1000 * typical(name, percent):.1f}" for percent in (50, 95, 99)),
                *(f"{typical(name, 50) / typical(other, 50):.2f}" for other in ("INSERT and NOTIFY", "pgqueuer, bare")),
            )
            for name in kinds
        ],
    )
