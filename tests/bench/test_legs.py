"""The latency between the INSERT of a run and the call of its provider, leg by leg."""

import asyncio
import time
from uuid import uuid4

import asyncpg
import pytest

from tests.bench.legs import LEGS, timed_daemon
from tests.bench.report import percentile, table

Db = asyncpg.Connection

SAMPLES = 150


@pytest.mark.parametrize("per_second", [10, 100])
async def test_latency_leg_by_leg(database: str, db: Db, per_second: int) -> None:
    legs: list[list[float]] = []
    committed: list[float] = []
    async with timed_daemon(database) as times:
        for _ in range(SAMPLES):
            times.run = f"run_{uuid4().hex}"
            times.done.clear()
            sent = time.perf_counter()
            await db.execute(
                """insert into runs (id, kind, subject_id, status, processor, metadata)
                values ($1, 'image_gen', $2, 'pending', 'demo:painter', '{"promptSpec": {"basePrompt": "a red fox"}}')""",
                times.run,
                uuid4(),
            )
            committed.append(time.perf_counter() - sent)
            await times.done.wait()
            legs.append(times.legs(sent))
            await asyncio.sleep(max(0.0, sent + 1 / per_second - time.perf_counter()))
    columns = {
        "(INSERT returned to its client)": committed,
        **{name: [each[number] for each in legs] for number, name in enumerate(LEGS)},
        "all of them": [sum(each) for each in legs],
    }
    table(
        f"Milliseconds from INSERT to provider, leg by leg, {per_second} inserts a second",
        ("until", "p50", "p95"),
        [
            (name, *(f"{1000 * percentile(values, percent):.2f}" for percent in (50, 95)))
            for name, values in columns.items()
        ],
    )
