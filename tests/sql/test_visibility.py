"""Who sees a workflow: policies ask for the set of a user's workflows, once a statement."""

from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.support.postgres import signed_in
from tests.support.protocol import IMAGE, Daemon, Db

ANN = UUID("aaaaaaaa-0000-4000-8000-00000000000a")
BOB = UUID("bbbbbbbb-0000-4000-8000-00000000000b")
ANNS = UUID("aaaaaaaa-1111-4000-8000-000000000001")
BOBS = UUID("bbbbbbbb-1111-4000-8000-000000000002")
METADATA = {"nodeId": "n", "promptSpec": {"basePrompt": "a red fox"}}

INSERT_RUN = "insert into runs (id, kind, subject_id, status, processor, metadata) values ($1, 'image_gen', $2, 'pending', 'demo:painter', $3)"
INSERT_NODE = "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ($1, $2, 'image', '{}')"
INSERT_RUNS = (
    "insert into runs (kind, subject_id, status, processor, metadata) "
    "select 'image_gen', w, 'pending', 'demo:painter', $2 from unnest($1::uuid[]) w"
)
INSERT_NODES = (
    "insert into workflow_nodes (id, workflow_id, node_type, node_data) "
    "select gen_random_uuid(), w, 'image', $2 from unnest($1::uuid[]) w"
)
# What a client may name, whether or not it is a member.
NAMED = (
    "select id from runs where subject_id = '{0}' order by created_at desc limit 20",
    "select id from runs where id = 'ann'",
    "select id from run_events where workflow_id = '{0}' order by seq desc limit 50",
    "select id from run_events where run_id = 'ann'",
    "select id from workflow_nodes where workflow_id = '{0}'",
    "select id from workflow_nodes where id = 'ann'",
    """select "jobId" from image_jobs where "workflowId" = '{0}'""",
    "select workflow_id from workflow_members where workflow_id = '{0}'",
)


@pytest.fixture
async def db(db: Db) -> Db:
    """Give Ann and Bob a workflow each, with a node and a run."""
    for user, workflow, name in ((ANN, ANNS, "ann"), (BOB, BOBS, "bob")):
        async with signed_in(db, user):
            await db.execute(INSERT_NODE, name, workflow)
            await db.execute(INSERT_RUN, name, workflow, {**METADATA, "nodeId": name})
    return db


async def seen(db: Db, user: UUID) -> list[int]:
    """Count what a user sees of Ann's workflow, by query."""
    async with signed_in(db, user):
        return [len(await db.fetch(query.format(ANNS))) for query in NAMED]


async def call(db: Db, user: UUID, function: str, argument: object) -> Any:
    async with signed_in(db, user):
        return await db.fetchval(f"select {function}($1)", argument)


async def test_former_member_sees_nothing_through_any_link(db: Db) -> None:
    stranger, former = uuid4(), uuid4()
    await call(db, former, "join_workflow", await call(db, ANN, "share_workflow", ANNS))
    assert all(await seen(db, former))
    own = await call(db, former, "share_workflow", ANNS)
    await call(db, former, "leave_workflow", ANNS)
    later = await call(db, ANN, "share_workflow", ANNS)
    assert not any(await seen(db, former))
    with pytest.raises(asyncpg.PostgresError, match="does not open a workflow"):
        await call(db, former, "join_workflow", own)
    assert not any(await seen(db, former))
    assert not any(await seen(db, stranger))
    await call(db, former, "join_workflow", later)
    assert all(await seen(db, former))
    await call(db, former, "leave_workflow", ANNS)
    assert not any(await seen(db, former))
    for query in NAMED:
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            async with signed_in(db, role="anon"):
                await db.fetch(query.format(ANNS))


