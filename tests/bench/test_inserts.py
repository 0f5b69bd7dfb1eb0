"""The INSERT of one run, beside bare ones: nothing on the table, a NOTIFY, and pgqueuer's."""

import time
from collections.abc import Awaitable, Callable
from statistics import median
from uuid import uuid4

from tests.bench.machine import describe
from tests.bench.report import percentile, remark, table
from tests.bench.systems import Handwritten
from tests.bench.test_latency import BASELINE
from tests.support.postgres import Cluster, connect

ROUNDS, SAMPLES = 5, 40
RUN = """insert into runs (id, kind, subject_id, status, processor, metadata) values
($1, 'image_gen', $2, 'pending', 'demo:painter', '{"nodeId": "fox", "promptSpec": {"basePrompt": "a red fox"}}')"""
BARE = "a bare table of the specification's columns"


async def test_insert_of_a_run_beside_a_bare_one(durable: Cluster) -> None:
    before = describe(durable)
    async with durable.database() as dsn, Handwritten.open(durable) as system:
        db = await connect(dsn)
        await system.db.execute(BASELINE)
        assert isinstance(system, Handwritten)

        async def enqueue() -> None:
            await system.enqueue([f"run_{uuid4().hex}"])

        kinds: dict[str, Callable[[], Awaitable[object]]] = {
            "runs": lambda: db.execute(RUN, f"run_{uuid4().hex}", uuid4()),
            BARE: lambda: system.db.execute(RUN, f"run_{uuid4().hex}", uuid4()),
            "a bare table with NOTIFY": lambda: system.db.execute(
                "insert into baseline values ($1, '{}')", f"run_{uuid4().hex}"
            ),
            "pgqueuer's enqueue": enqueue,
        }
        found: dict[str, list[list[float]]] = {name: [] for name in kinds}
        for _ in range(ROUNDS):
            for values in found.values():
                values.append([])
            for _ in range(SAMPLES):
                for name, insert in kinds.items():
                    started = time.perf_counter()
                    await insert()
                    found[name][-1].append(time.perf_counter() - started)
        await db.close()
    remark(f"\n{before}")
    typical = {name: median(percentile(values, 50) for values in rounds) for name, rounds in found.items()}
    table(
        "Milliseconds of one INSERT",
        ("", "p50", "p95", "x bare"),
        [
            (
                name,
                f"{1000 * typical[name]:.2f}",
                f"{1000 * median(percentile(values, 95) for values in rounds):.2f}",
                f"{typical[name] / typical[BARE]:.1f}",
            )
            for name, rounds in found.items()
        ],
    )
