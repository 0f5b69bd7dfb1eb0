"""project.sql makes the roles, schemas and grants of a Supabase database, on all supported versions."""

import asyncio
from uuid import uuid4

import asyncpg
import pytest

from tests.support.postgres import SUPABASE, Cluster, connect, signed_in

pytestmark = pytest.mark.every_postgres

API_ROLES = ("anon", "authenticated", "service_role")


async def test_running_it_again_changes_nothing(postgres: Cluster, database: str):
    name = database.rsplit("/", 1)[1]
    counts = """
        select (select count(*) from pg_class) classes, (select count(*) from pg_proc) functions,
               (select count(*) from pg_roles) roles, (select count(*) from pg_auth_members) members,
               (select count(*) from pg_publication) publications, (select count(*) from pg_trigger) triggers
    """
    connection = await connect(database)
    before = await connection.fetchrow(counts)
    await postgres.sudo(SUPABASE.read_text(), name)
    assert await connection.fetchrow(counts) == before
    await connection.close()


async def test_an_earlier_database_gets_what_sign_in_needs(postgres: Cluster, database: str):
    name = database.rsplit("/", 1)[1]
    await postgres.sudo(
        """drop table auth.refresh_tokens, auth.sessions, auth.identities;
        drop index auth.users_email_partial_key;
        insert into auth.users (id, email, encrypted_password) values (gen_random_uuid(), 'fox@example.com', 'x');
        alter table auth.users drop column confirmed_at, drop column encrypted_password, drop column email_confirmed_at,
          drop column last_sign_in_at, drop column phone, drop column phone_confirmed_at""",
        name,
    )
    await postgres.sudo(SUPABASE.read_text(), name)
    connection = await connect(database)
    row = await connection.fetchrow("select email, encrypted_password, confirmed_at, phone from auth.users")
    assert tuple(row) == ("fox@example.com", None, None, None)
    tables = "auth.sessions, auth.identities, auth.refresh_tokens"
    assert await connection.fetchval(f"select count(*) from {tables}") == 0
    await connection.close()


async def test_several_databases_are_prepared_at_once(postgres: Cluster):
    async with postgres.database() as one, postgres.database() as two, postgres.database() as three:
        names = [dsn.rsplit("/", 1)[1] for dsn in (one, two, three)]
        results = await asyncio.gather(*(postgres.sudo(SUPABASE.read_text(), name) for name in names * 3))
        assert len(results) == 9


async def test_postgres_is_no_superuser_but_bypasses_rls(db):
    assert tuple(await db.fetchrow("select rolsuper, rolbypassrls from pg_roles where rolname = current_user")) == (
        False,
        True,
    )


@pytest.mark.parametrize("role", API_ROLES)
async def test_a_new_table_in_public_is_closed_to_every_api_role(db, role):
    await db.execute("create table public.things (id int)")
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with signed_in(db, role=role):
            await db.fetch("select * from public.things")


async def test_auth_uid_is_set_until_the_transaction_ends(db):
    async with signed_in(db, email="a@example.com") as user:
        assert await db.fetchval("select auth.uid()") == user
        assert await db.fetchval("select auth.role()") == "authenticated"
        assert await db.fetchval("select auth.jwt() ->> 'email'") == "a@example.com"
        assert await db.fetchval("select current_user::text") == "authenticated"
    assert await db.fetchval("select auth.uid()") is None
    assert await db.fetchval("select current_user::text") == "postgres"


async def test_anon_has_a_role_and_no_id(db):
    async with signed_in(db, role="anon") as user:
        assert user is None
        assert await db.fetchval("select auth.uid()") is None
        assert await db.fetchval("select auth.role()") == "anon"


async def test_paths_are_split_as_by_storage(db):
    row = await db.fetchrow(
        "select storage.foldername(path), storage.filename(path), storage.extension(path) from (values ('a/b/c.tar.gz')) v(path)"
    )
    assert tuple(row) == (["a", "b"], "c.tar.gz", "gz")


async def test_objects_need_a_policy_and_are_not_deleted_by_sql(db):
    await db.execute("insert into storage.buckets (id, name) values ('b', 'b')")
    await db.execute("insert into storage.objects (bucket_id, name) values ('b', 'x/y.png')")
    assert await db.fetchval("select path_tokens from storage.objects") == ["x", "y.png"]
    async with signed_in(db):
        assert await db.fetch("select * from storage.objects") == []
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
        async with signed_in(db):
            await db.execute("insert into storage.objects (bucket_id, name) values ('b', 'z.png')")
    with pytest.raises(asyncpg.InsufficientPrivilegeError, match="Use the Storage API"):
        await db.execute("delete from storage.objects")


async def test_a_broadcast_is_a_row_readable_by_policy_alone(db):
    topic = f"workflow:{uuid4()}"
    await db.execute("""select realtime.send('{"n": 1}', 'nodes_changed', $1)""", topic)
    row = await db.fetchrow("select * from realtime.messages where topic = $1", topic)
    assert (row["event"], row["extension"], row["private"]) == ("nodes_changed", "broadcast", True)
    assert row["payload"] == {"n": 1, "id": str(row["id"])}
    async with signed_in(db):
        assert await db.fetch("select * from realtime.messages") == []
    await db.execute("""
        create policy "members hear their topic" on realtime.messages for select to authenticated
        using (topic = (select realtime.topic()))
    """)
    async with signed_in(db):
        await db.execute("select set_config('realtime.topic', $1, true)", topic)
        assert len(await db.fetch("select * from realtime.messages")) == 1


async def test_a_refused_broadcast_is_only_a_warning(db):
    warnings = []
    db.add_log_listener(lambda _, message: warnings.append(message.message))
    async with signed_in(db):
        await db.execute("select realtime.send('{}', 'e', 't')")
        assert await db.fetchval("select 1") == 1
    assert warnings == ['WarnSendingBroadcastMessage: new row violates row-level security policy for table "messages"']


async def test_the_publication_belongs_to_postgres(db):
    await db.execute("create table public.nodes (id int primary key)")
    await db.execute("alter publication supabase_realtime add table public.nodes")
    published = await db.fetch("select tablename from pg_publication_tables where pubname = 'supabase_realtime'")
    assert "nodes" in {row["tablename"] for row in published}
