"""Triggers of the application that raise: the row they are about has a reason, and everything else goes on.

The rows say when and how: `metadata.raises` of a run (or `raises` in a node's data) is {"at": …, "sqlstate": …}.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from tests.support.daemons import Daemon
from tests.support.fault_harness import FaultHarness
from tests.support.pooler import Pooler, pooled
from tests.support.postgres import wait_until
from tests.support.runs import event_names, insert_run, run_row

SQLSTATES = ["P0001", "23514", "22023", "42501", "57014", "40001", "53100", "55P03", "P0004", "XX000", "25006", "ZZ999"]
"""Of as many classes; 57014 and P0004 are those that `when others` does not catch."""

TRIGGER = """
create schema if not exists app;
create function app.refuse() returns trigger language plpgsql security definer as $$
declare
  v_raises jsonb := {raises};
begin
  if {refused} then
    raise exception 'The application says no.' using errcode = v_raises ->> 'sqlstate';
  end if;
  return null;
end $$;
create trigger zz_of_the_application after {action} on public.{table} for each row execute function app.refuse();
"""
NODES = TRIGGER.format(
    raises="new.node_data -> 'raises'",
    refused="new.node_data ->> 'status' = v_raises ->> 'at'",
    action="update",
    table="workflow_nodes",
)
EVENTS = TRIGGER.format(
    raises="(select r.metadata -> 'raises' from public.runs r where r.id = new.run_id)",
    refused="v_raises ->> 'at' in (new.payload ->> 'event', 'any')",
    action="insert",
    table="run_events",
)
RUNS = TRIGGER.format(
    raises="new.metadata -> 'raises'",
    refused="v_raises ->> 'at' in (new.status, 'any') or v_raises ->> 'at' = 'progress' and new.progress > old.progress"
    " and new.status = 'running'",
    action="update",
    table="runs",
)
TINY = {"size": "64x64"}


@pytest.fixture
async def pooler(database: str) -> AsyncIterator[Pooler]:
    async with pooled(database) as it:
        yield it


@asynccontextmanager
async def two_daemons(harness: FaultHarness, pooler: Pooler) -> AsyncIterator[None]:
    """Two daemons, which must both live at the end; one of them where statements can be counted."""
    async with harness.run_daemon(dsn=pooler.dsn) as one, harness.run_daemon() as two:
        await one.started()
        await two.started()
        yield
        for each in (one, two):
            assert_alive(each)
        await assert_calm(pooler)


def assert_alive(process: Daemon) -> None:
    assert process.process.returncode is None, "\n".join(process.raw[-5:])


async def assert_calm(pooler: Pooler) -> None:
    """An idle daemon looks once a second; one that spins, hundreds of times."""
    pooler.statements.clear()
    await asyncio.sleep(1)
    syncs = sum("image_jobs.sync" in sql for sql in pooler.statements)
    assert syncs <= 20


async def insert(harness: FaultHarness, at: str, sqlstate: str, **metadata: Any) -> str:
    """A run that paints at once and raises."""
    raises = {"at": at, "sqlstate": sqlstate}
    return await insert_run(harness.db, workflow=uuid4(), prompt=TINY, raises=raises, demo={"noop": True}, **metadata)


async def assert_others_go_on(harness: FaultHarness) -> None:
    run = await insert_run(harness.db, workflow=uuid4(), prompt=TINY, demo={"noop": True})
    await harness.wait_for_status(run, "completed", timeout=15)


async def warnings(db: "asyncpg.Connection[asyncpg.Record]", run: str) -> list[dict[str, Any]]:
    rows = await db.fetch(
        "select payload from run_events where run_id = $1 and payload ->> 'event' = 'warning' order by seq", run
    )
    return [row["payload"] for row in rows]


@pytest.mark.timeout(120)
@pytest.mark.parametrize("at", ["running", "completed"])
async def test_a_node_that_refuses_its_run_is_stale(harness: FaultHarness, pooler: Pooler, at: str) -> None:
    await harness.db.execute(NODES)
    runs: dict[str, str] = {}
    async with two_daemons(harness, pooler):
        for sqlstate in SQLSTATES:
            node, workflow = f"node-{sqlstate}", uuid4()
            await harness.db.execute(
                "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ($1, $2, 'image_generation', $3)",
                node,
                workflow,
                {"raises": {"at": at, "sqlstate": sqlstate}},
            )
            runs[node] = await insert_run(harness.db, workflow=workflow, nodeId=node, prompt=TINY, demo={"noop": True})
        for node, run in runs.items():
            row = await harness.wait_for_status(run, "completed")
            assert row["payload"]["imageUrl"]
            (warning,) = await warnings(harness.db, run)
            assert "The application says no." in str(warning)
            assert warning["data"]["nodeId"] == node
            shown = await harness.db.fetchval("select node_data ->> 'status' from workflow_nodes where id = $1", node)
            stale = await harness.db.fetchval("select count(*) from image_jobs.stale_nodes where node_id = $1", node)
            assert shown == ("completed" if at == "running" else "running") or stale == 1
        await assert_others_go_on(harness)
        await assert_calm(pooler)
        await harness.db.execute("drop trigger zz_of_the_application on workflow_nodes")

        async def shown() -> bool:
            return await harness.db.fetchval(
                "select bool_and(node_data ->> 'status' = 'completed') from workflow_nodes"
            ) and not await harness.db.fetchval("select exists (select from image_jobs.stale_nodes)")

        await wait_until(shown, timeout=30)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("at", ["claimed", "submitted", "generated", "completed", "any"])
async def test_a_refused_event_costs_no_run(harness: FaultHarness, pooler: Pooler, at: str) -> None:
    async with two_daemons(harness, pooler):
        runs = []
        if at == "any":  # else the insert's own event would be refused, too
            await harness.db.execute("update image_jobs.provider_limits set paused = true where provider = 'demo'")
            await harness.db.execute(
                "insert into image_jobs.provider_limits (provider, paused) values ('demo', true)"
                " on conflict (provider, model) do update set paused = true"
            )
            runs = [await insert(harness, at, sqlstate) for sqlstate in SQLSTATES]
        await harness.db.execute(EVENTS)
        if at == "any":
            await harness.db.execute("update image_jobs.provider_limits set paused = false where provider = 'demo'")
        else:
            runs = [await insert(harness, at, sqlstate) for sqlstate in SQLSTATES]
        for run in runs:
            row = await harness.wait_for_status(run, "completed")
            assert row["payload"]["imageUrl"]
            assert row["attempt"] == 1
            names = await event_names(harness.db, run)
            assert at not in names
            if at != "any":
                assert "The application says no." in str(await warnings(harness.db, run))
        await assert_others_go_on(harness)


@pytest.mark.timeout(120)
async def test_a_run_that_may_not_start_ends_with_a_reason(harness: FaultHarness, pooler: Pooler) -> None:
    await harness.db.execute(RUNS)
    async with two_daemons(harness, pooler):
        runs = [await insert(harness, "running", sqlstate) for sqlstate in SQLSTATES]
        await assert_others_go_on(harness)
        for run in runs:
            row = await harness.wait_for_status(run, "failed", timeout=40)
            assert "The application says no." in str(row["payload"])
            assert row["payload"]["hint"]
            assert "failed" in await event_names(harness.db, run)


@pytest.mark.timeout(120)
async def test_a_run_that_may_not_complete_keeps_its_image(harness: FaultHarness, pooler: Pooler) -> None:
    await harness.db.execute(RUNS)
    async with two_daemons(harness, pooler):
        runs = [await insert(harness, "completed", sqlstate) for sqlstate in SQLSTATES]
        await assert_others_go_on(harness)
        for run in runs:
            row = await harness.wait_for_status(run, "failed", timeout=40)
            assert row["payload"]["imageUrl"]
            assert "The application says no." in str(row["payload"])
        await harness.wait_until_idle()


@pytest.mark.timeout(120)
async def test_refused_progress_costs_nothing_but_itself(harness: FaultHarness, pooler: Pooler) -> None:
    await harness.db.execute(RUNS)
    async with two_daemons(harness, pooler):
        raises = [{"at": "progress", "sqlstate": sqlstate} for sqlstate in SQLSTATES]
        runs = [
            await insert_run(harness.db, workflow=uuid4(), prompt=TINY, raises=each, demo={"slow": 2})
            for each in raises
        ]
        for run in runs:
            row = await harness.wait_for_status(run, "completed")
            assert row["attempt"] == 1
        await assert_others_go_on(harness)


@pytest.mark.timeout(120)
async def test_a_run_that_may_not_change_is_set_aside(harness: FaultHarness, pooler: Pooler) -> None:
    await harness.db.execute(RUNS)
    async with two_daemons(harness, pooler):
        runs = [await insert(harness, "any", sqlstate) for sqlstate in SQLSTATES]
        await assert_others_go_on(harness)

        async def explained() -> bool:
            told = [str(await warnings(harness.db, run)) for run in runs]
            return all("The application says no." in text for text in told)

        await wait_until(explained, timeout=20)
        await assert_calm(pooler)
        for run in runs:
            assert (await run_row(harness.db, run))["status"] == "pending"
            assert len(await warnings(harness.db, run)) == 1
        await harness.db.execute("drop trigger zz_of_the_application on runs")
        for run in runs:
            await harness.wait_for_status(run, "completed", timeout=40)


@pytest.mark.timeout(120)
async def test_runs_that_may_not_change_hinder_no_take_over(harness: FaultHarness, pooler: Pooler) -> None:
    async with harness.run_daemon() as doomed:
        await doomed.started()
        raises = {"at": "any", "sqlstate": "P0001"}
        held = [
            await insert_run(harness.db, workflow=uuid4(), prompt=TINY, demo={"hang": True}, **metadata)
            for metadata in ({"raises": raises}, {})
        ]
        for run in held:
            await harness.wait_for_status(run, "running")
        await harness.db.execute(RUNS)
        async with two_daemons(harness, pooler):
            await harness.allow_take_over()
            doomed.process.kill()
            await doomed.ended()

            async def taken() -> bool:
                return "taken_over" in await event_names(harness.db, held[1])

            await wait_until(taken, timeout=20)
            await assert_others_go_on(harness)
