"""Adoption: what cannot work is refused before anything is changed, with a sentence and a cure for each difference."""

import re

import asyncpg
import pytest

from tests.support.adoption import SPECIFICATION, differences, migrate, project
from tests.support.postgres import Cluster

pytestmark = pytest.mark.every_postgres

S = SPECIFICATION
PARTITIONED = S.replace(
    "payload JSONB\n);\nCREATE INDEX idx_runs_subject",
    "payload JSONB\n) PARTITION BY HASH (id);\nCREATE INDEX idx_runs_subject",
)

TYPES = {
    "uuid ids": (
        S.replace("id VARCHAR PRIMARY KEY,\n  kind", "id UUID PRIMARY KEY,\n  kind").replace(
            "run_id VARCHAR", "run_id UUID"
        ),
        [
            "public.run_events.run_id is of type uuid, and has to be text.",
            "public.runs.id is of type uuid, and has to be text.",
        ],
    ),
    "a status that is an enum": (
        "create type run_status as enum ('pending', 'running', 'completed', 'failed');"
        + S.replace("status VARCHAR", "status run_status"),
        ["public.runs.status is of type run_status, and has to be text."],
    ),
    "json instead of jsonb": (
        S.replace("JSONB", "JSON"),
        [
            "public.run_events.payload is of type json, and has to be jsonb.",
            "public.runs.payload is of type json, and has to be jsonb.",
            'public.workflow_nodes."position" is of type json, and has to be jsonb.',
            "public.workflow_nodes.node_data is of type json, and has to be jsonb.",
        ],
    ),
    "a subject that is a text": (
        S.replace("subject_id UUID", "subject_id TEXT"),
        ["public.runs.subject_id is of type text, and has to be uuid."],
    ),
    "numbered events": (
        S.replace("id UUID PRIMARY KEY,\n  run_id", "id BIGSERIAL PRIMARY KEY,\n  run_id"),
        ["public.run_events.id is of type bigint, and has to be uuid."],
    ),
    "a priority that is a text": (
        S + "alter table runs add priority text default 'high';",
        ["public.runs.priority is of type text, and has to be integer."],
    ),
    "days instead of times": (
        S.replace("finished_at TIMESTAMPTZ", "finished_at DATE"),
        ["public.runs.finished_at is of type date, and has to be timestamptz."],
    ),
    "texts of fixed length": (
        S.replace("kind VARCHAR", "kind CHAR(20)"),
        [
            "public.run_events.kind is of type character(20), and has to be text.",
            "public.runs.kind is of type character(20), and has to be text.",
        ],
    ),
    "a status that is too short": (
        S.replace("status VARCHAR", "status VARCHAR(8)"),
        ["public.runs.status is of type character varying(8), and has to take 9 characters."],
    ),
    "a domain over numbers": (
        "create domain amount as integer;" + S.replace("processor VARCHAR", "processor amount"),
        ["public.runs.processor is of type amount, and has to be text."],
    ),
    "a generated status": (
        S.replace("status VARCHAR NOT NULL", "status VARCHAR GENERATED ALWAYS AS (kind) STORED"),
        ["public.runs.status is generated from other columns, and has to take what is written."],
    ),
    "a column of ours that numbers itself": (
        S + "alter table run_events add seq bigint generated always as identity;",
        ["public.run_events.seq numbers itself, and has to take what is written."],
    ),
    "a payload that is NOT NULL": (
        S + "alter table runs alter payload set default '{}', alter payload set not null;",
        ["public.runs.payload is NOT NULL, and is null in some states of an image run."],
    ),
    "a time of a domain that is NOT NULL": (
        "create domain moment as timestamptz not null;" + S.replace("finished_at TIMESTAMPTZ", "finished_at moment"),
        [
            "public.runs.finished_at is of the domain moment, which is NOT NULL, and is null in some states of an image run."
        ],
    ),
    "more columns that are NOT NULL": (
        S + "alter table runs add team uuid not null; alter table run_events add source text not null;",
        [
            "public.run_events.source is NOT NULL without a default, so no run of ours can be inserted.",
            "public.runs.team is NOT NULL without a default, so no run of ours can be inserted.",
        ],
    ),
    "names in camel case": (
        S.replace("subject_id UUID", '"subjectId" UUID').replace("runs(subject_id", 'runs("subjectId"'),
        ['public.runs has no column subject_id, though it has "subjectId".'],
    ),
    "another application's runs": (
        "create table runs (id text primary key, distance numeric, runner text);",
        [
            "public.runs has no column kind.",
            "public.runs has no column status.",
            "public.runs has no column subject_id.",
        ],
    ),
}

