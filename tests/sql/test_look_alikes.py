"""A database of an application whose objects have our names: they stay as they are, or we refuse before any change."""

import asyncio
import re
from uuid import uuid4

import asyncpg
import pytest

from tests.support.adoption import differences, lost, migrate
from tests.support.dump import dump
from tests.support.postgres import MIGRATIONS, ROOT, Cluster, bin_dir, connect, signed_in

pytestmark = pytest.mark.every_postgres

ANN = "aaaaaaaa-0000-4000-8000-00000000000a"

# As Supabase's documentation has people do it, with names that were ours, or are those of our objects elsewhere.
APPLICATION = f"""
create schema private;
create table private.workflows (id bigint primary key, title text);
create table private.daemons (id bigint primary key);
create table private.lanes (lane text primary key, open boolean not null);
insert into private.lanes values ('a', true), ('b', false);
create table private.team_members (user_id uuid);
insert into private.team_members values ('{ANN}');
create function private.current_user_id() returns text language sql stable as $$
  select current_setting('request.jwt.claims', true)::jsonb ->> 'sub' $$;
create function private.is_team_member() returns boolean language sql stable security definer as $$
  select exists (select from private.team_members where user_id::text = private.current_user_id()) $$;
create function private.has_base64(value jsonb) returns boolean language sql as $$ select false $$;
create function private.now() returns timestamptz language sql as $$ select timestamptz '2025-11-10' $$;
grant usage on schema private to anon, authenticated;
grant execute on all functions in schema private to authenticated;
grant select on private.lanes to authenticated, anon;

create table public.provider_limits (provider int primary key, monthly int);
create table public.daemons (id int primary key);
create table public.providers (name text primary key);
create view public.queue_stats as select count(*) from public.daemons;
grant all on public.provider_limits, public.daemons, public.providers, public.queue_stats to anon, authenticated;

create table public.boards (id int primary key, lane text not null);
insert into public.boards values (1, 'a'), (2, 'b');
alter table public.boards enable row level security;
grant select on public.boards to authenticated;
create policy "The team sees boards of open lanes" on public.boards for select to authenticated
  using (private.is_team_member() and exists (select from private.lanes l where l.lane = boards.lane and l.open));

create table public.runs (
  id varchar primary key, kind varchar not null, subject_id uuid not null, status varchar not null,
  processor varchar, started_at timestamptz default now(), finished_at timestamptz, payload jsonb);
create table public.run_events (
  id uuid primary key, run_id varchar references public.runs (id), ts timestamptz default now(), kind varchar not null,
  payload jsonb);
create table public.workflow_nodes (
  id varchar primary key, workflow_id uuid not null, node_type varchar not null, node_data jsonb not null,
  position jsonb, created_at timestamptz default now(), updated_at timestamptz default now());
comment on table public.runs is 'All runs.';
comment on column public.runs.payload is 'Whatever it gave.';
comment on column public.workflow_nodes.node_data is 'Of React Flow.';
create function public.audit() returns trigger language plpgsql as $$ begin return new; end $$;
create trigger accept_run before insert on public.runs for each row execute function public.audit();
create trigger guard_1_columns before update on public.runs for each row execute function public.audit();
create trigger runs_updated after update on public.runs for each row execute function public.audit();
create trigger stamp_event before insert on public.run_events for each row execute function public.audit();
create trigger keep_node before insert or update on public.workflow_nodes for each row execute function public.audit();
create trigger nodes_updated after update on public.workflow_nodes for each row execute function public.audit();
"""


@pytest.fixture
async def db(postgres: Cluster):
    """Yield a Supabase project that our migrations have not seen."""
    async with postgres.database(template=None) as dsn:
        connection = await connect(dsn)
        yield connection
        await connection.close()


async def test_look_alikes_are_unchanged_by_a_migration(db) -> None:
    await db.execute(APPLICATION)
    before = await dump(db)
    assert (
        "CREATE TRIGGER accept_run BEFORE INSERT ON public.runs FOR EACH ROW EXECUTE FUNCTION public.audit()" in before
    )
    for _ in range(2):
        await migrate(db)
    assert lost(before, await dump(db)) == []


