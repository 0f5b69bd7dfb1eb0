"""Adopted tables: rows of other kinds stay as open as they were, ours are closed."""

from uuid import UUID

import asyncpg
import pytest

from tests.support.postgres import MIGRATIONS, Cluster, connect, signed_in

pytestmark = pytest.mark.every_postgres

ANN = UUID("aaaaaaaa-0000-4000-8000-00000000000a")
BOB = UUID("bbbbbbbb-0000-4000-8000-00000000000b")
WORKFLOW = UUID("aaaaaaaa-1111-4000-8000-000000000001")
OTHER = UUID("bbbbbbbb-1111-4000-8000-000000000002")
OLD = UUID("cccccccc-1111-4000-8000-000000000003")

# As the specification has them, without row level security, and wide open, as older projects were.
BEFORE = f"""
    create table runs (
        id varchar primary key, kind varchar not null, subject_id uuid not null, status varchar not null,
        processor varchar, started_at timestamptz default now(), finished_at timestamptz, payload jsonb);
    create table run_events (
        id uuid primary key, run_id varchar references runs (id), ts timestamptz default now(), kind varchar not null,
        payload jsonb);
    create table workflow_nodes (
        id varchar primary key, workflow_id uuid not null, node_type varchar not null, node_data jsonb not null,
        position jsonb, created_at timestamptz default now(), updated_at timestamptz default now());
    grant all on runs, run_events, workflow_nodes to anon, authenticated, service_role;
    insert into runs (id, kind, subject_id, status) values
        ('research', 'research', '{OLD}', 'running'), ('image', 'image_gen', '{OLD}', 'running');
    insert into run_events (id, run_id, kind) values
        (gen_random_uuid(), 'research', 'thought'), (gen_random_uuid(), 'image', 'log');
    insert into workflow_nodes (id, workflow_id, node_type, node_data) values ('old', '{OLD}', 'image', '{{"label": "x"}}');
"""

WIDE_POLICIES = """
    alter table runs enable row level security;
    create policy "All do all" on runs using (true) with check (true);
    alter table run_events enable row level security;
    create policy "All do all" on run_events using (true) with check (true);
    alter table workflow_nodes enable row level security;
    create policy "All do all" on workflow_nodes using (true) with check (true);
"""

ROLES = ((None, "anon"), (BOB, "authenticated"))
INSERT_RUN = """insert into runs (id, kind, subject_id, status, processor, metadata) values
    ($1, 'image_gen', $2, 'pending', 'demo:painter', '{"promptSpec": {"basePrompt": "a red fox"}}')"""


@pytest.fixture(params=["without policies", "with wide policies"])
async def db(request: pytest.FixtureRequest, postgres: Cluster):
    async with postgres.database(template=None) as dsn:
        connection = await connect(dsn)
        await connection.execute(BEFORE + (WIDE_POLICIES if request.param == "with wide policies" else ""))
        for _ in range(2):
            for file in sorted(MIGRATIONS.glob("*.sql")):
                await connection.execute(file.read_text())
        yield connection
        await connection.close()


async def test_rows_of_other_kinds_stay_open(db):
    for number, (user, role) in enumerate(ROLES):
        async with signed_in(db, user, role):
            assert [row["id"] for row in await db.fetch("select id from runs")] == ["research"]
            assert [row["kind"] for row in await db.fetch("select kind from run_events")] == ["thought"]
            assert (
                await db.execute("update runs set status = 'whatever', payload = '{}' where id = 'research'")
                == "UPDATE 1"
            )
            await db.execute(
                "insert into runs (id, kind, subject_id, status) values ($1, 'research', $2, 'x')", f"own-{number}", OLD
            )
            await db.execute(
                "insert into run_events (id, run_id, kind) values (gen_random_uuid(), $1, 'thought')", f"own-{number}"
            )
            assert await db.execute("delete from run_events where run_id = $1", f"own-{number}") == "DELETE 1"
            assert await db.execute("delete from runs where id = $1", f"own-{number}") == "DELETE 1"


