"""The migrations: on a new database, on one that has the tables already, a second time, and by psql alone."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.support.dump import dump
from tests.support.postgres import MIGRATIONS, ROOT, Cluster, connect, signed_in
from tests.support.protocol import IMAGE, Db, move_clock, new_daemon, node_data, run_in
from tests.support.psql import psql
from tests.support.runs import event_names, insert_run, run_row

pytestmark = pytest.mark.every_postgres

SCHEMA = ROOT / "sql/schema"
USED = UUID("aaaaaaaa-0000-4000-8000-00000000000f")
FILE = "data:image/png;base64," + "iVBORw0KGgo" * 500

# Word for word the tables that the specification has, from before there was a daemon.
SPECIFICATION = """
CREATE TABLE runs (
  id VARCHAR PRIMARY KEY,
  kind VARCHAR NOT NULL,
  subject_id UUID NOT NULL,
  status VARCHAR NOT NULL,
  processor VARCHAR,
  started_at TIMESTAMPTZ DEFAULT NOW(),
  finished_at TIMESTAMPTZ,
  payload JSONB
);
CREATE INDEX idx_runs_subject ON runs(subject_id, kind);
CREATE INDEX idx_runs_status ON runs(status);
CREATE TABLE run_events (
  id UUID PRIMARY KEY,
  run_id VARCHAR REFERENCES runs(id),
  ts TIMESTAMPTZ DEFAULT NOW(),
  kind VARCHAR NOT NULL,
  payload JSONB
);
CREATE INDEX idx_events_run ON run_events(run_id, ts);
CREATE TABLE workflow_nodes (
  id VARCHAR PRIMARY KEY,
  workflow_id UUID NOT NULL,
  node_type VARCHAR NOT NULL,
  node_data JSONB NOT NULL,
  position JSONB,
  created_at TIMESTAMPTZ DEFAULT NOW(),
  updated_at TIMESTAMPTZ DEFAULT NOW()
);
CREATE INDEX idx_nodes_workflow ON workflow_nodes(workflow_id);
"""

OLD_ROWS = f"""
insert into runs (id, kind, subject_id, status, processor, started_at, finished_at, payload) values
  ('pending', 'image_gen', '{USED}', 'pending', 'demo:painter', '2025-11-10', null, null),
  ('running', 'image_gen', '{USED}', 'running', 'openai:dall-e-3', '2025-11-10', null, null),
  ('completed', 'image_gen', '{USED}', 'completed', 'openai:dall-e-3', '2025-11-10', '2025-11-10', '{{"imageUrl": "{FILE}"}}'),
  ('failed', 'image_gen', '{USED}', 'failed', null, null, null, '{{"error": "Once."}}'),
  ('odd', 'image_gen', '{USED}', 'whatever', 'dall-e', null, null, '[]'),
  ('research', 'research', '{USED}', 'pending', null, '2025-11-10', null, '{{"file": "{FILE}"}}'),
  ('a research/path', 'research', '{USED}', 'halfway', 'x', null, '2025-11-10', null);
insert into run_events (id, run_id, kind, payload) values
  (gen_random_uuid(), 'pending', 'log', '{{"file": "{FILE}"}}'),
  (gen_random_uuid(), 'research', 'thought', '{{"file": "{FILE}"}}'),
  (gen_random_uuid(), null, 'nothing', null);
insert into workflow_nodes (id, workflow_id, node_type, node_data, created_at) values
  ('node', '{USED}', 'image_generation', '{{"label": "mine", "status": "completed", "imageUrl": "https://old.io/i.png"}}', '2025-11-10'),
  ('file', '{USED}', 'image_generation', '{{"imageUrl": "{FILE}"}}', '2025-11-10');
