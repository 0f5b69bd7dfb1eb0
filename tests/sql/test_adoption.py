"""Adoption: foreign shapes of our tables that work as they are, from end to end, with what is not ours unchanged."""

from uuid import UUID

import pytest

from tests.support.adoption import SPECIFICATION, complete_a_run, lost, migrate, project
from tests.support.dump import dump
from tests.support.postgres import Cluster
from tests.support.protocol import Db

pytestmark = pytest.mark.every_postgres

ANN = UUID("aaaaaaaa-0000-4000-8000-00000000000a")
WORKFLOW = UUID("aaaaaaaa-1111-4000-8000-000000000001")

DATA = f"""
insert into runs (id, kind, subject_id, status, processor, payload) values
  ('old', 'image_gen', '{UUID(int=1)}', 'pending', 'openai:dall-e-3', null),
  ('done', 'image_gen', '{UUID(int=1)}', 'completed', 'openai:dall-e-3', '{{"imageUrl": "https://old.io/i.png"}}'),
  ('r/1', 'research', '{UUID(int=2)}', 'halfway', null, '[]');
insert into run_events (id, run_id, kind) values (gen_random_uuid(), 'old', 'log'), (gen_random_uuid(), 'r/1', 'thought');
insert into workflow_nodes (id, workflow_id, node_type, node_data) values ('n', '{UUID(int=1)}', 'image', '{{"label": "x"}}');
"""

AUDIT = """
create function audit() returns trigger language plpgsql as $$ begin return new; end $$;
create table audit_log (n bigint generated always as identity, what text);
create function note() returns trigger language plpgsql security definer as $$
begin insert into public.audit_log (what) values (tg_op || ' ' || tg_table_name); return null; end $$;
"""