async def test_policies_with_look_alikes_work_as_before(db) -> None:
    await db.execute(APPLICATION)
    await migrate(db)
    async with signed_in(db, ANN):
        assert [row["id"] for row in await db.fetch("select id from boards")] == [1]
        assert await db.fetchval("select private.now()::date::text") == "2025-11-10"
    async with signed_in(db):
        assert await db.fetch("select id from boards") == []


FUNCTIONS = (
    "start_image_job(jsonb)",
    "start_image_job(text)",
    "cancel_run(character varying)",
    "cancel_run(bigint)",
    "cancel_run(character varying, integer)",
    "requeue_run(character varying)",
    "show_run(character varying)",
    "webhook_openai(json)",
    "webhook_openai(jsonb)",
    "webhook_midjourney(json)",
    "webhook_hmac(json)",
    "receive_webhook(text, jsonb, text)",
    "receive_webhook(text)",
    "share_workflow(uuid)",
    "join_workflow(text)",
    "leave_workflow(uuid)",
    "unshare_workflow(uuid)",
    "can_open_workflow(uuid)",
)

OURS = {
    "table": ("create table public.workflow_members (id int)", "public.workflow_members"),
    "view": ("create view public.image_jobs as select 1 as one", "public.image_jobs"),
    "table for a view": ("create table public.image_models (id int)", "public.image_models"),
    "type": ("create type public.image_jobs as enum ('a')", "public.image_jobs"),
    "domain": ("create domain public.image_models as text", "public.image_models"),
    "index of a view's name": (
        "create table public.another (id int); create index image_jobs on public.another (id)",
        "public.image_jobs",
    ),
    "view for a table": ("create view public.runs as select 1 as one", "public.runs"),
    "type for a table": ("create type public.runs as enum ('a')", "public.runs"),
    "sequence for a table": ("create sequence public.run_events", "public.run_events"),
    "materialized view for a table": (
        "create materialized view public.workflow_nodes as select 1 as one",
        "public.workflow_nodes",
    ),
    "index of another table": (
        "create table public.other (id int); create index runs_idempotency on public.other (id)",
        "public.runs_idempotency",
    ),
    "table for an index": ("create table public.idx_nodes_workflow (id int)", "public.idx_nodes_workflow"),
    "index of an adopted table": (
        APPLICATION + "create index runs_node on public.runs (id)",
        "public.runs_node",
    ),
    "constraint": (
        APPLICATION + "alter table public.runs add constraint runs_payload_holds_no_base64 check (status <> '')",
        "constraint runs_payload_holds_no_base64 on runs",
    ),
    "policy": (
        APPLICATION + """create policy "Nobody else touches nodes" on public.workflow_nodes using (true)""",
        'policy "Nobody else touches nodes" on workflow_nodes',
    ),
    "trigger": (
        APPLICATION
        + """create trigger image_jobs_keep_node before insert on public.run_events
        for each row execute function public.audit()""",
        "trigger image_jobs_keep_node on run_events",
    ),
    **{
        signature: (f"create function public.{signature} returns int language sql as 'select 1'", f"public.{signature}")
        for signature in FUNCTIONS
    },
    "procedure": ("create procedure public.cancel_run(int) language sql as ''", "public.cancel_run(integer)"),
    "aggregate": (
        "create aggregate public.requeue_run(text) (sfunc = textcat, stype = text)",
        "public.requeue_run(text)",
    ),
    "commented function": (
        """create function public.cancel_run(varchar) returns int language sql as 'select 1';
        comment on function public.cancel_run(varchar) is 'Stops a run.'""",
        "public.cancel_run(character varying)",
    ),
}


