"""Limits are global and exact, and runs that may not start cost a claim nothing."""

import asyncio
import json
import re
from typing import Any

import asyncpg
import pytest

from tests.support.postgres import connect
from tests.support.protocol import Daemon, move_clock, new_daemon
from tests.support.runs import insert_runs

CLAIMERS = 8


async def set_limit(db: asyncpg.Connection, **limit: Any) -> None:
    """Set the limit of openai, or of a model of it."""
    model = limit.pop("model", None)
    columns = ", ".join(f"{name} = excluded.{name}" for name in limit)
    await db.execute(
        f"insert into image_jobs.provider_limits (provider, model, {', '.join(limit)}) "
        f"values ('openai', $1, {', '.join(f'${n}' for n in range(2, len(limit) + 2))}) "
        f"on conflict (provider, model) do update set {columns}",
        model,
        *limit.values(),
    )


@pytest.fixture
async def daemons(database: str):
    """Register daemons with a connection each."""
    connections = [await connect(database) for _ in range(CLAIMERS)]
    yield [await new_daemon(connection, "openai") for connection in connections]
    for connection in connections:
        await connection.close()


async def claim_at_once(daemons: list[Daemon], slots: int, rounds: int = 3) -> int:
    """Claim with all daemons at the same time, several times over; return how many runs they got."""

    async def claim(daemon: Daemon) -> int:
        return sum([len(await daemon.claim(slots)) for _ in range(rounds)])

    return sum(await asyncio.gather(*map(claim, daemons)))


async def test_many_daemons_start_exactly_the_limit_a_minute(db, daemons):
    await set_limit(db, per_minute=25)
    await insert_runs(db, 200, processor="openai:gpt-image-2")
    assert await claim_at_once(daemons, slots=7) == 25
    assert await claim_at_once(daemons, slots=7) == 0


async def test_many_daemons_hold_exactly_max_running_runs(db, daemons):
    await set_limit(db, per_minute=None, max_running=10)
    await insert_runs(db, 200, processor="openai:gpt-image-2")
    assert await claim_at_once(daemons, slots=7) == 10
    (claimed,) = await db.fetch("select id, claim, claimed_by from runs where status = 'running' limit 1")
    holder = next(daemon for daemon in daemons if daemon.id == claimed["claimed_by"])
    assert await holder.complete(claimed) == "settled"
    assert await claim_at_once(daemons, slots=7) == 1


async def test_parked_runs_count_as_running(db, daemons):
    await set_limit(db, per_minute=None, max_running=1)
    await insert_runs(db, 2, processor="openai:gpt-image-2")
    await daemons[0].park(await daemons[0].claim_one(), due_in=60)
    assert not await daemons[1].claim(5)


async def test_no_window_of_60_s_has_more_starts_than_the_limit(db):
    """Starts of four minutes, every ten seconds: none of the windows of 60 seconds holds more than allowed."""
    await set_limit(db, per_minute=7)
    await insert_runs(db, 100, processor="openai:gpt-image-2")
    daemon = await new_daemon(db, "openai")
    starts: list[float] = []
    for second in range(0, 240, 10):
        await move_clock(db, f"{second} s")
        starts += [second] * len(await daemon.claim(4))
    assert max(sum(begin <= start < begin + 60 for start in starts) for begin in starts) == 7
    # A start counts for up to 61 seconds, so a minute may see a little less, but not much.
    assert len(starts) >= 4 * 7 - 7


async def test_a_minute_boundary_is_no_way_around_the_limit(db, daemons):
    await set_limit(db, per_minute=10)
    await insert_runs(db, 100, processor="openai:gpt-image-2")
    assert await claim_at_once(daemons, slots=3) == 10
    for daemon in daemons:
        await move_clock(daemon.connection, "55 s")
    assert await claim_at_once(daemons, slots=3) == 0
    for daemon in daemons:
        await move_clock(daemon.connection, "75 s")
    assert await claim_at_once(daemons, slots=3) == 10


