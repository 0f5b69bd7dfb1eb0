"""Foreign databases for the tests of adoption: the specification's tables, and an image run from end to end."""

import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from tests.support.postgres import MIGRATIONS, Cluster, connect, signed_in
from tests.support.protocol import Daemon, Db, new_daemon
from tests.support.runs import run_row

# Word for word the tables that the specification has.
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

ADOPTED = ("runs", "run_events", "workflow_nodes")
"""Adoption adds columns, defaults, row level security and grants to these, and changes nothing else."""

IMAGE = "https://example.supabase.co/storage/v1/object/public/images/w/r.png"


@asynccontextmanager
async def project(postgres: Cluster, before: str) -> AsyncIterator[Db]:
    """Yield a Supabase project that has what `before` makes, and that our migrations have not seen."""
    async with postgres.database(template=None) as dsn:
        connection = await connect(dsn)
        await connection.execute(before)
        yield connection
        await connection.close()


async def migrate(db: Db) -> None:
    """Run the migrations as any tool does."""
    for file in sorted(MIGRATIONS.glob("*.sql")):
        await db.execute(file.read_text())


async def everything(db: Db) -> dict[str, list[str]]:
    """Fetch every row of every table."""
    tables = await db.fetch(
        "select format('%I.%I', schemaname, tablename) as name from pg_tables "
        "where schemaname in ('public', 'image_jobs', 'storage', 'realtime') order by 1"
    )
    return {
        table["name"]: [
            row["row"] for row in await db.fetch(f"select t::text as row from {table['name']} t order by 1")
        ]
        for table in tables
    }


async def catalogue(db: Db) -> str:
    """Hash what Postgres knows of every object: quicker than a dump, and nothing that was rolled back shows in it."""
    return await db.fetchval(
        """select md5(string_agg(kind || each, ';' order by kind, each)) from (
            select 'n' as kind, n::text as each from pg_namespace n where nspname !~ '^pg_(toast_)?temp'
            union all
            select 'c', row(oid, relname, relnamespace, relowner, relkind, relacl, relrowsecurity, relforcerowsecurity, reloptions)::text
            from pg_class
            union all select 'a', row(attrelid, attname, atttypid, attnum, attnotnull, atthasdef, attacl)::text from pg_attribute
            union all select 'd', d::text from pg_attrdef d
            union all select 'k', k::text from pg_constraint k
            union all select 't', t::text from pg_trigger t
            union all select 'l', l::text from pg_policy l
            union all select 'p', p::text from pg_proc p
            union all select 'y', y::text from pg_type y
            union all select 'm', m::text from pg_description m
            union all select 'r', r::text from pg_default_acl r
            union all select 'u', u::text from pg_publication_rel u
        ) everything"""
    )


async def differences(db: Db) -> list[tuple[str, str]]:
    """Run the migrations, which have to be refused without a change; return each sentence with its cure."""
    before = await catalogue(db)
    try:
        await migrate(db)
    except asyncpg.ObjectNotInPrerequisiteStateError as error:
        assert error.detail
        assert error.hint == "Nothing was changed. Do what the lines above say, then migrate again."
        lines = str(error.detail).splitlines()
        found = [(lines[n].removeprefix("- "), lines[n + 1].strip()) for n in range(0, len(lines), 2)]
        assert len(found) > 1 or error.args[0] == found[0][0]
        assert await catalogue(db) == before
        return found
    return []


def statements(text: str) -> Counter[str]:
    """Count the statements of a dump; of tables that are adopted, without their columns."""
    found: Counter[str] = Counter()
    for statement in text.split(";\n"):
        lines = [line for line in statement.splitlines() if line and not line.startswith("--")]
        if any(lines[:1] == [f"CREATE TABLE public.{table} ("] for table in ADOPTED):
            # Their columns and constraints stay, each as it was.
            found.update(f"{lines[0]} {line.rstrip(',')}" for line in lines[1:])
            lines = lines[:1]
        found["\n".join(lines)] += 1
    return found


def lost(before: str, after: str) -> list[str]:
    """Return what of one dump is missing in another, but for the grants of adopted tables. A column may get a default."""
    there = statements(after)
    bare = {_DEFAULT.sub(r"\2", line) for line in there}
    return sorted(
        line
        for line in statements(before) - there
        if ("DEFAULT" in line or line not in bare) and not _GRANT.match(line)
    )


_GRANT = re.compile(r"GRANT .* ON TABLE public\.(runs|run_events|workflow_nodes) TO ")
_DEFAULT = re.compile(r" DEFAULT .*?(( NOT NULL)?)$")


async def complete_a_run(db: Db, user: UUID, workflow: UUID, *, request: dict[str, Any] | None = None) -> str:
    """Take an image run of a client from end to end, through SQL; return its id."""
    daemon = await new_daemon(db)
    node = "node-" + uuid4().hex
    async with signed_in(db, user):
        record = await db.fetchval(
            "select start_image_job($1)",
            {
                "nodeId": node,
                "workflowId": str(workflow),
                "provider": "demo",
                "model": "painter",
                "promptSpec": {"basePrompt": "a red fox"},
                **(request or {}),
            },
        )
    run: str = record["jobId"]
    assert record["status"] == "pending"
    await _claim(daemon, run)
    async with signed_in(db, user):
        assert (await db.fetchval("select cancel_run($1)", run))["status"] == "cancelled"
        assert (await db.fetchval("select requeue_run($1)", run))["status"] == "pending"
    claimed = await _claim(daemon, run)
    assert await daemon.record(claimed, progress=40, message="Drawing.") == "recorded"
    assert await daemon.park(claimed, due_in=-1) == "settled"
    claimed = await _claim(daemon, run)
    assert await daemon.fail(claimed) == "settled"
    async with signed_in(db, user):
        assert (await db.fetchval("select requeue_run($1)", run))["status"] == "pending"
    assert await daemon.complete(await _claim(daemon, run)) == "settled"
    async with signed_in(db, user):
        record = await db.fetchrow("""select status, "imageUrl" from image_jobs where "jobId" = $1""", run)
    assert record["status"] == "completed"
    assert (await run_row(db, run))["payload"]["imageUrl"] == record["imageUrl"]
    kinds = await db.fetch("select payload ->> 'event' as event from run_events where run_id = $1 order by seq", run)
    assert [row["event"] for row in kinds] == [
        *("created", "claimed", "cancelled", "requeued", "claimed", "progress", "parked", "failed"),
        *("requeued", "claimed", "completed"),
    ]
    return run


async def _claim(daemon: Daemon, run: str) -> dict[str, Any]:
    claimed = await daemon.claim_one()
    assert claimed["id"] == run
    return claimed
