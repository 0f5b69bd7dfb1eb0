"""Tables that are large or in use: indexes are built afterwards, and no writer waits behind a migration that waits."""

import asyncio

import asyncpg
import pytest

from daemon import indexes, migrate
from daemon.migrate import migrations
from tests.support.postgres import Cluster, connect, wait_until

Db = asyncpg.Connection

SPECIFICATION = """
create table runs (id varchar primary key, kind varchar not null, subject_id uuid not null, status varchar not null,
  processor varchar, started_at timestamptz default now(), finished_at timestamptz, payload jsonb, metadata jsonb);
create table run_events (id uuid primary key default gen_random_uuid(), run_id varchar references runs (id) on delete cascade,
  ts timestamptz default now(), kind varchar not null, payload jsonb);
create table workflow_nodes (id varchar primary key, workflow_id uuid not null, node_type varchar not null,
  node_data jsonb not null, position jsonb, created_at timestamptz default now(), updated_at timestamptz default now());
insert into runs (id, kind, subject_id, status)
values ('r1', 'research', gen_random_uuid(), 'new'), ('r2', 'image_gen', gen_random_uuid(), 'completed');
"""
INDEXES = """
select c.oid::regclass::text as name, pg_get_indexdef(c.oid) as definition, i.indisvalid as valid
from pg_index i join pg_class c on c.oid = i.indexrelid
where i.indrelid in ('runs'::regclass, 'run_events'::regclass, 'workflow_nodes'::regclass) order by 1
"""
WAITING = "select exists (select from pg_locks where mode = 'AccessExclusiveLock' and not granted)"


@pytest.fixture
async def supabase(postgres: Cluster):
    """Yield the DSN of a Supabase project with the specification's tables."""
    async with postgres.database(template=None) as dsn:
        connection = await connect(dsn)
        await connection.execute(SPECIFICATION)
        await connection.close()
        yield dsn


@pytest.fixture
async def project(supabase: str):
    """Yield a connection to `supabase`."""
    connection = await connect(supabase)
    yield connection
    await connection.close()


@pytest.mark.every_postgres
async def test_large_tables_get_the_same_indexes(postgres: Cluster, supabase: str, project: Db, monkeypatch):
    monkeypatch.setattr(indexes, "LARGE", -1)
    await migrate.migrate(supabase)
    found = await project.fetch(INDEXES)
    async with postgres.database() as dsn:
        other = await connect(dsn)
        assert found == await other.fetch(INDEXES)
        await other.close()
    assert all(row["valid"] for row in found)
    assert await project.fetchval("select count(*) from image_jobs.workflows") == 2


async def test_indexes_of_large_tables_are_not_built_under_the_lock(supabase: str, project: Db, monkeypatch):
    before = {row["name"] for row in await project.fetch(INDEXES)}
    await project.execute("set image_jobs.indexes = 'later'")
    await project.execute(migrations()[0].path.read_text())
    assert {row["name"] for row in await project.fetch(INDEXES)} == before
    await migrate.migrate(supabase)
    assert {row["name"] for row in await project.fetch(INDEXES)} > before


async def test_an_index_that_was_left_invalid_is_built_anew(postgres: Cluster, supabase: str, project: Db):
    await migrate.migrate(supabase)
    await postgres.sudo(
        "update pg_index set indisvalid = false where indexrelid = 'public.runs_node'::regclass",
        await project.fetchval("select current_database()"),
    )
    await migrate.migrate(supabase)
    assert all(row["valid"] for row in await project.fetch(INDEXES))


async def test_an_index_that_cannot_be_built_names_its_reason(supabase: str, project: Db):
    await migrate.migrate(supabase)
    await project.execute("drop index idx_runs_subject; create table idx_runs_subject ()")
    with pytest.raises(migrate.ImageJobsError, match="idx_runs_subject"):
        await migrate.migrate(supabase)


async def test_writers_do_not_queue_behind_a_migration_that_waits(supabase: str, project: Db):
    reader = await connect(supabase)
    async with reader.transaction():
        await reader.execute("select from runs")
        migrating = asyncio.create_task(migrate.migrate(supabase))
        await wait_until(lambda: project.fetchval(WAITING))
        async with asyncio.timeout(2):
            await project.execute("update runs set status = 'newer' where id = 'r1'")
        assert not migrating.done()
    assert (await migrating).applied
    await reader.close()


async def test_events_and_runs_are_locked_in_the_order_of_clients(supabase: str, project: Db):
    writer, migrator = await connect(supabase), await connect(supabase)
    async with writer.transaction():
        # As the insert of an event does, whose foreign key comes second.
        await writer.execute("lock table run_events in row exclusive mode")
        migrating = asyncio.create_task(migrator.execute(migrations()[0].path.read_text()))
        await wait_until(lambda: project.fetchval(WAITING))
        async with asyncio.timeout(0.8):  # a deadlock is noticed after a second
            await writer.execute("update runs set status = 'newer' where id = 'r1'")
    await migrating
    await writer.close()
    await migrator.close()
