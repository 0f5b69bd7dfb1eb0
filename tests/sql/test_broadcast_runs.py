"""Broadcasts of runs without a node: event `runs_changed` on the private topic of their workflow."""

from typing import Any
from uuid import UUID

import asyncpg
import pytest

from tests.support.postgres import Cluster, connect, signed_in
from tests.support.protocol import Daemon, Db, insert_node
from tests.support.runs import WORKFLOW, insert_run

OTHER = UUID("bbbbbbbb-0000-4000-8000-000000000000")
TOPIC = f"workflow:{WORKFLOW}"


async def messages(cluster: Cluster, db: Db) -> list[asyncpg.Record]:
    """Fetch the messages about runs so far, as the Realtime server reads them."""
    reader = await connect(cluster.server.dsn(await db.fetchval("select current_database()")))
    try:
        return await reader.fetch(
            """select topic, private, payload -> 'runs' as runs from realtime.messages
            where event = 'runs_changed' order by inserted_at, payload #>> '{runs,0,version}'"""
        )
    finally:
        await reader.close()


async def sent_runs(cluster: Cluster, db: Db) -> list[dict[str, Any]]:
    """Fetch the runs of all those messages, in order."""
    return [run for row in await messages(cluster, db) for run in row["runs"]]


@pytest.mark.every_postgres
async def test_a_run_without_a_node_is_broadcast_to_its_end(postgres: Cluster, db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    await daemon.record(claimed, progress=40, message="Painting.")
    await daemon.complete(claimed)
    sent = await sent_runs(postgres, db)
    assert [(each["status"], each["progress"]) for each in sent] == [
        ("pending", 0),
        ("running", 0),
        ("running", 40),
        ("completed", 100),
    ]
    assert sent[2]["message"] == "Painting."
    record = await db.fetchval('select to_jsonb(j) from image_jobs j where "jobId" = $1', run)
    assert record.items() <= sent[-1].items()
    assert record["imageUrl"]
    versions = [each["version"] for each in sent]
    assert versions == sorted(set(versions))
    assert {(row["topic"], row["private"]) for row in await messages(postgres, db)} == {(TOPIC, True)}


async def test_a_failed_run_is_broadcast_with_its_reason(postgres: Cluster, db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    await daemon.settle(await daemon.claim_one(), "failed", payload={"error": "The prompt was refused.", "code": "x"})
    last = (await sent_runs(postgres, db))[-1]
    assert (last["status"], last["error"]) == ("failed", "The prompt was refused.")


async def test_a_run_whose_node_exists_is_not_broadcast_itself(postgres: Cluster, db: Db, daemon: Daemon) -> None:
    await insert_node(db, "n1", WORKFLOW)
    await insert_run(db, nodeId="n1")
    await daemon.complete(await daemon.claim_one())
    await db.execute("delete from runs")
    assert await messages(postgres, db) == []


@pytest.mark.parametrize("where", ["nowhere", "in another workflow"])
async def test_a_run_whose_node_is_missing_is_broadcast(postgres: Cluster, db: Db, where: str) -> None:
    if where != "nowhere":
        await insert_node(db, "n1", OTHER)
    run = await insert_run(db, nodeId="n1")
    assert [(each["jobId"], each["nodeId"]) for each in await sent_runs(postgres, db)] == [(run, "n1")]


async def test_one_statement_sends_one_message_a_workflow(postgres: Cluster, db: Db) -> None:
    await db.execute(
        """insert into runs (kind, subject_id, status, processor, metadata)
        select 'image_gen', case n % 2 when 0 then $1::uuid else $2::uuid end, 'pending', 'demo:painter',
          '{"promptSpec": {"basePrompt": "a red fox"}}' from generate_series(1, 20) n""",
        WORKFLOW,
        OTHER,
    )
    await db.execute("update runs set status = 'cancelled'")
    sent = await messages(postgres, db)
    assert (
        sorted((row["topic"], len(row["runs"])) for row in sent) == [(TOPIC, 10)] * 2 + [(f"workflow:{OTHER}", 10)] * 2
    )


async def test_unchanged_runs_are_not_broadcast(postgres: Cluster, db: Db) -> None:
    await insert_run(db)
    await db.execute("update runs set due_at = now() + interval '1 hour', metadata = metadata || '{\"a\": 1}'")
    assert len(await messages(postgres, db)) == 1


async def test_a_deleted_run_without_a_node_is_broadcast(postgres: Cluster, db: Db) -> None:
    run = await insert_run(db)
    await db.execute("delete from runs")
    first, last = await sent_runs(postgres, db)
    assert last == {"jobId": run, "workflowId": str(WORKFLOW), "deleted": True, "version": last["version"]}
    assert last["version"] > first["version"]


async def test_many_runs_are_cut_into_messages_below_the_limit(postgres: Cluster, db: Db) -> None:
    metadata = {"promptSpec": {"basePrompt": "word " * 1200}}
    await db.execute(
        """insert into runs (kind, subject_id, status, processor, metadata)
        select 'image_gen', $1, 'pending', 'demo:painter', $2 from generate_series(1, 100)""",
        WORKFLOW,
        metadata,
    )
    sent = await messages(postgres, db)
    assert len(sent) > 5
    assert all(len(str(row["runs"])) < 200_000 for row in sent)
    runs = await sent_runs(postgres, db)
    assert len({each["jobId"] for each in runs}) == 100
    assert all(each["metadata"] == metadata for each in runs)


async def test_a_large_run_is_broadcast_without_its_metadata(postgres: Cluster, db: Db) -> None:
    run = await insert_run(db, note="word " * 20_000)
    (sent,) = await sent_runs(postgres, db)
    assert (sent["jobId"], sent["status"], sent["partial"]) == (run, "pending", True)
    assert "metadata" not in sent


async def test_runs_change_although_their_broadcast_fails(postgres: Cluster, db: Db, daemon: Daemon) -> None:
    await postgres.sudo(
        """create or replace function realtime.send(payload jsonb, event text, topic text, private boolean default true)
        returns void language plpgsql as $$ begin raise exception 'Realtime is unwell'; end $$""",
        await db.fetchval("select current_database()"),
    )
    run = await insert_run(db)
    await daemon.complete(await daemon.claim_one())
    assert await db.fetchval("select status from runs where id = $1", run) == "completed"


async def test_a_broadcast_of_runs_never_waits_for_a_lock(postgres: Cluster, db: Db) -> None:
    locker = await connect(postgres.server.dsn(await db.fetchval("select current_database()")))
    try:
        async with locker.transaction():
            await locker.execute("lock table realtime.messages in access exclusive mode")
            run = await insert_run(db)
        assert await db.fetchval("select status from runs where id = $1", run) == "pending"
    finally:
        await locker.close()


async def test_without_realtime_runs_without_a_node_go_on(postgres: Cluster, db: Db, daemon: Daemon) -> None:
    await postgres.sudo("drop schema realtime cascade", await db.fetchval("select current_database()"))
    run = await insert_run(db)
    await daemon.complete(await daemon.claim_one())
    await db.execute("delete from runs where id = $1", run)


@pytest.mark.parametrize("who", ["member", "stranger"])
async def test_only_members_may_hear_changed_runs(db: Db, member: UUID, who: str) -> None:
    await insert_run(db)
    async with signed_in(db, member if who == "member" else None):
        await db.execute("select set_config('realtime.topic', $1, true)", TOPIC)
        heard = await db.fetchval("select count(*) from realtime.messages where event = 'runs_changed'")
    assert heard == (1 if who == "member" else 0)


async def test_rows_of_other_kinds_are_never_broadcast(postgres: Cluster, db: Db) -> None:
    await db.execute("insert into runs (id, kind, subject_id, status) values ('r', 'research', $1, 'new')", WORKFLOW)
    await db.execute("update runs set status = 'done'")
    await db.execute("delete from runs")
    assert await messages(postgres, db) == []