@pytest.mark.one_postgres
@pytest.mark.parametrize(("made", "name"), OURS.values(), ids=OURS)
async def test_a_foreign_object_of_our_name_is_refused(db, made: str, name: str) -> None:
    await db.execute(made)
    ((sentence, cure),) = await differences(db)
    assert sentence.startswith(f"{name} ")
    assert cure.startswith("Rename it")
    # Renaming, as the cure says, is enough.
    statement = re.search(r"(alter .*? rename (?:constraint \S+ )?to) …", cure)
    assert statement
    await db.execute(f"{statement[1]} its_new_name")
    await migrate(db)


async def test_every_foreign_object_is_refused_in_one_message(db) -> None:
    made = {name: statement for statement, name in OURS.values() if "create table public.runs" not in statement}
    await db.execute(";".join(made.values()))
    found = {re.split(" has the name | is a ", sentence)[0] for sentence, _ in await differences(db)}
    assert found == set(made)


@pytest.mark.parametrize("comment", ["null", "'Jobs that make images.'", "'Image Job Orchestrator: a copy of it.'"])
async def test_a_foreign_schema_of_our_name_is_refused(db, comment: str) -> None:
    await db.execute(f"create schema image_jobs; comment on schema image_jobs is {comment}")
    ((sentence, cure),) = await differences(db)
    assert sentence == "There is a schema image_jobs already, and it is not the Image Job Orchestrator's."
    assert cure == "Rename it: alter schema image_jobs rename to …;"


async def test_a_comment_alone_makes_nothing_ours(db) -> None:
    await db.execute(
        """create function public.cancel_run(varchar) returns int language sql as 'select 1';
        comment on function public.cancel_run(varchar) is 'Image Job Orchestrator: a function like theirs.';
        create table public.workflow_members (id int);
        comment on table public.workflow_members is 'Image Job Orchestrator: a table like theirs.';
        create schema image_jobs; comment on schema image_jobs is 'Image Job Orchestrator: a schema like theirs.';
        create table image_jobs.migrations (version text, name text, hash text)"""
    )
    assert [sentence.split()[0] for sentence, _ in await differences(db)] == [
        "There",
        "public.cancel_run(character",
        "public.workflow_members",
    ]


@pytest.mark.parametrize("single", [False, True], ids=["statement by statement", "in one transaction"])
async def test_psql_goes_on_after_a_refusal_without_a_change(db, single: bool) -> None:
    await db.execute("create schema image_jobs")
    await db.execute("create function image_jobs.now() returns timestamptz language sql as 'select null::timestamptz'")
    before = await dump(db)
    errors = await psql(db, *(["--single-transaction"] if single else []))
    assert "There is a schema image_jobs already" in errors
    assert await dump(db) == before