async def test_a_limit_holds_for_the_provider_and_for_the_model(db, daemons):
    await set_limit(db, per_minute=10)
    await set_limit(db, model="small", per_minute=4)
    await insert_runs(db, 50, processor="openai:small")
    assert await claim_at_once(daemons, slots=3) == 4
    await insert_runs(db, 50, processor="openai:large")
    assert await claim_at_once(daemons, slots=3) == 6


async def test_a_new_limit_counts_waiting_and_running_runs(db, daemons):
    await set_limit(db, per_minute=None)
    await insert_runs(db, 20, processor="openai:small")
    assert len(await daemons[0].claim(2)) == 2
    await set_limit(db, model="small", max_running=5)
    assert await claim_at_once(daemons, slots=3) == 3
    await db.execute("delete from image_jobs.provider_limits where model = 'small'")
    assert await claim_at_once(daemons, slots=3) == 15


async def test_a_run_inserted_while_its_model_gets_a_limit_is_counted(db, daemons, database):
    """Its insert began before the limit and commits after it, so it stands in the provider's lane."""
    await set_limit(db, per_minute=None)
    other = await connect(database)
    async with other.transaction():
        await insert_runs(other, 3, processor="openai:small")
        await set_limit(db, model="small", max_running=1)
    assert await db.fetchval("select distinct lane from runs") == "openai"
    assert await claim_at_once(daemons, slots=3) == 1
    await other.close()


@pytest.mark.parametrize("stop", [{"paused": True}, {"per_minute": 0}, {"max_running": 0}])
async def test_a_stopped_provider_starts_nothing_until_reopened(db, daemons, stop):
    await insert_runs(db, 3, processor="openai:gpt-image-2")
    await set_limit(db, **stop)
    assert await claim_at_once(daemons, slots=3) == 0
    await set_limit(db, **{name: False if name == "paused" else None for name in stop})
    assert await claim_at_once(daemons, slots=3) == 3


async def test_a_paused_provider_is_still_polled(db, daemons):
    await insert_runs(db, 2, processor="openai:gpt-image-2")
    await daemons[0].park(await claim_some(daemons[0]), due_in=0)
    await set_limit(db, paused=True)
    (claimed,) = await daemons[1].claim(5)
    assert claimed["provider_job_id"] == "order-1"


async def claim_some(daemon: Daemon) -> dict[str, Any]:
    (claimed,) = await daemon.claim(1)
    return claimed


async def test_a_block_holds_for_all_daemons_and_never_shortens(db, daemons):
    await insert_runs(db, 3, processor="openai:gpt-image-2")
    await db.execute("select image_jobs.block_provider('openai', null, '60 s', 'slow down')")
    await db.execute("select image_jobs.block_provider('openai', null, '1 s', 'slow down')")
    await move_clock(daemons[0].connection, "30 s")
    assert await claim_at_once(daemons, slots=3) == 0
    await move_clock(daemons[0].connection, "61 s")
    assert len(await daemons[0].claim(5)) == 3


async def test_a_blocked_model_leaves_the_others_alone(db, daemons):
    await insert_runs(db, 2, processor="openai:small")
    await insert_runs(db, 2, processor="openai:large")
    await db.execute("select image_jobs.block_provider('openai', 'small', '60 s', 'slow down')")
    claimed = await daemons[0].claim(10)
    assert {run["processor"] for run in claimed} == {"openai:large"}


async def test_limits_changed_during_claims_are_never_exceeded(db, daemons):
    await set_limit(db, per_minute=None, max_running=0)
    await insert_runs(db, 300, processor="openai:gpt-image-2")
    highest = 0

    async def raise_the_limit() -> None:
        nonlocal highest
        for limit in (5, 9, 3, 30, 20):
            highest = max(highest, limit)
            await set_limit(db, max_running=limit)

    claimed, _ = await asyncio.gather(claim_at_once(daemons, slots=4, rounds=8), raise_the_limit())
    assert claimed <= highest


