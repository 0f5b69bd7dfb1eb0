"""Row level security: strangers, anon and members of another workflow reach nothing of a workflow."""

from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.support.postgres import signed_in

pytestmark = pytest.mark.every_postgres

ANN = UUID("aaaaaaaa-0000-4000-8000-00000000000a")
BOB = UUID("bbbbbbbb-0000-4000-8000-00000000000b")
FORMER = UUID("ffffffff-0000-4000-8000-00000000000f")
ANNS = UUID("aaaaaaaa-1111-4000-8000-000000000001")
BOBS = UUID("bbbbbbbb-1111-4000-8000-000000000002")

INSERT_RUN = "insert into runs (id, kind, subject_id, status, processor, metadata) values ($1, 'image_gen', $2, 'pending', 'demo:painter', $3)"
INSERT_NODE = "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ($1, $2, 'image', $3)"
OPERATORS_VIEWS = tuple(
    f"image_jobs.{view}"
    for view in (
        "queue_stats",
        "run_timings",
        "run_costs",
        "failures",
        "throughput",
        "storage_stats",
        "storage_violations",
        "daemon_status",
    )
)
TABLES = ("runs", "run_events", "workflow_nodes", "workflow_members", "image_jobs")

DENIED = asyncpg.InsufficientPrivilegeError


def asking(node: str = "ann-node", **more: object) -> dict[str, object]:
    return {"nodeId": node, "promptSpec": {"basePrompt": "a red fox"}, **more}


@pytest.fixture
async def db(db):
    """Give Ann's workflow a node, a run and a former member, and Bob's a node and a run."""
    for user, workflow, name in ((ANN, ANNS, "ann"), (BOB, BOBS, "bob")):
        async with signed_in(db, user):
            await db.execute(INSERT_NODE, f"{name}-node", workflow, {"label": name})
            await db.execute(INSERT_RUN, f"{name}-run", workflow, asking(f"{name}-node"))
    async with signed_in(db, ANN):
        token = await db.fetchval("select share_workflow($1)", ANNS)
    async with signed_in(db, FORMER):
        await db.execute("select join_workflow($1)", token)
        await db.execute("select leave_workflow($1)", ANNS)
    return db


async def everything(db) -> dict[str, list[tuple[object, ...]]]:
    """Fetch all rows that clients could see, as an operator."""
    return {table: sorted(map(repr, await db.fetch(f"select * from {table}"))) for table in TABLES}


async def test_a_member_sees_the_own_workflow_and_no_other(db):
    async with signed_in(db, ANN):
        for table in TABLES:
            column = {"run_events": "run_id", "image_jobs": '"workflowId"', "runs": "subject_id"}.get(
                table, "workflow_id"
            )
            seen = {row[0] for row in await db.fetch(f"select {column} from {table}")}
            assert seen == ({"ann-run"} if table == "run_events" else {ANNS})


@pytest.mark.parametrize("user", [None, FORMER], ids=["stranger", "former member"])
async def test_a_stranger_sees_nothing(db, user):
    async with signed_in(db, user):
        for table in TABLES:
            assert not await db.fetch(f"select * from {table}")


@pytest.mark.parametrize("subject", [None, "", "no-uuid", 7, {"a": 1}, "1' or true --"])
async def test_a_token_without_a_proper_user_id_sees_nothing(db, subject):
    async with signed_in(db, sub=subject):
        for table in TABLES:
            assert not await db.fetch(f"select * from {table}")


async def test_a_token_without_a_proper_user_id_founds_nothing(db):
    with pytest.raises(DENIED):
        async with signed_in(db, sub="no-uuid"):
            await db.execute(INSERT_NODE, "n", uuid4(), {})