async def psql(db: "asyncpg.Connection[asyncpg.Record]", *options: str) -> str:
    """Run the migrations with a psql that does not stop at errors, and return what it says."""
    name, port = await db.fetchrow("select current_database(), inet_server_port()") or ("", 0)
    process = await asyncio.create_subprocess_exec(
        bin_dir("pg15") / "psql",
        *("--no-psqlrc", "--quiet", *options),
        *(option for file in sorted(MIGRATIONS.glob("*.sql")) for option in ("--file", file)),
        f"postgresql://postgres@127.0.0.1:{port}/{name}",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    return (await process.communicate())[1].decode()


@pytest.mark.one_postgres
async def test_the_comparison_knows_every_name_of_ours(db) -> None:
    await migrate(db)
    rows = await db.fetch(
        """
        select indexname::text as name from pg_indexes where schemaname = 'public' and indexname !~ '_pkey$'
        union all
        select conname from pg_constraint
        where contype in ('c', 'u', 'x')
            and conrelid in ('public.runs'::regclass, 'public.run_events'::regclass, 'public.workflow_nodes'::regclass)
        union all
        select policyname from pg_policies
        where schemaname = 'realtime' or tablename in ('runs', 'run_events', 'workflow_nodes') and schemaname = 'public'
        union all
        select proname from pg_proc where pronamespace = 'public'::regnamespace
        union all
        select relname from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'v', 'm', 'S', 'f', 'p')
        """
    )
    names = (ROOT / "sql/schema/01_compare_names.sql").read_text()
    assert len(rows) > 50
    assert [row["name"] for row in rows if f'"{row["name"]}"' not in names.replace("'", '"')] == []


@pytest.mark.one_postgres
async def test_the_comparison_knows_every_column_of_adopted_tables(db) -> None:
    await migrate(db)
    rows = await db.fetch(
        """
        select c.relname || ' ' || a.attname || ' ' || format_type(a.atttypid, null) as name
        from pg_attribute a join pg_class c on c.oid = a.attrelid
        where c.oid in ('public.runs'::regclass, 'public.run_events'::regclass, 'public.workflow_nodes'::regclass)
            and a.attnum > 0 and not a.attisdropped
        """
    )
    listed = (ROOT / "sql/schema/02_compare_tables.sql").read_text().split("$columns$")[1]
    known = [line.split()[:3] for line in listed.splitlines() if line.strip()]
    short = {"character varying": "text", "timestamp with time zone": "timestamptz"}
    for name in (row["name"].split(" ", 2) for row in rows):
        family = short.get(name[2], name[2])
        assert [*name[:2], family] in known or [*name[:2], family.removesuffix("tz")] in known


async def test_a_second_run_keeps_what_operators_changed(db) -> None:
    await migrate(db)
    await db.execute(
        """
        delete from image_jobs.provider_limits where provider = 'openai';
        create or replace function image_jobs.my_workflows() returns setof uuid
        language sql volatile security definer set search_path = '' as 'select gen_random_uuid()'
        """
    )
    before = await dump(db)
    await migrate(db)
    assert await dump(db) == before
    assert await db.fetchval("select count(*) from image_jobs.provider_limits where provider = 'openai'") == 0


@pytest.mark.parametrize(
    "grant",
    [
        "grant insert (id, kind, subject_id, status) on runs to {role}; grant insert (id, run_id, kind) on run_events to {role}",
        "grant insert on runs, run_events to public",
    ],
    ids=["on columns", "of everybody"],
)
async def test_a_role_writes_other_kinds_with_the_rights_it_had(db, postgres: Cluster, grant: str) -> None:
    await db.execute(APPLICATION)
    role = "orchestrator_" + uuid4().hex
    await postgres.sudo(f"create role {role}; grant {role} to postgres")
    try:
        await db.execute(grant.format(role=role))
        await migrate(db)
        async with db.transaction():
            await db.execute(f"set local role {role}")
            await db.execute(
                "insert into runs (id, kind, subject_id, status) values ('r/1', 'research', $1, 'odd')", ANN
            )
            await db.execute("insert into run_events (id, run_id, kind) values (gen_random_uuid(), 'r/1', 'thought')")
    finally:
        await db.execute(f"drop owned by {role}")
        await postgres.sudo(f"drop role {role}")


async def test_every_public_object_of_ours_carries_the_marker(db) -> None:
    await migrate(db)
    unmarked = await db.fetch(
        """
        select name from (
            select oid::regclass::text as name, obj_description(oid, 'pg_class') as comment from pg_class
            where relnamespace = 'public'::regnamespace and relkind in ('r', 'v')
                and relname not in ('runs', 'run_events', 'workflow_nodes')
            union all
            select oid::regprocedure::text, obj_description(oid, 'pg_proc') from pg_proc
            where pronamespace = 'public'::regnamespace
        ) ours
        where not starts_with(coalesce(comment, ''), 'Image Job Orchestrator: ')
        """
    )
    assert unmarked == []


async def test_our_triggers_on_shared_tables_have_our_prefix(db) -> None:
    await migrate(db)
    names = await db.fetch(
        """
        select tgname from pg_trigger
        where not tgisinternal
            and tgrelid in ('public.runs'::regclass, 'public.run_events'::regclass, 'public.workflow_nodes'::regclass)
        """
    )
    assert len(names) == 16
    assert [row["tgname"] for row in names if not row["tgname"].startswith("image_jobs_")] == []
