"""Plans: the cost of a write must not depend on how many rows the table has, nor on when it was last analysed."""

from typing import Any

import asyncpg
import pytest

from daemon.queue.client import Queue
from tests.sql.test_limits import buffers_of
from tests.support.postgres import Cluster, connect, signed_in
from tests.support.runs import WORKFLOW, completed, insert_run, insert_runs, register

pytestmark = pytest.mark.every_postgres

Db = asyncpg.Connection

READ = """
select coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) from pg_stat_xact_user_tables where relname = 'runs'
"""
FEW = 5


async def rows_read(
    db: Db, daemon: object, *, slots: int = 0, settlements: list[dict[str, Any]], progress: list[dict[str, Any]]
) -> int:
    """Count the rows of `runs` that one sync reads."""
    async with db.transaction():
        before = await db.fetchval(READ)
        rows = await db.fetch(
            "select part from image_jobs.sync($1, $2, false, $3, $4, null, null)", daemon, slots, settlements, progress
        )
        assert len(rows) == FEW
        return (await db.fetchval(READ)) - before


async def test_a_sync_reads_only_the_rows_that_it_writes(database: str, db: Db) -> None:
    await insert_runs(db, 1500)
    async with Queue(database) as queue:
        daemon = await register(queue, slots=FEW)
        claimed = (await queue.sync(daemon, slots=FEW, full_scan=True)).claimed
    await db.execute("analyze runs")
    entries = [{"id": run.id, "claim": run.claim} for run in claimed]
    progress: list[dict[str, Any]] = [{**entry, "progress": 5, "events": []} for entry in entries]
    assert await rows_read(db, daemon, settlements=[], progress=progress) < 20 * FEW
    settlements = [{**completed(), **entry} for entry in entries]
    assert await rows_read(db, daemon, settlements=settlements, progress=[]) < 20 * FEW
    assert await rows_read(db, daemon, slots=FEW, settlements=[], progress=[]) < 20 * FEW


async def test_rerouting_reads_a_bounded_number_of_runs(db: Db) -> None:
    await insert_runs(db, 1500, processor="openai:gpt-image-2")
    await db.execute("update image_jobs.provider_limits set paused = true where provider in ('openai', 'google')")

    async def read() -> int:
        async with db.transaction():
            before = await db.fetchval(READ)
            await db.execute("select image_jobs.reroute_runs()")
            return (await db.fetchval(READ)) - before

    assert await read() == 0
    await insert_runs(db, 1500, processor="openai:gpt-image-2", fallback=["google:gemini-3-pro-image"])
    await db.execute("analyze runs")
    assert await read() < 210


async def test_stale_nodes_are_locked_once(db: Db) -> None:
    """The plan is made while there is none, and a vacuum has seen that."""
    refresh = "select image_jobs.refresh_stale_nodes()"
    await db.execute("vacuum analyze image_jobs.stale_nodes")
    for _ in range(6):
        await db.execute(refresh)
    await db.execute("insert into image_jobs.stale_nodes (node_id) select 'n' || n from generate_series(1, 500) n")
    assert await buffers_of(db, refresh) < 50_000


@pytest.mark.one_postgres
async def test_a_budget_of_all_reads_nothing_that_waits(db: Db) -> None:
    await db.execute("insert into image_jobs.usage_limits (applies_to, usd_per_day) values ('all together', 9)")
    await insert_runs(db, 1500)
    async with signed_in(db):
        before = await db.fetchval(READ)
        await db.execute(
            """insert into runs (kind, subject_id, processor, metadata)
            values ('image_gen', gen_random_uuid(), 'demo:painter', '{"promptSpec": {"basePrompt": "a red fox"}}')"""
        )
        assert await db.fetchval(READ) - before < 20


CALLED = "select coalesce(sum(calls), 0)::int from pg_stat_xact_user_functions where schemaname = 'image_jobs'"


@pytest.mark.one_postgres
@pytest.mark.parametrize(
    "budget",
    [
        "used_since(users.id, null, image_jobs.period_start('month'))",
        "used_since(null, users.id, image_jobs.period_start('month'))",
        "used_together(image_jobs.period_start('month'))",
        "add_up_hours()",
    ],
)
async def test_a_budget_calls_no_function_for_each_call(postgres: Cluster, database: str, budget: str) -> None:
    sudo = await connect(postgres.server.dsn(database.rpartition("/")[2]))  # who else may count calls of functions
    await sudo.execute(
        """insert into image_jobs.calls
          (id, run_id, workflow_id, user_id, provider, model, requested_model, opened_at, ticket)
        select n, 'r' || n, u, u, 'demo', 'painter', 'painter', now() - n * interval '1 s', n
        from generate_series(1, 500) n, gen_random_uuid() u"""
    )
    async with sudo.transaction():
        await sudo.execute("set local track_functions = 'all'")
        await sudo.execute(
            f"select image_jobs.{budget} from (select user_id as id from image_jobs.calls limit 1) users"
        )
        called = await sudo.fetchval(CALLED)
    await sudo.close()
    assert 0 < called < 50


async def test_gauges_read_only_runs_that_wait(db: Db) -> None:
    await insert_runs(db, 1500)
    await db.execute("update runs set status = 'cancelled'")
    await insert_runs(db, FEW)
    await db.execute("analyze runs")
    async with db.transaction():
        before = await db.fetchval(READ)
        rows = await db.fetch("select g from image_jobs.gauges() g")
        read = (await db.fetchval(READ)) - before
    (waiting,) = [row["g"]["value"] for row in rows if row["g"]["gauge"] == "waiting"]
    assert waiting == FEW
    assert read < 20 * FEW


@pytest.mark.one_postgres
async def test_a_later_insert_of_a_session_plans_little(postgres: Cluster, database: str) -> None:
    """Planned anew were the projection's largest statements: arrays of one element look cheaper than those of unknown length."""
    sudo = await connect(postgres.server.dsn(database.rpartition("/")[2]))  # who else may log what is planned
    planned: list[str] = []
    sudo.add_log_listener(lambda _, message: planned.append(str(message.message)))
    await sudo.execute("set client_min_messages = log")
    for _ in range(8):
        await sudo.execute("set log_planner_stats = on")
        planned.clear()
        async with signed_in(sudo, WORKFLOW):
            await insert_run(sudo)
        await sudo.execute("set log_planner_stats = off")
    await sudo.close()
    assert planned.count("PLANNER STATISTICS") <= 2
