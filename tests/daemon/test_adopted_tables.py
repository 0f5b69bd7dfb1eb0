"""A real daemon on tables that an application had before: a picture from insert to canvas, and a cancel."""

import pytest

from tests.support.adoption import SPECIFICATION, migrate, project
from tests.support.daemon_harness import DaemonHarness, open_harness
from tests.support.postgres import Cluster
from tests.support.protocol import insert_node
from tests.support.runs import WORKFLOW, insert_run

SHAPES = {
    "the specification": SPECIFICATION,
    "text, times without a zone, more columns": SPECIFICATION.replace("VARCHAR", "TEXT").replace(
        "TIMESTAMPTZ", "TIMESTAMP"
    )
    + "alter table runs add team text not null default 'a', add number bigint generated always as identity;"
    "alter table run_events add source text not null default 'app'; alter table workflow_nodes add width int default 1;",
    "checks, triggers and policies": SPECIFICATION
    + "alter table runs add check (status in ('pending', 'running', 'completed', 'failed', 'cancelled'));"
    "create function touch() returns trigger language plpgsql as $$ begin new.updated_at = now(); return new; end $$;"
    "alter table runs add updated_at timestamptz; alter table runs enable row level security;"
    "create trigger touch before update on runs for each row execute function touch();"
    "create trigger touch before update on workflow_nodes for each row execute function touch();"
    "create policy mine on runs using (kind = 'research');",
}


@pytest.mark.parametrize("before", SHAPES.values(), ids=SHAPES)
async def test_a_daemon_makes_pictures_on_adopted_tables(postgres: Cluster, before: str) -> None:
    async with project(postgres, before) as db:
        await migrate(db)
        await insert_node(db, "n", WORKFLOW, label="mine")
        dsn = postgres.server.dsn(await db.fetchval("select current_database()"), user="postgres")
        async with open_harness(DaemonHarness, dsn) as harness, harness.run_daemon() as daemon:
            await daemon.started()
            run = await insert_run(db, prompt={"size": "64x64"}, nodeId="n")
            row = await harness.wait_for_status(run, "completed")
            node = await db.fetchval("select node_data from workflow_nodes where id = 'n'")
            assert (node["label"], node["imageUrl"]) == ("mine", row["payload"]["imageUrl"])
            slow = await insert_run(db, prompt={"size": "64x64"}, demo={"hang": True})
            await harness.wait_for_status(slow, "running")
            await db.execute("select cancel_run($1)", slow)
            await harness.wait_for_status(slow, "cancelled")
