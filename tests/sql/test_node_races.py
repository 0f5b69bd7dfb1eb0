"""A node that is locked, just being inserted, or breaks a rule: no write waits for it, and no change is missed."""

import asyncio

import pytest

from tests.support.postgres import connect
from tests.support.protocol import (
    IMAGE,
    Daemon,
    Db,
    insert_node,
    move_clock,
    node_data,
    run_in,
)
from tests.support.runs import WORKFLOW, insert_run, run_row

# another transaction holds the node


async def test_a_locked_node_stalls_no_settlement_and_is_shown_later(
    database: str, db: Db, daemon: Daemon, node: str
) -> None:
    run = await insert_run(db, nodeId=node)
    claimed = await daemon.claim_one()
    dragging = await connect(database)
    try:
        async with dragging.transaction():
            await dragging.execute("""update workflow_nodes set position = '{"x": 1}'""")
            await db.execute("set statement_timeout = '5s'")
            assert await daemon.complete(claimed) == "settled"
            assert (await run_row(db, run))["status"] == "completed"
            assert (await node_data(db, node))["status"] == "running"
            await daemon.sync()
            assert (await node_data(db, node))["status"] == "running"
    finally:
        await dragging.close()
    await daemon.sync()
    assert (await node_data(db, node))["status"] == "completed"
    assert await db.fetchval("""select "position" from workflow_nodes""") == {"x": 1}
    assert await db.fetchval("select count(*) from image_jobs.stale_nodes") == 0


@pytest.mark.parametrize("statement", ["insert", "cancel", "requeue"])
async def test_a_locked_node_does_not_stall_an_operator(
    database: str, db: Db, daemon: Daemon, node: str, statement: str
) -> None:
    run = await run_in(db, daemon, "failed" if statement == "requeue" else "pending", nodeId=node)
    dragging = await connect(database)
    try:
        async with dragging.transaction():
            await dragging.execute("""update workflow_nodes set position = '{"x": 1}'""")
            await db.execute("set statement_timeout = '5s'")
            match statement:
                case "insert":
                    run = await insert_run(db, nodeId=node)
                case "cancel":
                    await db.execute("update runs set status = 'cancelled' where id = $1", run)
                case _:
                    await db.execute("update runs set status = 'pending' where id = $1", run)
    finally:
        await dragging.close()
    await daemon.sync()
    shown = await node_data(db, node)
    assert (shown["runId"], shown["status"]) == (run, "cancelled" if statement == "cancel" else "pending")


async def test_a_node_inserted_while_its_run_settles_shows_the_end(database: str, db: Db, daemon: Daemon) -> None:
    """Neither transaction sees the other: the node does not yet exist, the run is still running."""
    await insert_run(db, nodeId="n")
    claimed = await daemon.claim_one()
    frontend = await connect(database)
    try:
        async with frontend.transaction():
            await insert_node(frontend, "n", WORKFLOW)
            assert await daemon.complete(claimed) == "settled"
    finally:
        await frontend.close()
    await daemon.sync()
    shown = await node_data(db, "n")
    assert (shown["status"], shown["imageUrl"]) == ("completed", IMAGE)


async def test_a_run_that_settles_while_its_node_is_inserted_is_shown(database: str, db: Db, daemon: Daemon) -> None:
    """The other way round: the settlement is not yet committed when the node comes."""
    await insert_run(db, nodeId="n")
    claimed = await daemon.claim_one()
    async with db.transaction():
        await daemon.complete(claimed)
        frontend = await connect(database)
        try:
            await frontend.execute("set statement_timeout = '5s'")
            await insert_node(frontend, "n", WORKFLOW)
        finally:
            await frontend.close()
    await daemon.sync()
    assert (await node_data(db, "n"))["status"] == "completed"