TABLES = {
    "views": (
        """create view runs as select 1 as id; create materialized view run_events as select 1 as id;
        create sequence workflow_nodes;""",
        [
            "public.run_events is a materialized view, and has to be an ordinary table.",
            "public.runs is a view, and has to be an ordinary table.",
            "public.workflow_nodes is a sequence, and has to be an ordinary table.",
        ],
    ),
    "a partitioned table": (PARTITIONED, ["public.runs is partitioned, and has to be an ordinary table."]),
    "a partition": (
        """create table all_runs (id varchar, kind varchar, subject_id uuid, status varchar) partition by list (kind);
        create table runs partition of all_runs (primary key (id)) default;""",
        ["public.runs is part of a hierarchy of tables, by inheritance or as a partition."],
    ),
    "a table with heirs": (
        S + "create table special_runs (extra text) inherits (runs);",
        ["public.runs is part of a hierarchy of tables, by inheritance or as a partition."],
    ),
    "an unlogged table": (
        S.replace("CREATE TABLE workflow_nodes", "CREATE UNLOGGED TABLE workflow_nodes"),
        ["public.workflow_nodes is unlogged: a crash of the server empties it."],
    ),
    "no primary keys": (
        S.replace(" PRIMARY KEY", "").replace(" REFERENCES runs(id)", ""),
        [
            "Nothing makes the ids of public.run_events unique.",
            "Nothing makes the ids of public.runs unique.",
            "Nothing makes the ids of public.workflow_nodes unique.",
        ],
    ),
    "a key of two columns": (
        S.replace("id UUID PRIMARY KEY", "id UUID") + "alter table run_events add primary key (run_id, id);",
        ["Nothing makes the ids of public.run_events unique."],
    ),
    "nodes with a unique index alone": (
        S
        + "alter table workflow_nodes drop constraint workflow_nodes_pkey; create unique index on workflow_nodes (id);",
        ["public.workflow_nodes has no primary key, so Realtime could not publish its changes."],
    ),
    "nodes without a replica identity": (
        S + "alter table workflow_nodes replica identity nothing;",
        [
            "public.workflow_nodes has no replica identity, so none of its rows could be changed once Realtime publishes them."
        ],
    ),
    "keys that are deferrable": (
        S.replace("id UUID PRIMARY KEY,\n  run_id", "id UUID PRIMARY KEY DEFERRABLE INITIALLY DEFERRED,\n  run_id"),
        [
            "Nothing makes the ids of public.run_events unique before the end of a transaction: run_events_pkey is deferrable."
        ],
    ),
    "a rule": (
        S + "create rule quiet as on update to runs where old.status = 'completed' do instead nothing;",
        ["The rule quiet rewrites what is written to public.runs."],
    ),
}

