"""The longest wait of clients while a migration adopts 300,000 runs and 1,000,000 events."""

import asyncio
import time

import pytest

from daemon.migrate import migrate
from tests.bench.report import table
from tests.bench.test_other_kinds import TABLES
from tests.support.postgres import Cluster, connect

RUNS, EVENTS = 300_000, 1_000_000

SEED = f"""
insert into runs (id, kind, subject_id, status, processor, payload, metadata)
select 'r' || n, case n % 2 when 0 then 'research' else 'image_gen' end, md5((n % 1000)::text)::uuid, 'completed', 'x:y',
  '{{"imageUrl": "https://example.supabase.co/x.png"}}', '{{"nodeId": "n", "promptSpec": {{"basePrompt": "a red fox"}}}}'
from generate_series(1, {RUNS}) n;
insert into run_events (run_id, kind, payload)
select 'r' || (n % {RUNS} + 1), 'log', '{{"message": "some words"}}' from generate_series(1, {EVENTS}) n;
"""
STATEMENTS = {
    "update a run": "update runs set payload = '{\"n\": 1}' where id = 'r2'",
    "insert a run": "insert into runs (id, kind, subject_id, status) values (gen_random_uuid(), 'research', gen_random_uuid(), 'x')",
    "insert an event": "insert into run_events (run_id, kind) values ('r4', 'note')",
    "read a run": "select from runs where id = 'r2'",
}


async def repeat(dsn: str, statement: str, waits: list[float]) -> None:
    """Execute a statement again and again, and note how long each took."""
    connection = await connect(dsn)
    try:
        while True:
            started = time.perf_counter()
            await connection.execute(statement)
            waits.append(time.perf_counter() - started)
            await asyncio.sleep(0.001)
    finally:
        connection.terminate()


@pytest.mark.timeout(300)
async def test_longest_wait_of_clients_beside_a_migration(durable: Cluster) -> None:
    waits: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    async with durable.database("supabase") as dsn:
        connection = await connect(dsn)
        await connection.execute(TABLES)
        await connection.execute(SEED)
        await connection.execute("vacuum analyze")
        await connection.close()
        clients = [asyncio.create_task(repeat(dsn, STATEMENTS[name], waits[name])) for name in STATEMENTS]
        started = time.perf_counter()
        await migrate(dsn)
        took = time.perf_counter() - started
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    rows = [(name, f"{len(found):,}", f"{1000 * max(found):.0f}") for name, found in waits.items()]
    table(f"Clients while a migration adopts large tables ({took:.1f} s)", ("", "statements", "longest, ms"), rows)
