"""Tables that had no rows, or few, when they were analyzed: the planner takes what it then thinks is free, whatever is inserted since.

Rows that are read are counted, not seconds: they say the same on every machine.
"""

from collections.abc import Awaitable
from typing import Any

import asyncpg
import pytest

from tests.support.protocol import IMAGE, new_daemon
from tests.support.runs import WORKFLOW

Db = asyncpg.Connection

FEW, MANY = 100, 400
READ = "select sum(coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0))::bigint from pg_stat_xact_user_tables"
NODES = """
insert into workflow_nodes (id, workflow_id, node_type, node_data) select 'n' || n, $1, 'image', '{}' from generate_series(1, $2::integer) n
"""
# The first hundred go before the others, in each claim.
RUNS = """
insert into runs (kind, subject_id, status, processor, metadata, priority)
select 'image_gen', $1, 'pending', 'demo:painter',
  jsonb_build_object('nodeId', 'n' || n, 'promptSpec', jsonb_build_object('basePrompt', 'a red fox')), case when n > 100 then -1 else 0 end
from generate_series(1, $2::integer) n
"""
FAIL = {"outcome": "failed", "payload": {"error": "No.", "code": "refused"}}
COMPLETE = {"outcome": "completed", "payload": {"imageUrl": IMAGE}}
TABLES = ("runs", "run_events", "workflow_nodes", "image_jobs.calls", "image_jobs.stale_nodes")


async def rows_read(db: Db, runs: int) -> dict[str, float]:
    """Take so many runs through all that happens to runs, a hundred at a time. Returns the rows that each step reads for a run."""
    read: dict[str, float] = {}
    daemon = await new_daemon(db, "demo")

    async def step(name: str, count: int, work: Awaitable[Any]) -> Any:
        async with db.transaction():
            before = await db.fetchval(READ)
            done = await work
            read[name] = (await db.fetchval(READ) - before) / count
        return done

    async def claim(name: str) -> list[dict[str, Any]]:
        claimed = await step(name, FEW, daemon.claim(FEW, full_scan=False))
        assert len(claimed) == FEW
        return [{"id": run["id"], "claim": run["claim"], "events": []} for run in claimed]

    await step("insert nodes", runs, db.execute(NODES, WORKFLOW, runs))
    await step("insert", runs, db.execute(RUNS, WORKFLOW, runs))
    await step("refresh", runs, daemon.sync())
    claims = await claim("start")
    progress = [{**run, "progress": 5, "calls": [{"id": run["claim"], "sent_ago": 0.1}]} for run in claims]
    await step("record", FEW, daemon.sync(progress=progress))
    parked = [{**run, "outcome": "parked", "provider_job_id": run["id"], "due_in": 0} for run in claims]
    await step("park", FEW, daemon.sync(settlements=parked))
    claims = await claim("check")
    ended = [{**run, **(FAIL if number % 2 else COMPLETE)} for number, run in enumerate(claims)]
    await step("settle", FEW, daemon.sync(settlements=ended))
    ids = [run["id"] for run in claims]
    await step("requeue", FEW, db.execute("update runs set status = 'pending' where id = any ($1)", ids))
    await claim("start again")
    await step("release", FEW, daemon.sync(held=[]))
    await claim("start once more")
    await step("leave", FEW, db.execute("select image_jobs.leave($1)", daemon.id))
    await step("cancel", FEW, db.execute("update runs set status = 'cancelled' where id = any ($1)", ids))
    await step("delete", FEW, db.execute("delete from runs where id = any ($1)", ids))
    return read


async def analyze(db: Db, rows: int) -> None:
    """Analyze when so few rows are left in each table, and pages of what was there. Then delete those, too."""
    await empty(db)
    await db.execute(NODES, WORKFLOW, 5)
    await db.execute(RUNS, WORKFLOW, 5)
    await (await new_daemon(db, "demo")).claim(5)
    if rows == 0:
        await empty(db)
    await db.execute("analyze")
    found = await db.fetch(
        "select relname from pg_class where oid = any ($1::text[]::regclass[]) and relpages > 0 and reltuples = $2",
        TABLES,
        rows,
    )
    assert len(found) >= 3
    await empty(db)


async def empty(db: Db) -> None:
    for table in TABLES:
        await db.execute(f"delete from {table}")


@pytest.mark.parametrize("rows", [0, 5])
async def test_a_run_costs_the_same_in_a_grown_table(db: Db, rows: int) -> None:
    for table in TABLES:
        await db.execute(f"alter table {table} set (autovacuum_enabled = false)")
    await analyze(db, rows)
    few = await rows_read(db, FEW)
    await analyze(db, rows)
    many = await rows_read(db, MANY)
    assert {step: (few[step], read) for step, read in many.items() if read > 1.6 * few[step] + 1} == {}