async def test_starts_are_counted_per_second_not_per_claim(db):
    await set_limit(db, per_minute=1000)
    await insert_runs(db, 30, processor="openai:gpt-image-2")
    daemon = await new_daemon(db, "openai")
    for _ in range(30):
        await daemon.claim(1)
    row = await db.fetchrow(
        "select s.* from image_jobs.provider_limits l, image_jobs.starts_of(l.id) s where l.provider = 'openai'"
    )
    assert sum(row["starts"]) == 30
    assert len(row["at"]) == len(set(row["at"]))


# What it costs. Buffers are counted, not seconds: they say the same on every machine.


async def buffers_of(db: asyncpg.Connection, query: str, *args: object) -> int:
    """Count the pages that a statement reads or writes, planning aside."""
    async with db.transaction():
        rows = await db.fetch(f"explain (analyze, buffers, format json) {query}", *args)
    plan = rows[0][0]
    (found,) = json.loads(plan) if isinstance(plan, str) else plan
    return found["Plan"]["Shared Hit Blocks"] + found["Plan"]["Shared Read Blocks"]


async def fill(db: asyncpg.Connection, count: int, status: str, due: str = "image_jobs.now()") -> None:
    """Insert very many runs without the triggers, which would take a minute."""
    await db.execute("alter table runs disable trigger user")
    await db.execute(
        f"""insert into runs (id, kind, subject_id, status, processor, metadata, progress, priority, due_at, attempt,
            max_attempts, claim, ticket, provider_job_id, lane, rank, queue_state)
        select 'many-' || n, 'image_gen', md5((n % 100)::text)::uuid, $1::varchar, 'openai:gpt-image-2', '{{}}', 0, 0, {due}, 0, 3, n, n,
            case $1 when 'running' then 'order' end, 'openai', case $1 when 'pending' then n / 100 end, $1
        from generate_series(1, $2) n""",
        status,
        count,
    )
    await db.execute("alter table runs enable trigger user")


CLAIM = "select image_jobs.claim_runs($1, 5, $2)"


@pytest.mark.parametrize(
    ("count", "status", "due", "limit"),
    [
        (100_000, "pending", "image_jobs.now()", {"paused": True}),
        (20_000, "pending", "image_jobs.now()", {"per_minute": 0}),
        (20_000, "running", "image_jobs.now() + interval '1 hour'", {"per_minute": 50}),
    ],
    ids=["paused", "exhausted", "parked"],
)
async def test_runs_that_may_not_start_cost_a_claim_nothing(db, count, status, due, limit):
    daemon = await new_daemon(db, "openai", "demo")
    await set_limit(db, **limit)
    await insert_runs(db, 20)
    await daemon.claim(5)
    before = await buffers_of(db, CLAIM, daemon.id, True)
    await fill(db, count, status, due)
    await buffers_of(db, CLAIM, daemon.id, True)  # reads the catalogue anew, which is not what is measured
    for full_scan in (False, True):
        assert await buffers_of(db, CLAIM, daemon.id, full_scan) < before + 250


async def test_a_claim_costs_the_same_however_many_wait(db):
    daemon = await new_daemon(db, "openai")
    await insert_runs(db, 10, processor="openai:gpt-image-2")
    await daemon.claim(1)
    before = await buffers_of(db, CLAIM, daemon.id, False)
    await fill(db, 20_000, "pending")
    await buffers_of(db, CLAIM, daemon.id, True)  # reads the catalogue anew, which is not what is measured
    assert await buffers_of(db, CLAIM, daemon.id, False) < before + 150