RULES = {
    "the specification's four statuses": (
        S + "alter table runs add check (status in ('pending', 'running', 'completed', 'failed'));",
        ["The check runs_status_check of public.runs refuses image runs that are cancelled."],
    ),
    "a check of kinds": (
        S + "alter table runs add check (kind = 'research');",
        ["The check runs_kind_check of public.runs refuses image runs that are as they have to be."],
    ),
    "a check of the payload": (
        S + "alter table runs add constraint answers check (status <> 'completed' or payload ? 'answer');",
        ["The check answers of public.runs refuses image runs that are completed."],
    ),
    "a check of the processor": (
        S + "alter table runs add check (processor in ('gpt', 'claude'));",
        ["The check runs_processor_check of public.runs refuses image runs that are as they have to be."],
    ),
    "a check of a column of theirs": (
        S + "alter table runs add team text, add check (team is not null);",
        ["The check runs_team_check of public.runs refuses image runs that are as they have to be."],
    ),
    "a check of events": (
        S + "alter table run_events add check (kind in ('log', 'thought'));",
        [
            "The check run_events_kind_check of public.run_events refuses image runs' events that are progress, error, webhook."
        ],
    ),
    "one run for each subject": (
        S + "create unique index one_run on runs (subject_id, kind);",
        [
            "The unique index one_run of public.runs allows one row for each (subject_id, kind), and a workflow has many."
        ],
    ),
    "one running run for each subject": (
        S + "create unique index one_run on runs (subject_id) where status = 'running';",
        ["The unique index one_run of public.runs allows one row for each (subject_id), and a workflow has many."],
    ),
    "one event of a kind": (
        S + "alter table run_events add constraint once unique (run_id, kind);",
        ["The unique index once of public.run_events allows one row for each (run_id, kind), and a workflow has many."],
    ),
    "foreign keys that lack us": (
        S + "create table kinds (name varchar primary key); create table states (name varchar primary key);"
        "insert into kinds values ('research'); insert into states values ('pending'), ('running'), ('failed');"
        "create table processors (name varchar primary key);"
        "alter table runs add foreign key (kind) references kinds, add foreign key (status) references states,"
        " add foreign key (processor) references processors;",
        [
            "The foreign key runs_kind_fkey of public.runs looks in kinds, which has no image_gen.",
            "The foreign key runs_processor_fkey of public.runs looks in processors, which has no provider:model.",
            "The foreign key runs_status_fkey of public.runs looks in states, which has no completed, cancelled.",
        ],
    ),
    "events of something else": (
        S
        + "create table executions (id varchar primary key); alter table run_events drop constraint run_events_run_id_fkey,"
        " add constraint of_executions foreign key (run_id) references executions;",
        ["The foreign key of_executions of public.run_events wants runs to stand in executions."],
    ),
}

FUNCTION = "create function {name}() returns trigger language plpgsql as $$ begin {body} end $$;"
TRIGGERS = {
    "a trigger that changes the status": (
        S
        + FUNCTION.format(name="reset", body="new.status := 'pending'; return new;")
        + "create trigger z_reset before update on runs for each row execute function reset();",
        ["A trigger on public.runs changes status of image runs that are running (z_reset)."],
    ),
    "a trigger that swallows rows": (
        S
        + FUNCTION.format(name="swallow", body="return null;")
        + "create trigger swallow before insert on runs for each row execute function swallow();",
        ["A trigger on public.runs changes the row of image runs that are pending (swallow)."],
    ),
    "a trigger that raises": (
        S
        + FUNCTION.format(name="forbid", body="raise exception 'No images here.';")
        + "create trigger no_images before insert on runs for each row execute function forbid();",
        ["The trigger no_images on public.runs refuses image runs that are pending: No images here."],
    ),
    "triggers that raise at some states": (
        S
        + FUNCTION.format(name="forbid", body="raise exception 'No % here.', new.status;")
        + "create trigger no_end after update on runs for each row when (new.status in ('completed', 'cancelled'))"
        " execute function forbid();",
        [
            "The trigger no_end on public.runs refuses image runs that are completed: No completed here.",
            "The trigger no_end on public.runs refuses image runs that are cancelled: No cancelled here.",
        ],
    ),
    "a trigger that changes events": (
        S
        + FUNCTION.format(name="strip", body="new.payload := null; return new;")
        + "create trigger strip before insert on run_events for each row execute function strip();",
        ["A trigger on public.run_events changes payload of image runs' events that are log (strip)."],
    ),
    "a trigger, a check and a type": (
        S.replace("node_data JSONB", "node_data JSON")
        + "alter table runs add check (status <> 'cancelled');"
        + FUNCTION.format(name="forbid", body="raise exception 'No images here.';")
        + "create trigger no_images before update on runs for each row execute function forbid();",
        [
            "public.workflow_nodes.node_data is of type json, and has to be jsonb.",
            "The check runs_status_check of public.runs refuses image runs that are cancelled.",
            "The trigger no_images on public.runs refuses image runs that are running: No images here.",
        ],
    ),
}