S = SPECIFICATION
WORKS = {
    "the specification": S,
    "with data": S + DATA,
    "row level security on, no policies": S
    + "alter table runs enable row level security; alter table run_events enable row level security;"
    "alter table workflow_nodes enable row level security;" + DATA,
    "row level security off, open to all": S
    + DATA
    + "grant all on runs, run_events, workflow_nodes to anon, authenticated;",
    "row level security forced": S + "alter table runs enable row level security, force row level security;",
    "text for varchar": S.replace("VARCHAR", "TEXT") + DATA,
    "varchar that is wide enough": S.replace("VARCHAR", "VARCHAR(64)") + DATA,
    "domains over text": "create domain name_text as text check (value <> '');"
    + S.replace("VARCHAR", "name_text")
    + DATA,
    "timestamps without a zone": S.replace("TIMESTAMPTZ", "TIMESTAMP") + DATA,
    "more columns": S
    + DATA
    + "alter table runs add team uuid, add labels text[]; alter table run_events add source inet;"
    "alter table workflow_nodes add width int, add locked boolean not null;".replace(" not null", ""),
    "more columns that are NOT NULL with a default": S
    + DATA
    + "alter table runs add team text not null default 'a', add tries int not null default 0;"
    "alter table run_events add source text not null default 'app';"
    "alter table workflow_nodes add width int not null default 0;",
    "identity and generated columns": S + DATA + "alter table runs add number bigint generated always as identity, "
    "add provider text generated always as (split_part(processor, ':', 1)) stored;",
    "nodes with a column that only the application knows": S + "alter table workflow_nodes add title text not null;",
    "own columns of our names": S
    + "alter table runs add created_at timestamptz not null default now(), add updated_at timestamp default now(),"
    " add created_by uuid, add metadata jsonb not null default '{}', add priority smallint, add message varchar(2000);"
    + DATA,
    "own columns of our names with defaults": S
    + "alter table runs alter payload set default '{}', add progress int not null default 0,"
    " add priority int not null default 0, add attempt int not null default 0, add max_attempts int default 3,"
    " add created_by uuid default auth.uid();",
    "own default of the id": S + "alter table runs alter id set default 'run-' || gen_random_uuid();",
    "columns that are missing": S + "alter table runs drop started_at, drop finished_at, drop processor, drop payload;"
    "alter table run_events drop ts, drop payload; alter table workflow_nodes drop position, drop created_at, drop updated_at;",
    "own indexes": S + "create index on runs (status, started_at desc); create index mine on runs using gin (payload);"
    "create unique index on run_events (run_id, id); create index on workflow_nodes ((node_data ->> 'label'));",
    "unique indexes about other kinds": S
    + "create unique index on runs (subject_id) where kind = 'research' and status = 'running';",
    "own triggers": S + AUDIT + "create trigger accept_run before insert on runs for each row execute function audit();"
    "create trigger b before update on runs for each row execute function audit();"
    "create trigger c after insert or update or delete on runs for each row execute function note();"
    "create trigger d after insert on run_events for each statement execute function note();"
    "create trigger e before insert or update on workflow_nodes for each row execute function audit();",
    "a trigger that stamps updated_at": S
    + "alter table runs add updated_at timestamptz; create function touch() returns trigger language plpgsql as"
    " $$ begin new.updated_at = now(); return new; end $$;"
    "create trigger z_touch before update on runs for each row execute function touch();"
    "create trigger z_touch before update on workflow_nodes for each row execute function touch();",
    "a trigger that fills in a column of its own": S
    + "alter table runs add team text not null; create function fill() returns trigger language plpgsql as"
    " $$ begin new.team = 'a'; return new; end $$;"
    "create trigger fill before insert on runs for each row execute function fill();",
    "own policies": S
    + DATA
    + "alter table runs enable row level security; create policy mine on runs using (true) with check (true);"
    "create policy narrow on runs as restrictive using (kind <> 'secret');"
    "alter table workflow_nodes enable row level security; create policy mine on workflow_nodes for select using (true);",
    "checks that let our states pass": S
    + DATA
    + "alter table runs add check (status in ('pending', 'running', 'completed', 'failed', 'cancelled', 'halfway')),"
    " add check (kind in ('image_gen', 'research')), add check (payload is null or jsonb_typeof(payload) <> 'string'),"
    " add check (processor like '%:%'), add constraint runs_time check (finished_at >= started_at);"
    "alter table run_events add check (kind in ('progress', 'log', 'error', 'webhook', 'thought'));",
    "no foreign key of events": S + "alter table run_events drop constraint run_events_run_id_fkey;",
    "foreign keys that hold": S
    + "create table kinds (name varchar primary key); insert into kinds values ('image_gen'), ('research');"
    "create table workflows (id uuid primary key);"
    f"insert into workflows values ('{WORKFLOW}');"
    "alter table runs add foreign key (kind) references kinds, add foreign key (subject_id) references workflows;"
    "alter table workflow_nodes add foreign key (workflow_id) references workflows;"
    "create table comments (run_id varchar references runs (id));",
    "foreign keys to a table that is empty yet": S + "create table workflows (id uuid primary key);"
    "alter table runs add foreign key (subject_id) references workflows;",
    "a unique index instead of a primary key": S
    + "alter table run_events drop constraint run_events_pkey; create unique index on run_events (id);",
    "tables in other letters beside them": S + 'create table "Runs" (id int); create table "Run_Events" (id int);',
    "views and functions on top": S
    + "create view all_runs as select * from runs; create materialized view counts as select count(*) from runs;"
    "create function latest() returns setof runs language sql as 'select * from runs';",
    "no tables at all": "select",
    "runs alone": S.partition("CREATE TABLE run_events")[0],
}


@pytest.mark.one_postgres
@pytest.mark.parametrize("before", WORKS.values(), ids=WORKS)
async def test_a_foreign_shape_works_from_end_to_end(postgres: Cluster, before: str) -> None:
    async with project(postgres, before) as db:
        theirs, rows = await dump(db), await adopted_rows(db)
        await migrate(db)
        assert lost(theirs, await dump(db)) == []
        after = await adopted_rows(db)
        assert [{name: row[name] for name in old} for old, row in zip(rows, after, strict=True)] == rows
        assert await db.fetchval("select count(*) from image_jobs.daemons") == 0, "the probe leaves nothing"
        if "references workflows" in before:
            await db.execute("insert into workflows values ($1) on conflict do nothing", WORKFLOW)
            await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", WORKFLOW, ANN)
        await complete_a_run(db, ANN, WORKFLOW)


async def adopted_rows(db: Db) -> list[dict[str, object]]:
    """Fetch the rows of the tables that are adopted, as far as they are there."""
    found: list[dict[str, object]] = []
    for table in ("runs", "run_events", "workflow_nodes"):
        if await db.fetchval("select to_regclass('public.' || $1) is not null", table):
            found += [dict(row) for row in await db.fetch(f"select * from {table} order by id")]
    return found
