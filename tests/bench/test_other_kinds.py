"""The cost of our schema for statements about rows of other kinds, in tables that other orchestrators share."""

from pathlib import Path
from statistics import median

import pytest

from daemon.migrate import migrate
from tests.bench.report import table
from tests.support.postgres import Cluster, connect

ROWS, LOOPS, ROUNDS = 10_000, 2_000, 9

# The tables of the specification, word for word.
TABLES = """
create table runs (id varchar primary key, kind varchar not null, subject_id uuid not null, status varchar not null,
  processor varchar, started_at timestamptz default now(), finished_at timestamptz, payload jsonb);
create index idx_runs_subject on runs (subject_id, kind);
create index idx_runs_status on runs (status);
create table run_events (id uuid primary key, run_id varchar references runs (id), ts timestamptz default now(), kind varchar not null,
  payload jsonb);
create index idx_events_run on run_events (run_id, ts);
"""
SEED = f"""
insert into runs (id, kind, subject_id, status, processor, payload)
select 'r' || n, 'research', md5((n % 100)::text)::uuid, 'pending', 'x:y', '{{"note": "some words"}}'
from generate_series(1, {ROWS}) n
"""


def looped(statement: str) -> str:
    """Repeat a statement in the server, so that no round trip hides its cost."""
    return f"do $$ begin for n in 1..{LOOPS} loop {statement}; end loop; end $$"


WRITES = {
    "update a run": (
        looped("update runs set status = 'run' || n % 2, payload = '{\"c\": 3}' where id = 'r' || n"),
        LOOPS,
    ),
    "update all runs at once": ("update runs set status = status || 'x', payload = '{\"d\": 4}'", ROWS),
    "insert a run": (
        looped(
            "insert into runs (id, kind, subject_id, status) values (gen_random_uuid(), 'research', gen_random_uuid(), 'p')"
        ),
        LOOPS,
    ),
    "insert an event": (
        looped(
            "insert into run_events (id, run_id, kind, payload) values (gen_random_uuid(), 'r' || n, 'note', '{\"c\": 3}')"
        ),
        LOOPS,
    ),
    "insert events at once": (
        "insert into run_events (id, run_id, kind, payload) select gen_random_uuid(), id, 'note', '{\"c\": 3}' from runs",
        ROWS,
    ),
}


def seconds_of_cpu(pid: int) -> float:
    """Read what a backend has used of a processor: steadier than a clock, beside which others work."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


@pytest.mark.timeout(180)
async def test_cost_of_statements_about_other_kinds(durable: Cluster) -> None:
    costs: dict[tuple[str, bool], list[float]] = {}
    async with durable.database("supabase") as without_us, durable.database("supabase") as with_us:
        connections = {False: await connect(without_us), True: await connect(with_us)}
        for ours, connection in connections.items():
            await connection.execute(TABLES)
            if ours:
                await migrate(with_us)
            await connection.execute(SEED)
        for _ in range(ROUNDS):
            for connection in connections.values():
                await connection.execute("vacuum analyze runs")
            for write, (statement, count) in WRITES.items():
                for ours, connection in connections.items():
                    transaction = connection.transaction()
                    await transaction.start()
                    before = seconds_of_cpu(connection.get_server_pid())
                    await connection.execute(statement)
                    used = seconds_of_cpu(connection.get_server_pid()) - before
                    costs.setdefault((write, ours), []).append(1e6 * used / count)
                    await transaction.rollback()
        for connection in connections.values():
            await connection.close()
    rows: list[tuple[str, ...]] = []
    for write in WRITES:
        without, beside = median(costs[write, False]), median(costs[write, True])
        rows.append((write, f"{without:.1f}", f"{beside:.1f}", f"{beside - without:+.1f}", f"{beside / without:.2f} x"))
    table("Rows of other kinds, microseconds of CPU a row", ("", "without us", "with us", "more", "ratio"), rows)