@pytest.mark.parametrize("insert", [INSERT_RUNS, INSERT_NODES], ids=["runs", "nodes"])
async def test_one_statement_returns_one_new_workflow(db: Db, insert: str) -> None:
    new = [uuid4() for _ in range(2)]
    async with signed_in(db, ANN):
        assert len(await db.fetch(insert + " returning id", [new[0], new[0], ANNS], METADATA)) == 3
    with pytest.raises(asyncpg.InvalidParameterValueError, match="rows of one new workflow only") as refused:
        async with signed_in(db, ANN):
            await db.fetch(insert + " returning id", [new[1], uuid4()], METADATA)
    assert refused.value.hint == "Insert the rows of each new workflow by themselves, or leave out .select()."
    async with signed_in(db, ANN):
        assert await db.execute(insert, [new[1], uuid4()], METADATA) == "INSERT 0 2"
        for _ in range(2):
            assert await db.fetch(insert + " returning id", [uuid4()], METADATA)
        assert (
            len(await db.fetch("select distinct subject_id from runs union select workflow_id from workflow_nodes"))
            == 6
        )


@pytest.mark.parametrize("insert", [INSERT_RUNS, INSERT_NODES], ids=["runs", "nodes"])
async def test_foreign_workflow_is_refused_beside_a_new_one(db: Db, insert: str) -> None:
    for more in ("", " returning id"):
        for workflows in ([uuid4(), BOBS], [BOBS, uuid4()], [ANNS, BOBS]):
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                async with signed_in(db, ANN):
                    await db.fetch(insert + more, workflows, METADATA)


async def test_setting_founded_shows_nothing(db: Db) -> None:
    async with signed_in(db, BOB):
        await db.execute(f"set local image_jobs.founded = '{ANNS}'")
        for query in NAMED:
            assert not await db.fetch(query.format(ANNS))


async def test_application_replaces_one_function(db: Db) -> None:
    await db.execute(
        f"""
        create or replace function image_jobs.my_workflows() returns setof uuid
        language sql volatile security definer set search_path = ''
        as $$ select '{ANNS}'::uuid where image_jobs.current_user_id() = '{BOB}' union all select null $$
        """
    )
    for user, sees in ((BOB, ["ann"]), (ANN, [])):
        async with signed_in(db, user):
            for table in ("runs", "workflow_nodes"):
                assert [row["id"] for row in await db.fetch(f"select id from {table}")] == sees
            assert {row[0] for row in await db.fetch("select run_id from run_events")} == set(sees)
            assert await db.fetchval("select image_jobs.can_access_workflow($1)", ANNS) is bool(sees)
            assert await db.execute("update workflow_nodes set position = '{}'") == f"UPDATE {len(sees)}"
            assert not await db.fetchval("select coalesce(image_jobs.can_access_workflow(null), false)")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with signed_in(db, ANN):
            await db.execute(INSERT_RUN, "more", ANNS, METADATA)


async def test_every_event_carries_its_workflow(db: Db, daemon: Daemon) -> None:
    claimed = next(run for run in await daemon.claim(2) if run["id"] == "ann")
    stored = {"kind": "log", "payload": {"event": "stored", "message": "Stored."}}
    await daemon.record(claimed, progress=10, events=[stored])
    await daemon.complete(claimed, IMAGE)
    await db.execute("update runs set status = 'pending' where id = 'ann'")
    # Whatever an operator says.
    event = await db.fetchval(
        "insert into run_events (run_id, kind, payload, workflow_id) values ('ann', 'log', '{}', $1) returning id", BOBS
    )
    rows = await db.fetch("select run_id, workflow_id, count(*) from run_events group by 1, 2 order by 1")
    assert [tuple(row)[:2] for row in rows] == [("ann", ANNS), ("bob", BOBS)]
    assert rows[0][2] > 5
    await db.execute("update run_events set workflow_id = null, run_id = 'bob' where id = $1", event)
    assert await db.fetchval("select workflow_id from run_events where id = $1", event) == BOBS


async def test_refused_event_keeps_its_workflow(db: Db, daemon: Daemon) -> None:
    await db.execute(
        "alter table run_events add constraint no_stored check (payload ->> 'event' is distinct from 'stored') not valid"
    )
    claimed = next(run for run in await daemon.claim(2) if run["id"] == "ann")
    events = [{"kind": "log", "payload": {"event": event, "message": "x"}} for event in ("stored", "generated")]
    await daemon.record(claimed, events=events)
    rows = await db.fetch("select payload ->> 'event', workflow_id from run_events where run_id = 'ann' order by seq")
    assert [row[0] for row in rows][-2:] == ["warning", "generated"]
    assert {row[1] for row in rows} == {ANNS}