async def test_a_run_inserted_while_its_node_is_inserted_is_shown(database: str, db: Db, daemon: Daemon) -> None:
    await insert_node(db, "earlier", WORKFLOW)  # of two who found a workflow, the second waits
    frontend = await connect(database)
    try:
        async with frontend.transaction():
            await insert_node(frontend, "n", WORKFLOW)
            run = await insert_run(db, nodeId="n")
    finally:
        await frontend.close()
    await daemon.sync()
    assert (await node_data(db, "n"))["runId"] == run


async def test_two_frontends_and_a_daemon_leave_nothing_behind(database: str, db: Db, daemon: Daemon) -> None:
    """Nodes and their runs come from two sides at once; after a sync every node shows its run."""
    names = [f"n{number}" for number in range(20)]
    one, other = await connect(database), await connect(database)

    async def nodes() -> None:
        for name in names:
            await insert_node(one, name, WORKFLOW)

    async def runs() -> None:
        for name in names:
            await insert_run(other, nodeId=name)

    try:
        await asyncio.gather(nodes(), runs())
    finally:
        await one.close()
        await other.close()
    await daemon.sync()
    assert {(await node_data(db, name))["status"] for name in names} == {"pending"}


# writes that block no others


async def test_a_node_that_breaks_a_rule_does_not_block_its_run(db: Db, daemon: Daemon, node: str) -> None:
    run = await insert_run(db, nodeId=node)
    await insert_node(db, "good", WORKFLOW)
    good = await insert_run(db, nodeId="good")
    await db.execute(
        """
        alter table workflow_nodes disable trigger image_jobs_keep_node;
        alter table workflow_nodes drop constraint workflow_nodes_node_data_holds_no_base64;
        update workflow_nodes set node_data = node_data || '{"picture": "data:image/png;base64,AA=="}' where id = 'n';
        alter table workflow_nodes add constraint workflow_nodes_node_data_holds_no_base64
          check (not image_jobs.has_base64(node_data)) not valid;
        alter table workflow_nodes enable trigger image_jobs_keep_node;
        """
    )
    claims = await daemon.claim(2)
    settlements = [
        {"id": c["id"], "claim": c["claim"], "outcome": "completed", "payload": {"imageUrl": IMAGE}} for c in claims
    ]
    assert [row["result"] for row in await daemon.sync(settlements=settlements)] == ["settled", "settled"]
    assert (await run_row(db, run))["status"] == (await run_row(db, good))["status"] == "completed"
    assert (await node_data(db, "good"))["imageUrl"] == IMAGE
    warnings = await db.fetch("select run_id, payload from run_events where payload ->> 'event' = 'warning'")
    assert {row["run_id"] for row in warnings} == {run}


async def test_many_nodes_change_in_one_statement(db: Db, daemon: Daemon) -> None:
    await db.execute(
        "insert into workflow_nodes (id, workflow_id, node_type, node_data) "
        "select 'n' || n, $1, 'image', '{}' from generate_series(1, 300) n",
        WORKFLOW,
    )
    await db.execute(
        "insert into runs (kind, subject_id, status, processor, metadata) "
        "select 'image_gen', $1, 'pending', 'demo:painter', "
        "jsonb_build_object('nodeId', 'n' || n, 'promptSpec', '{\"basePrompt\": \"a fox\"}'::jsonb) "
        "from generate_series(1, 300) n",
        WORKFLOW,
    )
    assert await db.fetchval("select count(*) from workflow_nodes where node_data ->> 'status' = 'pending'") == 300
    await db.execute("update runs set status = 'cancelled'")
    assert await db.fetchval("select count(*) from workflow_nodes where node_data ->> 'status' = 'cancelled'") == 300


async def test_the_clock_of_a_node_is_ours(db: Db, node: str) -> None:
    await move_clock(db, "1 day")
    await db.execute("update workflow_nodes set updated_at = 'epoch', created_at = 'epoch', node_type = 'other'")
    row = await db.fetchrow("select created_at, updated_at, now() from workflow_nodes")
    assert row["created_at"].year > 1970
    assert row["updated_at"] > row["now"]
