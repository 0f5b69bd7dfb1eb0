"""Plans of clients' and operators' reads, on small tables whose statistics say that they are large."""

import re
from collections.abc import AsyncIterator
from uuid import UUID

import asyncpg
import pytest

from daemon.cli.doctor.providers import WAITING
from daemon.cli.list import RUNS
from tests.support.postgres import Cluster, connect, signed_in

pytestmark = pytest.mark.every_postgres

Db = asyncpg.Connection

MEMBER = UUID("aaaaaaaa-0000-4000-8000-00000000000a")
# One workflow has half of all rows, a hundred have the rest; ten in the small one are the oldest. The member is of these two.
LARGE = UUID("bbbbbbbb-1111-4000-8000-000000000002")
SMALL = UUID("aaaaaaaa-1111-4000-8000-000000000001")
ROWS = f"""
set session_replication_role = replica;
insert into runs (id, kind, subject_id, status, queue_state, processor, finished_at, payload, metadata, ticket, rank, claim, created_at)
select 'job_' || n, 'image_gen', workflow, case when pending then 'pending' else 'completed' end, case when pending then 'pending' end,
  'demo:painter', case when not pending then at end, '{{"imageUrl": "https://example.com/i.png", "timings": {{"queuedMs": 1}}}}', '{{}}', n, case when pending then n end, n, at
from (select n, n > 1990 as pending, now() - (2000 - n) * interval '1 hour' as at,
    case when n % 2 = 1 then '{LARGE}' when n <= 20 then '{SMALL}' else md5((n % 200)::text) end::uuid as workflow
  from generate_series(1, 2000) n) s;
insert into run_events (id, run_id, kind, payload, seq, run_kind, workflow_id, ts)
select gen_random_uuid(), r.id, 'log', '{{"data": {{"uploadTries": 1}}}}', r.ticket * 5 + k, 'image_gen', r.subject_id, r.created_at
from runs r cross join generate_series(1, 5) k;
insert into workflow_nodes (id, workflow_id, node_type, node_data, version)
select id, subject_id, 'image', '{{}}', ticket from runs;
insert into image_jobs.calls (id, run_id, provider, model, requested_model, state, opened_at, closed_at, ticket)
select ticket, id, 'demo', 'painter', 'painter', 'charged', created_at, created_at, ticket from runs;
insert into workflow_members values ('{SMALL}', '{MEMBER}'), ('{LARGE}', '{MEMBER}');
set session_replication_role = origin;
analyze runs, run_events, workflow_nodes, image_jobs.calls, workflow_members;
-- So many rows to a page: the planner multiplies by the pages that there are.
update pg_class set reltuples = reltuples * 500
where oid in ('runs'::regclass, 'run_events'::regclass, 'workflow_nodes'::regclass, 'image_jobs.calls'::regclass)
  or oid in (select indexrelid from pg_index where indrelid in (
    'runs'::regclass, 'run_events'::regclass, 'workflow_nodes'::regclass, 'image_jobs.calls'::regclass));
"""


@pytest.fixture
async def db(postgres: Cluster, database: str) -> AsyncIterator[Db]:
    """Fill the tables; autovacuum would analyze them anew."""
    sudo = await connect(postgres.server.dsn(database.rpartition("/")[2]))
    for table in ("runs", "run_events", "workflow_nodes", "image_jobs.calls"):
        await sudo.execute(f"alter table {table} set (autovacuum_enabled = false)")
    await sudo.execute(ROWS)
    await sudo.close()
    connection = await connect(database)
    yield connection
    await connection.close()


async def plan(db: Db, query: str, *arguments: object) -> str:
    return "\n".join(row[0] for row in await db.fetch(f"explain (costs off) {query}", *arguments))


def indexes(plan: str) -> set[str]:
    """Return the indexes that a plan reads, and the tables that it reads whole."""
    return set(re.findall(r"(?:Index (?:Only )?Scan.* using|Bitmap Index Scan on|Seq Scan on) (\w+)", plan))


CLIENTS = {
    "newest runs": ("select * from runs {0} order by created_at desc limit 20", "subject_id", "runs"),
    "newest of the view": (
        """select * from image_jobs {0} order by "startedAt" desc limit 20""",
        '"workflowId"',
        "runs",
    ),
    "newest events": ("select * from run_events {0} order by seq desc limit 50", "workflow_id", "run_events"),
    "count of runs": ("select count(*) from runs {0}", "subject_id", "runs"),
    "count of events": ("select count(*) from run_events {0}", "workflow_id", "run_events"),
    "nodes": ("select * from workflow_nodes {0}", "workflow_id", "workflow_nodes"),
    "change of nodes": ("update workflow_nodes set position = '{{}}' {0}", "workflow_id", "workflow_nodes"),
}


OPEN = """
create policy "Rows of other kinds stay as open as they were" on runs
  using (kind is distinct from 'image_gen') with check (kind is distinct from 'image_gen');
create policy "Events of other kinds stay as open as they were" on run_events
  using (not image_jobs.is_image_run(run_id)) with check (not image_jobs.is_image_run(run_id));
create policy "Members see events that are older than their workflow_id" on run_events for select to authenticated
  using (run_kind is null and image_jobs.can_access_run(run_id));
"""
NEWEST = {"newest runs": "runs_of_a_workflow", "newest events": "run_events_of_a_workflow"}
VIEWS = {
    "queue_stats": {"runs_delayed", "runs_running", "runs_ended_by_claim"},
    "run_timings": {"runs_ended_by_claim"},
    "failures": {"runs_ended_by_claim"},
    "throughput": {"runs_ended_by_claim"},
    "run_costs": {"calls_by_time"},
    "storage_stats": {"run_events_of_uploads"},
    "storage_violations": {"runs_from_before"},
}


async def test_reads_of_members_use_indexes(db: Db) -> None:
    for sql, column, table in CLIENTS.values():
        for where in ("", f"where {column} = '{LARGE}'", f"where {column} = '{SMALL}'"):
            async with signed_in(db, MEMBER):
                shown = await plan(db, sql.format(where))
            assert indexes(shown), shown
            assert table not in indexes(shown), shown


async def test_newest_of_a_workflow_need_no_sort(db: Db) -> None:
    """Also in adopted tables that had no row level security, and whose grants were wide: there, runs by their kind."""
    for policies, kind in (("select", ""), (OPEN, " and kind = 'image_gen'")):
        await db.execute(policies)
        for query, index in NEWEST.items():
            sql, column, table = CLIENTS[query]
            for workflow in (LARGE, SMALL):
                async with signed_in(db, MEMBER):
                    shown = await plan(db, sql.format(f"where {column} = '{workflow}'" + kind * (table == "runs")))
                assert indexes(shown) == {index}, shown
                assert "Sort" not in shown, shown


async def test_operators_read_their_window(db: Db) -> None:
    for view, wanted in VIEWS.items():
        shown = await plan(db, f"select * from image_jobs.{view}")
        assert indexes(shown) >= wanted, shown
        assert not indexes(shown) & {"runs", "run_events", "calls"}, shown
    shown = await plan(db, WAITING)
    assert indexes(shown) >= {"runs_delayed", "runs_running"}, shown
    assert "runs" not in indexes(shown), shown
    for status, code in (("null", "null"), ("'failed'", "'refused'")):
        values = {"$1": status, "$2": "null", "$3": code, "$4": "20"}
        shown = await plan(db, re.sub(r"\$[1-4]", lambda name, values=values: values[name[0]], RUNS))
        assert "runs" not in indexes(shown), shown