"""


def files(directory: Path = MIGRATIONS) -> list[str]:
    """Read the files, in order."""
    return [file.read_text() for file in sorted(directory.glob("*.sql"))]


async def run_files(connection: Db, directory: Path = MIGRATIONS) -> None:
    """Run the files in order, each in a transaction of its own."""
    for sql in files(directory):
        async with connection.transaction():
            await connection.execute(sql)


@asynccontextmanager
async def new_project(postgres: Cluster, before: str = "select") -> AsyncIterator[Db]:
    """Yield a Supabase project that our migrations have not seen."""
    async with postgres.database(template=None) as dsn:
        connection = await connect(dsn)
        await connection.execute(before)
        yield connection
        await connection.close()


async def test_the_migrations_make_the_schema(postgres: Cluster) -> None:
    async with new_project(postgres) as migrated, new_project(postgres) as read:
        await run_files(migrated)
        await run_files(read, SCHEMA)
        assert await dump(migrated) == await dump(read)


@pytest.mark.parametrize("single", [False, True], ids=["statement by statement", "in one transaction"])
async def test_psql_alone_makes_the_schema_twice(postgres: Cluster, single: bool) -> None:
    async with new_project(postgres) as by_psql, new_project(postgres) as migrated:
        await run_files(migrated)
        for _ in range(2):
            for file in sorted(MIGRATIONS.glob("*.sql")):
                await psql(by_psql, file, *(["--single-transaction"] if single else []))
        assert await dump(by_psql) == await dump(migrated)


@pytest.mark.parametrize("before", ["select", SPECIFICATION + OLD_ROWS], ids=["a new database", "an old database"])
async def test_migrating_twice_changes_nothing(postgres: Cluster, before: str) -> None:
    async with new_project(postgres, before) as db:
        await run_files(db)
        await db.execute(
            "update image_jobs.provider_limits set per_minute = 7, paused = true where provider = 'openai'"
        )
        await db.execute("update storage.buckets set public = false, file_size_limit = 1")
        run = await insert_run(db, nodeId="node", workflow=USED)
        member = uuid4()
        await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", USED, member)
        once = await dump(db), await everything(db)
        await run_files(db)
        assert (await dump(db), await everything(db)) == once
        assert (await run_row(db, run))["status"] == "pending"


async def everything(db: Db) -> dict[str, list[str]]:
    """Fetch every row of every table."""
    tables = await db.fetch(
        "select format('%I.%I', schemaname, tablename) as name from pg_tables "
        "where schemaname in ('public', 'image_jobs', 'storage') order by 1"
    )
    return {
        table["name"]: [
            row["row"] for row in await db.fetch(f"select t::text as row from {table['name']} t order by 1")
        ]
        for table in tables
    }


# a database that has the tables already


@pytest.fixture
async def old(postgres: Cluster) -> AsyncIterator[Db]:
    """Yield a database of the specification, with rows, migrated."""
    async with new_project(postgres, SPECIFICATION + OLD_ROWS) as connection:
        await run_files(connection)
        yield connection


async def test_adopted_rows_are_unchanged(postgres: Cluster) -> None:
    columns = {
        "runs": "id, kind, subject_id, status, processor, started_at, finished_at, payload",
        "run_events": "id, run_id, ts, kind, payload",
        "workflow_nodes": "id, workflow_id, node_type, node_data, position, created_at, updated_at",
    }
    async with new_project(postgres, SPECIFICATION + OLD_ROWS) as db:
        before = {table: await db.fetch(f"select {names} from {table} order by id") for table, names in columns.items()}
        await run_files(db)
        after = {table: await db.fetch(f"select {names} from {table} order by id") for table, names in columns.items()}
    assert after == before


async def test_adopted_runs_are_never_claimed_until_requeued(old: Db) -> None:
    daemon = await new_daemon(old, "demo", "openai")
    await move_clock(old, "1 year")
    assert await daemon.claim(100) == []
    assert await daemon.take_over() == 0
    await old.execute("update runs set status = 'pending' where id = 'pending'")
    claimed = await daemon.claim_one()
    assert (claimed["id"], claimed["attempt"], claimed["metadata"]) == ("pending", 1, {})
    assert await daemon.complete(claimed) == "settled"
    row = await run_row(old, "pending")
    payload = {"imageUrl": IMAGE, "cost": None, "timings": row["payload"]["timings"]}
    assert (row["payload"], row["created_at"].year) == (payload, 2025)


@pytest.mark.parametrize("run", ["pending", "running", "completed", "failed", "odd"])
async def test_every_adopted_run_can_be_requeued(old: Db, run: str) -> None:
    before = await run_row(old, run)
    await old.execute("update runs set status = 'pending' where id = $1", run)
    row = await run_row(old, run)
    assert (row["status"], row["attempt"], row["max_attempts"], row["priority"]) == ("pending", 0, 3, 0)
    assert (row["payload"], row["finished_at"]) == (None, None)
    assert row["processor"] == before["processor"]
    assert row["created_at"] is not None
    assert "requeued" in await event_names(old, run)
    daemon = await new_daemon(old, "demo", "openai")
    assert (await daemon.claim_one())["id"] == run


@pytest.mark.parametrize("run", ["pending", "running"])
async def test_an_unfinished_adopted_run_can_be_cancelled(old: Db, run: str) -> None:
    record = await old.fetchval("select cancel_run($1)", run)
    assert record["status"] == "cancelled"
    assert (await run_row(old, run))["finished_at"] is not None
    assert "cancelled" in await event_names(old, run)


async def test_adopted_files_are_violations_until_removed(old: Db) -> None:
    found = {tuple(row) for row in await old.fetch("select table_name, id from image_jobs.storage_violations")}
    assert ("runs", "completed") in found
    assert ("workflow_nodes", "file") in found
    assert len(found) == 3, "and the event"
    await old.execute("update runs set status = 'pending' where id = 'completed'")
    assert await old.fetchval("select count(*) from image_jobs.storage_violations where table_name = 'runs'") == 0


async def test_an_adopted_node_keeps_its_image_until_a_new_one(old: Db) -> None:
    daemon = await new_daemon(old)
    await insert_run(old, nodeId="node", workflow=USED)
    shown = await node_data(old, "node")
    assert (shown["label"], shown["status"], shown["imageUrl"]) == ("mine", "pending", "https://old.io/i.png")
    await daemon.complete(await daemon.claim_one())
    assert (await node_data(old, "node"))["imageUrl"] == IMAGE


async def test_an_adopted_node_with_a_file_blocks_nothing(old: Db) -> None:
    daemon = await new_daemon(old)
    run = await insert_run(old, nodeId="file", workflow=USED)
    assert await daemon.complete(await daemon.claim_one()) == "settled"
    assert "warning" in await event_names(old, run)


async def test_adopted_tables_delete_our_runs_with_their_events(old: Db) -> None:
    daemon = await new_daemon(old)
    run = await run_in(old, daemon, "completed")
    await old.execute("delete from runs where id in ($1, 'pending')", run)
    assert await old.fetchval("select count(*) from run_events where run_id in ($1, 'pending')", run) == 0
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await old.execute("delete from runs where id = 'research'")


async def test_adopted_workflows_have_no_member(old: Db) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with signed_in(old):
            await insert_node_of(old, USED)
    async with signed_in(old):
        await insert_node_of(old, uuid4())


async def insert_node_of(db: Db, workflow: UUID) -> None:
    await db.execute(
        "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ('new', $1, 'image', '{}')", workflow
    )


@pytest.mark.usefixtures("database")  # makes the cluster's roles
@pytest.mark.parametrize("policies", [False, True], ids=["without policies", "with its own policies"])
async def test_another_orchestrators_role_works_as_before(postgres: Cluster, policies: bool) -> None:
    role = "orchestrator_" + uuid4().hex
    await postgres.sudo(f"create role {role}; grant {role} to postgres")
    grants = f"grant select, insert, update, delete on runs, run_events to {role};"
    own = "".join(
        f"alter table {table} enable row level security; create policy mine on {table} to {role} using (true);"
        for table in ("runs", "run_events")
    )
    try:
        async with new_project(postgres, SPECIFICATION + grants + (own if policies else "")) as db:
            await run_files(db)
            await run_files(db)
            async with db.transaction():
                await db.execute(f"set local role {role}")
                await write_research(db)
    finally:
        await postgres.sudo(f"drop role {role}")


async def write_research(db: Db) -> None:
    """Do what the other orchestrator does with its rows, files and all."""
    await db.execute(
        "insert into runs (id, kind, subject_id, status, payload) values ('r/1', 'research', gen_random_uuid(), 'odd', $1)",
        {"file": FILE},
    )
    await db.execute("update runs set status = 'odder', payload = $1, finished_at = now() where id = 'r/1'", [FILE])
    await db.execute(
        "insert into run_events (id, run_id, kind, payload) values (gen_random_uuid(), 'r/1', 'note', $1)", FILE
    )
    await db.execute("update run_events set kind = 'thought'")
    row = await db.fetchrow("select r.status, e.kind from runs r join run_events e on e.run_id = r.id")
    assert tuple(row) == ("odder", "thought")
    await db.execute("delete from run_events")
    await db.execute("delete from runs")


# a database that is no Supabase project


@pytest.mark.usefixtures("database")  # makes the cluster's roles
async def test_a_plain_postgres_is_enough(postgres: Cluster) -> None:
    """No schema and no role of Supabase: the roles are out of sight for the length of one transaction."""
    name = "plain_" + uuid4().hex
    await postgres.sudo(f"create database {name} template template0")
    try:
        db = await connect(postgres.server.dsn(name))
        transaction = db.transaction()
        await transaction.start()
        for role in ("anon", "authenticated", "service_role"):
            await db.execute(f"alter role {role} rename to {role}_{name[6:14]}")
        for _ in range(2):
            for sql in files():
                await db.execute(sql)
        daemon = await new_daemon(db)
        run = await run_in(db, daemon, "completed")
        record: dict[str, Any] = await db.fetchval("select requeue_run($1)", run)
        assert record["status"] == "pending"
        roles = await db.fetch(
            "select rolname, rolcanlogin, rolsuper from pg_roles where rolname ~ '^(anon|authenticated)$'"
        )
        assert {tuple(row) for row in roles} == {("anon", False, False), ("authenticated", False, False)}
        await transaction.rollback()
        await db.close()
    finally:
        await postgres.sudo(f"drop database {name} with (force)")