PROBED = {
    "a trigger that knows one of our columns": (
        S
        + "alter table runs add claimed_by uuid;"
        + FUNCTION.format(name="free", body="new.claimed_by := null; return new;")
        + "create trigger z_free before update on runs for each row execute function free();",
        ["An image run cannot be claimed: on public.runs a trigger changes claimed_by (z_free)."],
    ),
    "a trigger that raises at one of our columns": (
        S
        + "alter table runs add claimed_by uuid;"
        + FUNCTION.format(name="forbid", body="raise exception 'Nobody claims this.';")
        + "create trigger unclaimed before update on runs for each row when (new.claimed_by is not null) execute function forbid();",
        ["An image run cannot be claimed: the trigger unclaimed says: Nobody claims this."],
    ),
    "a trigger that waits for the commit": (
        S
        + FUNCTION.format(name="forbid", body="raise exception 'No % here.', new.status;")
        + "create constraint trigger no_end after update on runs deferrable initially deferred for each row"
        " when (new.status = 'completed') execute function forbid();",
        ["An image run cannot be completed: the trigger no_end says: No completed here."],
    ),
    "an exclusion constraint": (
        S + "alter table runs add constraint apart exclude using hash (subject_id with =);",
        [
            'An image run cannot be inserted: apart is in the way (conflicting key value violates exclusion constraint "apart").'
        ],
    ),
    "a column that a trigger does not fill in": (
        S + FUNCTION.format(name="fill", body="return new;") + "alter table runs add team text not null;"
        "create trigger fill before insert on runs for each row execute function fill();",
        [
            'An image run cannot be inserted: null value in column "team" of relation "runs" violates not-null constraint'
        ],
    ),
}

REFUSED = TYPES | TABLES | RULES | TRIGGERS | PROBED


# The cures of these need more than their one statement, or a decision of the application's.
NEED_MORE = {
    *("uuid ids", "numbered events", "names in camel case", "another application's runs", "a priority that is a text"),
    *("views", "a partitioned table", "a partition", "a table with heirs", "a key of two columns", "a rule"),
    *("a check of a column of theirs", "one run for each subject", "one running run for each subject"),
    *("one event of a kind", "a domain over numbers", *TRIGGERS, *PROBED),
}


@pytest.mark.one_postgres
@pytest.mark.parametrize("name", REFUSED)
async def test_a_shape_is_refused_without_a_change_until_it_is_cured(postgres: Cluster, name: str) -> None:
    before, sentences = REFUSED[name]
    async with project(postgres, before) as db:
        found = await differences(db)
        assert [sentence for sentence, _ in found] == sentences
        assert all(cure for _, cure in found)
        if name not in NEED_MORE:
            for _, cure in found:
                statement = re.search(r"((?:alter|drop) [^;]*).*?;", cure.rpartition("or: ")[2])
                assert statement
                await db.execute(statement[1])
            await migrate(db)


async def test_all_differences_stand_in_one_message(postgres: Cluster) -> None:
    shapes = (
        S
        + "alter table runs add team uuid not null, add check (status in ('pending', 'running', 'completed', 'failed'));"
        "create table workflow_members (id int); create schema image_jobs;"
        "create function cancel_run(uuid) returns int language sql as 'select 1';"
    )
    async with project(postgres, shapes.replace("JSONB", "JSON")) as db:
        found = [sentence for sentence, _ in await differences(db)]
        with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError) as error:
            await migrate(db)
    assert len(found) == 9
    assert error.value.args[0] == "9 things in this database are in the way of the Image Job Orchestrator."