@pytest.mark.parametrize("subject", [None, "user_2abcDEF", "Xy7bGq0aQmVhT3lUu8fC1dEwZ2k1", 7])
async def test_user_whose_id_is_no_uuid_is_told_so(db, subject):
    workflow = uuid4()
    with pytest.raises(DENIED, match="its claim sub is not a uuid") as refused:
        async with signed_in(db, sub=subject):
            await db.execute(INSERT_RUN, "r", workflow, {"promptSpec": {"basePrompt": "x"}})
    assert "carry a uuid as sub" in refused.value.hint
    assert not await db.fetchval("select exists (select from image_jobs.workflows where id = $1)", workflow)


@pytest.mark.parametrize("subject", [None, "user_2abcDEF", "Xy7bGq0aQmVhT3lUu8fC1dEwZ2k1", 7])
async def test_user_whose_id_is_no_uuid_is_told_so_at_nodes(db, subject):
    workflow = uuid4()
    for known in (False, True):
        with pytest.raises(DENIED, match="its claim sub is not a uuid") as refused:
            async with signed_in(db, sub=subject):
                await db.execute(INSERT_NODE, "n", workflow, {})
        assert "carry a uuid as sub" in refused.value.hint
        assert await db.fetchval("select exists (select from image_jobs.workflows where id = $1)", workflow) is known
        if not known:
            async with signed_in(db, ANN):
                await db.execute(INSERT_NODE, "of-ann", workflow, {})
    with pytest.raises(DENIED, match="row-level security"):
        async with signed_in(db, BOB):
            await db.execute(INSERT_NODE, "n", workflow, {})


async def test_anon_reads_no_table_at_all(db):
    for table in (*TABLES, *OPERATORS_VIEWS, "image_jobs.provider_limits"):
        with pytest.raises(DENIED):
            async with signed_in(db, role="anon"):
                await db.fetch(f"select * from {table}")


async def test_views_for_operators_are_closed_to_members(db):
    for view in (*OPERATORS_VIEWS, "image_jobs.provider_limits"):
        with pytest.raises(DENIED):
            async with signed_in(db, ANN):
                await db.fetch(f"select * from {view}")


async def test_everybody_reads_the_models_on_offer(db):
    await db.execute("insert into image_jobs.models (provider, model) values ('demo', 'painter')")
    for role in ("anon", "authenticated", "service_role"):
        async with signed_in(db, role=role):
            row = await db.fetchrow("select model, qualities from image_models")
            assert tuple(row) == ("painter", [])


FORBIDDEN = {
    "read the private schema": "select * from image_jobs.workflows",
    "insert a run": "insert into runs (kind, subject_id, status, processor, metadata) values "
    f"""('image_gen', '{ANNS}', 'pending', 'demo:painter', '{{"nodeId": "ann-node", "promptSpec": {{"basePrompt": "x"}}}}')""",
    "insert a node": f"insert into workflow_nodes (id, workflow_id, node_type, node_data) values ('x', '{ANNS}', 'image', '{{}}')",
    "overwrite a node": "insert into workflow_nodes (id, workflow_id, node_type, node_data) values "
    f"""('ann-node', '{BOBS}', 'image', '{{}}') on conflict (id) do update set node_data = '{{"label": "stolen"}}'""",
    "take a node over": "insert into workflow_nodes (id, workflow_id, node_type, node_data) values "
    f"""('ann-node', '{BOBS}', 'image', '{{}}') on conflict (id) do update set workflow_id = excluded.workflow_id""",
    "add an event": "insert into run_events (run_id, kind) values ('ann-run', 'log')",
    "join": f"insert into workflow_members (workflow_id, user_id) values ('{ANNS}', '{BOB}')",
    "update a run": "update runs set status = 'cancelled' where id = 'ann-run'",
    "delete a run": "delete from runs where id = 'ann-run'",
    "delete events": "delete from run_events",
    "empty runs": "truncate runs cascade",
    "merge into runs": "merge into runs r using (values ('ann-run')) v (id) on r.id = v.id when matched then delete",
    "lock a run": "select * from runs where id = 'ann-run' for update",
    "read the links": "select * from image_jobs.workflow_links",
    "make a link": f"insert into image_jobs.workflow_links values ('', '{ANNS}', null, 'infinity')",
    "call sync": "select image_jobs.sync(gen_random_uuid(), 1, true, '[]', '[]', null, null)",
    "register a daemon": "select image_jobs.register_daemon(gen_random_uuid(), 'x', '0', 1, '30 s', '{demo}')",
    "mark a workflow": "select image_jobs.found_workflow(gen_random_uuid())",
    "move a sequence": "select setval('image_jobs.claims', 1)",
    "lift a limit": "update image_jobs.provider_limits set per_minute = null",
}


