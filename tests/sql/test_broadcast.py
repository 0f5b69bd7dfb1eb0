"""Broadcasts of nodes: one message per statement and workflow, for members alone, and never at the cost of the change."""

import asyncpg
import pytest

from tests.support.postgres import Cluster, connect, signed_in
from tests.support.runs import WORKFLOW, insert_run

Db = asyncpg.Connection


async def messages(cluster: Cluster, db: Db) -> list[asyncpg.Record]:
    """Fetch all messages so far, as the Realtime server reads them."""
    name = await db.fetchval("select current_database()")
    reader = await connect(cluster.server.dsn(name))
    try:
        return await reader.fetch(
            "select topic, event, private, payload from realtime.messages order by inserted_at, payload #>> '{nodes,0,version}'"
        )
    finally:
        await reader.close()


async def add_nodes(db: Db, count: int, data: object | None = None) -> None:
    await db.execute(
        """insert into workflow_nodes (id, workflow_id, node_type, node_data)
        select 'n' || n, $1, 'image_generation', $2 from generate_series(1, $3) n""",
        WORKFLOW,
        data or {},
        count,
    )


async def test_a_statement_sends_one_private_message_per_workflow(postgres: Cluster, db: Db) -> None:
    await add_nodes(db, 50)
    await db.execute("update workflow_nodes set position = '{\"x\": 1}'")
    sent = await messages(postgres, db)
    assert [(row["topic"], row["event"], row["private"]) for row in sent] == [
        (f"workflow:{WORKFLOW}", "nodes_changed", True)
    ] * 2
    assert all(len(row["payload"]["nodes"]) == 50 for row in sent)


async def test_versions_grow_and_unchanged_nodes_are_not_broadcast(postgres: Cluster, db: Db) -> None:
    await add_nodes(db, 1)
    await db.execute("update workflow_nodes set node_data = node_data")
    await db.execute('update workflow_nodes set node_data = \'{"prompt": "a"}\'')
    await db.execute("delete from workflow_nodes")
    sent = [row["payload"]["nodes"][0] for row in await messages(postgres, db)]
    assert len(sent) == 3
    versions = [node["version"] for node in sent]
    assert versions == sorted(set(versions))
    assert sent[-1]["deleted"] is True


async def test_a_change_of_a_run_is_broadcast_as_its_node_data(postgres: Cluster, db: Db) -> None:
    await add_nodes(db, 1)
    run = await insert_run(db, nodeId="n1")
    node = (await messages(postgres, db))[-1]["payload"]["nodes"][0]
    assert node["node_data"]["status"] == "pending"
    assert node["node_data"]["runId"] == run


async def test_large_messages_are_cut_and_large_nodes_sent_in_part(postgres: Cluster, db: Db) -> None:
    await add_nodes(db, 100, {"note": "word " * 1200})
    await db.execute(
        "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ('large', $1, 'note', $2)",
        WORKFLOW,
        {"note": "word " * 20000},
    )
    sent = await messages(postgres, db)
    assert len(sent) > 5
    assert all(len(str(row["payload"])) < 200_000 for row in sent)
    large = next(node for row in sent for node in row["payload"]["nodes"] if node["id"] == "large")
    assert large["partial"] is True
    assert "note" not in large["node_data"]


async def test_a_moved_node_is_deleted_in_its_old_workflow(postgres: Cluster, db: Db) -> None:
    await add_nodes(db, 1)
    await db.execute("update workflow_nodes set workflow_id = 'bbbbbbbb-0000-4000-8000-000000000000'")
    by_topic = {row["topic"]: row["payload"]["nodes"][0] for row in (await messages(postgres, db))[1:]}
    assert by_topic[f"workflow:{WORKFLOW}"]["deleted"] is True
    assert "deleted" not in by_topic["workflow:bbbbbbbb-0000-4000-8000-000000000000"]


async def test_a_renamed_node_is_deleted_under_its_old_id(postgres: Cluster, db: Db) -> None:
    await add_nodes(db, 2)
    await db.execute("update workflow_nodes set id = 'm1' where id = 'n1'")
    last = (await messages(postgres, db))[-1]["payload"]["nodes"]
    assert {node["id"]: node.get("deleted", False) for node in last} == {"n1": True, "m1": False}
    assert len({node["version"] for node in last}) == 2