async def test_image_runs_are_closed_whatever_was_granted(db):
    async with signed_in(db, ANN):
        await db.execute(INSERT_RUN, "ann-run", WORKFLOW)
    before = [
        await db.fetch(f"select * from {table} order by id") for table in ("runs", "run_events", "workflow_nodes")
    ]
    for user, role in ROLES:
        for deed in (
            "update runs set status = 'x' where kind = 'image_gen'",
            "delete from run_events where run_kind = 'image_gen'",
            "delete from runs where kind = 'image_gen'",
            "update workflow_nodes set node_data = '{}'",
            "delete from workflow_nodes",
        ):
            try:
                async with signed_in(db, user, role):
                    assert (await db.execute(deed)).endswith(" 0")
            except asyncpg.InsufficientPrivilegeError:
                continue
        for deed in (
            f"insert into runs (id, kind, subject_id, status) values ('x', 'image_gen', '{WORKFLOW}', 'pending')",
            "update runs set kind = 'image_gen' where id = 'research'",
            "insert into run_events (id, run_id, kind) values (gen_random_uuid(), 'ann-run', 'log')",
            "update run_events set run_id = 'ann-run' where kind = 'thought'",
            f"insert into workflow_nodes (id, workflow_id, node_type, node_data) values ('x', '{WORKFLOW}', 'image', '{{}}')",
            "truncate run_events",
            "truncate runs cascade",
        ):
            with pytest.raises((asyncpg.InsufficientPrivilegeError, asyncpg.InvalidParameterValueError)):
                async with signed_in(db, user, role):
                    await db.execute(deed)
    after = [await db.fetch(f"select * from {table} order by id") for table in ("runs", "run_events", "workflow_nodes")]
    assert after == before


async def test_members_have_no_update_and_no_delete_on_their_own_runs(db):
    async with signed_in(db, ANN):
        await db.execute(INSERT_RUN, "ann-run", WORKFLOW)
        assert [row["id"] for row in await db.fetch("select id from runs where kind = 'image_gen'")] == ["ann-run"]
        assert await db.execute("update runs set status = 'cancelled' where id = 'ann-run'") == "UPDATE 0"
        assert await db.execute("delete from runs where id = 'ann-run'") == "DELETE 0"


async def test_adopted_workflows_belong_to_no_user(db):
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with signed_in(db, ANN):
            await db.execute(INSERT_RUN, "x", OLD)
    await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", OLD, ANN)
    async with signed_in(db, ANN):
        assert [row["id"] for row in await db.fetch("select id from runs where kind = 'image_gen'")] == ["image"]
        assert [row["id"] for row in await db.fetch("select id from workflow_nodes")] == ["old"]
        assert [row["run_id"] for row in await db.fetch("select run_id from run_events where kind = 'log'")] == [
            "image"
        ]
    async with signed_in(db, BOB):
        assert not await db.fetch("select from run_events where kind = 'log'")


async def test_forged_workflow_id_shows_no_event(db):
    """A client that may write events of other kinds names somebody's workflow in one; and its own in one of ours."""
    async with signed_in(db, ANN):
        await db.execute(INSERT_RUN, "ann-run", WORKFLOW)
    async with signed_in(db, BOB):
        await db.execute(INSERT_RUN, "bob-run", OTHER)
        await db.execute(
            "insert into run_events (id, run_id, kind, run_kind, workflow_id) values (gen_random_uuid(), 'research', 'log', 'image_gen', $1)",
            WORKFLOW,
        )
        assert await db.execute("update run_events set workflow_id = $1 where run_id <> 'bob-run'", OTHER) == "UPDATE 2"
        assert {row["run_id"] for row in await db.fetch("select run_id from run_events")} == {"research", "bob-run"}
    assert await db.fetchval("select count(*) from run_events where run_id = 'research' and run_kind is not null") == 0
    async with signed_in(db, ANN):
        rows = await db.fetch("select run_id from run_events where run_kind = 'image_gen'")
        assert {row["run_id"] for row in rows} == {"ann-run"}