@pytest.mark.parametrize("deed", FORBIDDEN)
async def test_writes_into_foreign_workflows_are_refused(db, deed):
    before = await everything(db)
    for user, role in ((None, "anon"), *((user, "authenticated") for user in (None, BOB, FORMER))):
        with pytest.raises(DENIED):
            async with signed_in(db, user, role):
                await db.execute(FORBIDDEN[deed])
    assert await everything(db) == before


async def test_a_node_is_not_pushed_into_a_foreign_workflow(db):
    with pytest.raises(DENIED):
        async with signed_in(db, BOB):
            await db.execute("update workflow_nodes set workflow_id = $1 where id = 'bob-node'", ANNS)


UNSEEN = (
    """update workflow_nodes set node_data = '{"label": "stolen"}' where id = 'ann-node'""",
    f"update workflow_nodes set workflow_id = '{BOBS}' where id = 'ann-node'",
    "delete from workflow_nodes where id = 'ann-node'",
)


async def test_invisible_rows_cannot_be_changed(db):
    before = await everything(db)
    for deed in UNSEEN:
        for user in (None, BOB, FORMER):
            async with signed_in(db, user):
                assert (await db.execute(deed)).endswith(" 0")
    assert await everything(db) == before


@pytest.mark.parametrize("function", ["cancel_run", "requeue_run", "show_run"])
@pytest.mark.parametrize("user", [None, BOB, FORMER])
async def test_a_foreign_run_is_not_found(db, function, user):
    before = await everything(db)
    refusals = []
    for run in ("ann-run", "there-is-no-such-run"):
        with pytest.raises(asyncpg.PostgresError) as refused:
            async with signed_in(db, user):
                await db.fetchval(f"select {function}($1)", run)
        refusals.append((refused.value.sqlstate, str(refused.value)))
    assert refusals[0] == refusals[1]
    assert refusals[0][0] == "PT404"
    assert await everything(db) == before


async def test_anon_calls_nothing(db):
    sharing = (f"{verb}_workflow('{ANNS}')" for verb in ("share", "join", "leave", "unshare", "can_open"))
    for call in (
        "start_image_job('{}')",
        "cancel_run('ann-run')",
        "requeue_run('ann-run')",
        "show_run('ann-run')",
        *sharing,
    ):
        with pytest.raises(DENIED):
            async with signed_in(db, role="anon"):
                await db.execute(f"select {call}")


async def test_a_run_that_names_a_foreign_node_leaves_it_alone(db):
    before = await db.fetchrow("select * from workflow_nodes where id = 'ann-node'")
    async with signed_in(db, BOB):
        await db.execute(INSERT_RUN, "thief", BOBS, asking("ann-node"))
    await db.execute("update runs set status = 'cancelled' where id = 'thief'")
    assert await db.fetchrow("select * from workflow_nodes where id = 'ann-node'") == before
    await db.execute("delete from runs where id = 'thief'")
    assert await db.fetchrow("select * from workflow_nodes where id = 'ann-node'") == before


async def test_a_node_never_shows_a_run_of_another_workflow(db):
    async with signed_in(db, BOB):
        await db.execute(INSERT_RUN, "early", BOBS, asking("later-node"))
    async with signed_in(db, ANN):
        await db.execute(INSERT_NODE, "later-node", ANNS, {"label": "mine"})
        assert await db.fetchval("select node_data from workflow_nodes where id = 'later-node'") == {"label": "mine"}