HOT = {
    "claim": "select id from runs where kind = 'image_gen' and queue_state = 'pending' and rank is not null "
    "and lane = 'openai' and priority = 0 and rank >= 0 order by rank, ticket limit 5",
    "what was put off": "select id from runs where kind = 'image_gen' and queue_state = 'pending' and rank is null "
    "and due_at <= now() order by due_at limit 200",
    "check": "select id from runs where kind = 'image_gen' and queue_state = 'running' and lane = 'openai' "
    "and due_at <= now() and claimed_by is null order by due_at limit 5",
    "place in line": "select rank from runs where kind = 'image_gen' "
    "and coalesce(created_by, subject_id) = '00000000-0000-4000-8000-000000000000' and lane = 'openai' and priority = 0 "
    "and rank is not null order by rank desc limit 1",
    "place in line among one's own": "select workflow_rank from runs where kind = 'image_gen' "
    "and coalesce(created_by, subject_id) = '00000000-0000-4000-8000-000000000000' "
    "and subject_id = '00000000-0000-4000-8000-000000000000' and lane = 'openai' and priority = 0 "
    "and workflow_rank is not null order by workflow_rank desc limit 1",
    "first of one's own": "select id from runs where kind = 'image_gen' and queue_state = 'pending' "
    "and coalesce(created_by, subject_id) = '00000000-0000-4000-8000-000000000000' and num_nulls(rank) = 0 "
    "and lane = 'openai' and priority = 0 and workflow_rank between 5 and 9 order by workflow_rank, ticket limit 5",
    "newest run of a node": "select id from runs where kind = 'image_gen' and ticket is not null "
    "and metadata ->> 'nodeId' = 'n' and subject_id = '00000000-0000-4000-8000-000000000000' order by ticket desc limit 1",
    "held": "select id from runs where claimed_by = '00000000-0000-4000-8000-000000000000'",
}
INDEX = {
    "claim": "runs_ready",
    "what was put off": "runs_delayed",
    "check": "runs_running",
    "place in line": "runs_last_in_line",
    "place in line among one's own": "runs_last_of_workflow",
    "first of one's own": "runs_waiting_of_user",
    "newest run of a node": "runs_node",
    "held": "runs_held",
}


@pytest.mark.parametrize("rows", [0, 20_000], ids=["empty", "large"])
async def test_each_hot_query_walks_its_index(db, rows):
    """With the settings of the functions; on an empty table without statistics as well as on a large one."""
    if rows:
        await fill(db, rows, "pending")
        await db.execute("analyze runs")
    config = await db.fetchval("select proconfig from pg_proc where proname = 'claim_runs'")
    for setting in config:
        name, _, value = setting.partition("=")
        await db.execute("select set_config($1, $2, false)", name, value.strip('"'))
    for name, query in HOT.items():
        # Inside the function search_path is empty; here the name says it.
        plan = "\n".join(row[0] for row in await db.fetch("explain " + query.replace("from runs", "from public.runs")))
        assert re.search(rf"Index (Only )?Scan (Backward )?using {INDEX[name]} ", plan), f"{name}:\n{plan}"
        assert "Seq Scan" not in plan and "Sort" not in plan, f"{name}:\n{plan}"


async def test_the_functions_that_run_most_have_their_plans_pinned(db):
    rows = await db.fetch(
        "select proname from pg_proc where 'enable_seqscan=off' = any (proconfig) and 'jit=off' = any (proconfig) order by 1"
    )
    assert [row[0] for row in rows] == [
        *(
            "abandon_each",
            "claim_runs",
            "close_calls",
            "count_waiting",
            "current_alerts",
            "dashboard",
            "gauges",
            "images_together",
            "keep_files_of",
            "keep_node",
            "makers_of_jobs",
            "newest_picture",
            "next_rank",
            "next_workflow_rank",
            "note_responses",
            "project_changes",
            "project_nodes",
            "provider_status",
            "record_progress",
            "refresh_stale_nodes",
            "release_runs",
            "reroute_runs",
            "served_rank",
            "settle_runs",
            "sweep_calls",
            "take_tallies",
            "used_since",
            "used_together",
        )
    ]


@pytest.mark.one_postgres
@pytest.mark.parametrize(
    ("provider", "model"),
    [("OpenAI", None), ("", None), ("openai ", None), ("openai", ""), ("openai", "a b"), ("openai", "openai:dall-e-3")],
)
async def test_a_limit_that_names_nothing_is_refused(db, provider, model):
    with pytest.raises(asyncpg.CheckViolationError, match="provider_limits_name_a_"):
        await db.execute("insert into image_jobs.provider_limits (provider, model) values ($1, $2)", provider, model)