async def test_nodes_that_an_applications_trigger_writes_are_sent(postgres: Cluster, db: Db) -> None:
    await add_nodes(db, 2)
    await db.execute(
        """
        create function pass_on() returns trigger language plpgsql as $$
        begin
          update public.workflow_nodes set node_data = node_data || '{"fed": true}', workflow_id = gen_random_uuid() where id = 'n2';
          insert into public.workflow_nodes (id, workflow_id, node_type, node_data) values ('n3', new.workflow_id, 'note', '{}');
          return null;
        end $$;
        create trigger pass_on after update on workflow_nodes for each row when (new.id = 'n1') execute function pass_on();
        """
    )
    before = await db.fetchval("select version from workflow_nodes where id = 'n2'")
    await insert_run(db, nodeId="n1")
    assert await db.fetchval("select version from workflow_nodes where id = 'n2'") > before
    assert await db.fetchval("select version from workflow_nodes where id = 'n3'") > before
    sent = [
        node for row in await messages(postgres, db) for node in row["payload"]["nodes"] if node["version"] > before
    ]
    assert {(node["id"], node.get("deleted", False)) for node in sent} == {
        ("n1", False), ("n2", False), ("n2", True), ("n3", False),
    }  # fmt: skip


async def test_a_send_that_fails_does_not_hurt_the_change(postgres: Cluster, db: Db) -> None:
    name = await db.fetchval("select current_database()")
    await postgres.sudo(
        """create or replace function realtime.send(payload jsonb, event text, topic text, private boolean default true)
        returns void language plpgsql as $$ begin raise exception 'Realtime is unwell'; end $$""",
        name,
    )
    warnings: list[str] = []
    db.add_log_listener(lambda _, message: warnings.append(message.message))
    await add_nodes(db, 1)
    assert await db.fetchval("select count(*) from workflow_nodes") == 1
    assert any("Realtime is unwell" in warning for warning in warnings)


async def test_a_send_that_waits_for_a_lock_gives_up_at_once(postgres: Cluster, db: Db, database: str) -> None:
    name = await db.fetchval("select current_database()")
    locker = await connect(postgres.server.dsn(name))
    try:
        async with locker.transaction():
            await locker.execute("lock table realtime.messages in access exclusive mode")
            await add_nodes(db, 1)
        assert await db.fetchval("select count(*) from workflow_nodes") == 1
    finally:
        await locker.close()


async def test_without_realtime_nodes_change_as_usual(postgres: Cluster, db: Db) -> None:
    name = await db.fetchval("select current_database()")
    await postgres.sudo("drop schema realtime cascade", name)
    await add_nodes(db, 1)
    await insert_run(db, nodeId="n1")
    assert (await db.fetchval("select node_data from workflow_nodes"))["status"] == "pending"


@pytest.mark.parametrize("who", ["member", "stranger"])
async def test_only_members_receive_broadcasts_of_a_workflow(postgres: Cluster, db: Db, who: str) -> None:
    async with signed_in(db) as member:
        await db.execute(
            "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ('n1', $1, 'x', '{}')", WORKFLOW
        )
    async with signed_in(db, member if who == "member" else None):
        await db.execute("select set_config('realtime.topic', $1, true)", f"workflow:{WORKFLOW}")
        heard = await db.fetchval("select count(*) from realtime.messages")
        assert heard == (1 if who == "member" else 0)
        await db.execute("select set_config('realtime.topic', 'workflow:nonsense', true)")
        assert await db.fetchval("select count(*) from realtime.messages") == 0


async def test_signed_in_users_may_not_send_on_a_workflow_s_topic(db: Db) -> None:
    async with signed_in(db) as member:
        await db.execute(
            "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ('n1', $1, 'x', '{}')", WORKFLOW
        )
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with signed_in(db, member):
            await db.execute("select set_config('realtime.topic', $1, true)", f"workflow:{WORKFLOW}")
            await db.execute(
                "insert into realtime.messages (topic, extension, event, payload) values ($1, 'broadcast', 'x', '{}')",
                f"workflow:{WORKFLOW}",
            )


async def test_nodes_are_in_the_publication_for_postgres_changes(db: Db) -> None:
    published = await db.fetchval(
        "select tablename from pg_publication_tables where pubname = 'supabase_realtime' and schemaname = 'public'"
    )
    assert published == "workflow_nodes"