async def test_members_work(db):
    async with signed_in(db, ANN):
        await db.execute(
            """update workflow_nodes set node_data = node_data || '{"label": "moved"}', position = '{"x": 1}'"""
        )
        cancelled = await db.fetchval("select cancel_run('ann-run')")
        requeued = await db.fetchval("select requeue_run('ann-run')")
        started = await db.fetchval(
            "select start_image_job($1)",
            {
                "nodeId": "ann-node",
                "workflowId": str(ANNS),
                "provider": "demo",
                "model": "painter",
                "promptSpec": {"basePrompt": "an owl"},
            },
        )
        node = await db.fetchval("select node_data from workflow_nodes")
        events = await db.fetch("select payload ->> 'event' from run_events where run_id = 'ann-run' order by seq")
        await db.execute("delete from workflow_nodes")
    assert (cancelled["status"], requeued["status"], started["status"]) == ("cancelled", "pending", "pending")
    assert node["label"] == "moved"
    assert node["runId"] == started["jobId"]
    assert [event[0] for event in events] == ["created", "cancelled", "requeued"]


async def test_a_second_member_sees_the_workflow_once_added(db):
    await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", ANNS, BOB)
    async with signed_in(db, BOB):
        assert await db.fetchval("select count(*) from runs") == 2
    await db.execute("delete from workflow_members where workflow_id = $1 and user_id = $2", ANNS, BOB)
    async with signed_in(db, BOB):
        assert await db.fetchval("select count(*) from runs") == 1


async def test_a_former_member_sees_not_even_the_own_run(db):
    async with signed_in(db, ANN):
        token = await db.fetchval("select share_workflow($1)", ANNS)
    async with signed_in(db, FORMER):
        await db.execute("select join_workflow($1)", token)
        await db.execute(INSERT_RUN, "own", ANNS, asking())
        await db.execute("select leave_workflow($1)", ANNS)
        for table in TABLES:
            assert not await db.fetch(f"select * from {table}")
        with pytest.raises(asyncpg.PostgresError, match="There is no such run"):
            await db.execute("select cancel_run('own')")


@pytest.mark.parametrize("role", ["service_role", "postgres"])
async def test_operators_do_everything(db, role):
    async with signed_in(db, role=role):
        assert await db.fetchval("select count(*) from runs") == 2
        await db.execute(INSERT_RUN, "ops", ANNS, asking())
        await db.execute("update runs set status = 'cancelled' where id = 'ops'")
        await db.execute("update runs set status = 'pending', priority = 3 where id = 'ops'")
        await db.execute("select cancel_run('ops')")
        await db.execute("select requeue_run('ops')")
        await db.execute("update workflow_nodes set position = '{}'")
        await db.execute("insert into run_events (run_id, kind, payload) values ('ops', 'log', '{}')")
        await db.execute("update image_jobs.provider_limits set paused = true")
        await db.execute(
            "insert into image_jobs.provider_limits (provider, model, max_running) values ('demo', 'painter', 1)"
        )
        for view in OPERATORS_VIEWS:
            await db.fetch(f"select * from {view}")
        await db.execute("delete from runs where id = 'ops'")
    assert await db.fetchval("select lane from runs where id = 'ann-run'") == "demo:painter"


async def test_an_upsert_by_the_service_role_is_an_outside_write(db):
    await db.execute("update runs set status = 'cancelled' where id = 'ann-run'")
    before = await db.fetchrow("select claim, ticket from runs where id = 'ann-run'")
    async with signed_in(db, role="service_role"):
        await db.execute(
            INSERT_RUN + " on conflict (id) do update set status = excluded.status, claim = 1, ticket = 1",
            "ann-run",
            ANNS,
            asking(),
        )
    after = await db.fetchrow("select claim, ticket, status from runs where id = 'ann-run'")
    assert after["status"] == "pending"
    assert after["claim"] > before["claim"]
    assert after["ticket"] > before["ticket"]
