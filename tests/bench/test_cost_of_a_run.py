"""The cost of a run to the database: one by one, as on an ordinary day, and in batches."""

import time
from contextlib import AsyncExitStack
from statistics import median
from uuid import uuid4

import asyncpg

from daemon.queue.client import Queue
from tests.bench.idle_provider import insert_with_nodes, settlement
from tests.bench.machine import describe, used
from tests.bench.report import remark, table
from tests.bench.systems import SYSTEMS, System
from tests.bench.workers import Measured, workers
from tests.support.postgres import Cluster
from tests.support.runs import register

Db = asyncpg.Connection

ROUNDS = 5
ONE_BY_ONE, PAUSE = 60, 0.05
SIZES = {1: 200, 10: 800, 100: 2000, 400: 2000}
"""Runs by the size of their batches."""


async def test_cost_of_a_run_one_by_one(durable: Cluster) -> None:
    found: dict[type[System], list[Measured]] = {system: [] for system in SYSTEMS}
    before = describe(durable)
    async with AsyncExitStack() as stack:
        running = {}
        for kind in SYSTEMS:
            system = await stack.enter_async_context(kind.open(durable))
            running[kind] = await stack.enter_async_context(workers(system, 1))
        for _ in range(ROUNDS):
            for kind, them in running.items():
                found[kind].append(await them.trickle(ONE_BY_ONE, PAUSE))
    remark(f"\n{before}")
    table(
        f"One run at a time, {1 / PAUSE:.0f} a second: the cost of each, without the INSERT's processor, with its WAL",
        ("", "backends, µs", "process, µs", "WAL, bytes"),
        [
            (
                kind.name,
                f"{median(1e6 * each.backends / each.count for each in measured):.0f}",
                f"{median(1e6 * each.workers / each.count for each in measured):.0f}",
                f"{median(each.wal / each.count for each in measured):.0f}",
            )
            for kind, measured in found.items()
        ],
    )


async def test_cost_of_a_run_by_batch_size(durable: Cluster, database: str, db: Db) -> None:
    found: dict[int, list[tuple[float, float, float]]] = {size: [] for size in SIZES}
    before = describe(durable)
    async with Queue(database) as queue:
        me = await register(queue, slots=max(SIZES))
        for _ in range(ROUNDS):
            for size, runs in SIZES.items():
                await insert_with_nodes(db, runs, uuid4().hex)
                await db.execute("analyze")
                begun, started = await used(db), time.perf_counter()
                synced = await queue.sync(me, slots=size)
                while synced.claimed:
                    settlements = [{**settlement(), "id": run.id, "claim": run.claim} for run in synced.claimed]
                    synced = await queue.sync(me, slots=size, settlements=settlements)
                seconds, it = time.perf_counter() - started, (await used(db)).since(begun)
                found[size].append((runs / seconds, 1e6 * it.backends / runs, it.wal / runs))
                assert await db.fetchval("select count(*) from runs where status <> 'completed'") == 0
    remark(f"\n{before}")
    table(
        "Runs over one connection, one sync after the other: claim, settlement, 4 events, 2 changes of a node",
        ("batch", "runs/s", "backend, µs", "WAL, bytes"),
        [
            (str(size), *(f"{median(each[part] for each in measured):.0f}" for part in range(3)))
            for size, measured in found.items()
        ],
    )
