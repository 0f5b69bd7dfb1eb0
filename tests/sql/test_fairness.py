"""Fairness: neither a user nor a workflow with many runs makes another's first run wait."""

from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.sql.test_limits import buffers_of
from tests.support.postgres import connect
from tests.support.protocol import Daemon, Db, move_clock
from tests.support.runs import insert_run, insert_runs

pytestmark = pytest.mark.one_postgres

PROMPT = {"promptSpec": {"basePrompt": "a red fox"}}


async def insert_for(
    db: Db,
    user: UUID | None,
    count: int = 1,
    *,
    workflow: UUID | None = None,
    ids: str = "",
    due_in: float = 0,
    processors: str = "",
) -> list[str]:
    """Insert runs of a user in one statement, as a server does; each in a workflow of its own if none is given."""
    rows = await db.fetch(
        """insert into runs (id, kind, subject_id, processor, metadata, created_by, due_at)
        select coalesce(nullif($5, '') || n, 'run-' || gen_random_uuid()), 'image_gen',
            coalesce($3::uuid, gen_random_uuid()), coalesce(nullif($7, '') || n, 'demo:painter'), $4, $1,
            image_jobs.now() + make_interval(secs => $6)
        from generate_series(1, $2) n returning id""",
        user,
        count,
        workflow,
        PROMPT,
        ids,
        due_in,
        processors,
    )
    return [row["id"] for row in rows]


async def claim_each(daemon: Daemon, count: int, *, full_scan: bool = False) -> list[str]:
    """Claim runs one by one; return their ids."""
    return [claim["id"] for _ in range(count) for claim in await daemon.claim(1, full_scan=full_scan)]


@pytest.mark.parametrize("at_once", [1, 4])
async def test_500_fresh_workflows_of_a_user_delay_nobody(db: Db, daemon: Daemon, at_once: int) -> None:
    await insert_for(db, uuid4(), 500)
    await daemon.claim(at_once, full_scan=False)
    (victim,) = await insert_for(db, uuid4())
    assert victim in await claim_each(daemon, 3)


async def test_500_names_of_models_delay_nobody(db: Db, daemon: Daemon) -> None:
    """Where a model is blocked, claims look at each name by itself: at those on offer, and a hundred others."""
    await db.execute("insert into image_jobs.models (provider, model) values ('demo', 'painter'), ('demo', 'sculptor')")
    await db.execute("select image_jobs.block_provider('demo', 'sculptor', '1 hour', 'Slow down.')")
    await insert_for(db, uuid4(), 500, processors="demo:!")
    (victim,) = await insert_for(db, uuid4())
    assert victim in await claim_each(daemon, 3)


async def test_500_runs_that_were_put_off_delay_nobody(db: Db, daemon: Daemon) -> None:
    await insert_for(db, uuid4(), 500, due_in=0.3)
    await move_clock(db, "1 s")
    (victim,) = await insert_for(db, uuid4())
    assert victim in await claim_each(daemon, 3)


async def test_runs_put_off_queue_behind_those_of_their_user(db: Db, daemon: Daemon) -> None:
    user, workflow = uuid4(), uuid4()
    (later,) = await insert_for(db, user, workflow=workflow, due_in=5)
    before = await insert_for(db, user, 3, workflow=workflow)
    await move_clock(db, "6 s")
    others = await insert_for(db, uuid4(), 6)
    sequence = await claim_each(daemon, 10)
    assert [run for run in sequence if run not in others] == [*before, later]
    assert sequence.index(later) >= 6


async def test_a_retry_keeps_its_place_in_line(db: Db, daemon: Daemon) -> None:
    user = uuid4()
    await insert_for(db, user, 5)
    await insert_for(db, uuid4(), 5)
    claimed = (await daemon.claim(1, full_scan=False))[0]
    await daemon.settle(claimed, "retry", payload={"error": "Again.", "code": "rate_limited"}, due_in=5, refund=True)
    await daemon.claim(3, full_scan=False)
    await move_clock(db, "6 s")
    assert [claim["id"] for claim in await daemon.claim(1, full_scan=False)] == [claimed["id"]]


async def test_a_run_without_a_user_counts_by_its_workflow(db: Db, daemon: Daemon) -> None:
    await insert_runs(db, 200, workflow=uuid4())
    (victim,) = await insert_for(db, None)
    assert victim in await claim_each(daemon, 3)


async def test_runs_inserted_by_a_server_count_for_their_user(db: Db, daemon: Daemon) -> None:
    user = uuid4()
    async with db.transaction():
        await db.execute("set local role service_role")
        await insert_for(db, user, 200)
    (victim,) = await insert_for(db, uuid4())
    assert victim in await claim_each(daemon, 3)


async def test_ids_that_sort_first_buy_nothing(db: Db, daemon: Daemon) -> None:
    (first,) = await insert_for(db, uuid4(), ids="z")
    for _ in range(3):
        await insert_for(db, uuid4(), ids=f"0{uuid4()}")
    assert await claim_each(daemon, 1) == [first]


@pytest.mark.parametrize(
    ("runs", "full_scan", "blocked"), [(10_000, False, False), (300, True, False), (300, False, True)]
)
async def test_a_second_workflow_is_among_the_next_two(
    db: Db, daemon: Daemon, runs: int, full_scan: bool, blocked: bool
) -> None:
    user, first = uuid4(), uuid4()
    await insert_for(db, user, runs, workflow=first)
    if blocked:
        await db.execute("select image_jobs.block_provider('demo', 'sculptor', '1 hour', 'Slow down.')")
    await daemon.claim(5, full_scan=full_scan)
    (own,) = await insert_for(db, user)
    assert own in await claim_each(daemon, 2, full_scan=full_scan)


async def test_workflows_of_a_user_take_turns(db: Db, daemon: Daemon) -> None:
    user, workflows = uuid4(), [uuid4() for _ in range(3)]
    of = {run: workflow for workflow in workflows for run in await insert_for(db, user, 6, workflow=workflow)}
    sequence = await claim_each(daemon, 18)
    assert sorted(sequence) == sorted(of)
    for start in range(0, 18, 3):
        assert {of[run] for run in sequence[start : start + 3]} == set(workflows)


async def test_runs_of_a_workflow_keep_their_sequence(db: Db, daemon: Daemon) -> None:
    user, first, second = uuid4(), uuid4(), uuid4()
    runs = await insert_for(db, user, 8, workflow=first)
    await daemon.claim(2, full_scan=False)
    others = await insert_for(db, user, 4, workflow=second)
    sequence = [claim["id"] for _ in range(4) for claim in await daemon.claim(3, full_scan=False)]
    assert [run for run in sequence if run in runs] == runs[2:]
    assert [run for run in sequence if run in others] == others


@pytest.mark.parametrize("slots", [1, 4])
async def test_opening_workflows_gives_no_larger_share(db: Db, daemon: Daemon, slots: int) -> None:
    """22 workflows of 22 runs, filled one after the other while another user waits with as many in one."""
    greedy, modest = uuid4(), uuid4()
    theirs = set(await insert_for(db, modest, 100, workflow=uuid4()))
    for _ in range(22):
        await insert_for(db, greedy, 22, workflow=uuid4())
        await daemon.claim(slots, full_scan=False)
    sequence = [claim["id"] for _ in range(40 // slots) for claim in await daemon.claim(slots, full_scan=False)]
    assert len(theirs & set(sequence)) >= 18


async def places(db: Db) -> list[Any]:
    return [row[0] for row in await db.fetch("select rank from runs where status = 'pending' order by rank")]


async def test_a_run_that_goes_before_another_leaves_it_its_place(db: Db, daemon: Daemon) -> None:
    user = uuid4()
    await insert_for(db, user, 10, workflow=uuid4())
    await insert_for(db, user, 10, workflow=uuid4())
    before = await places(db)
    await daemon.claim(6, full_scan=False)
    assert await places(db) == before[6:]


async def test_cancelled_runs_hold_no_place_in_line(db: Db, daemon: Daemon) -> None:
    user, workflow, other = uuid4(), uuid4(), uuid4()
    await insert_for(db, user, 50, workflow=workflow)
    await db.execute("update runs set status = 'cancelled' where subject_id = $1", workflow)
    await insert_for(db, user, 20, workflow=other)
    (again,) = await insert_for(db, user, workflow=workflow)
    assert again in await claim_each(daemon, 2)


async def test_a_users_own_runs_of_other_models_are_passed_over(db: Db, daemon: Daemon) -> None:
    """A blocked model's runs stand first in the user's own line, too."""
    await insert_runs(db, 30, processor="demo:sculptor", workflow=uuid4())
    await db.execute("select image_jobs.block_provider('demo', 'sculptor', '1 hour', 'Slow down.')")
    run = await insert_run(db, workflow=uuid4())
    assert await claim_each(daemon, 1) == [run]


async def test_a_users_dead_entries_cost_the_next_claim_nothing(database: str, db: Db, daemon: Daemon) -> None:
    """A user's 5,000 runs that were claimed, and an old transaction that keeps vacuum from their index entries."""
    user, workflow = uuid4(), uuid4()
    await insert_for(db, user, 40, workflow=workflow)
    before = await buffers_of(db, "select image_jobs.claim_runs($1, 5, false)", daemon.id)
    old = await connect(database)
    try:
        async with old.transaction(isolation="repeatable_read"):
            await old.execute("select from runs limit 1")
            await db.execute("alter table runs disable trigger user")
            await db.execute(
                """update runs set rank = rank + 5000, workflow_rank = workflow_rank + 5000;
                insert into runs (id, kind, subject_id, status, processor, metadata, progress, priority, due_at, attempt,
                    max_attempts, claim, ticket, lane, rank, workflow_rank, created_by, queue_state)
                select 'many-' || n, kind, subject_id, status, processor, metadata, progress, priority, due_at, attempt,
                    max_attempts, claim, ticket, lane, n, n, created_by, queue_state
                from generate_series(0, 4999) n, (select * from runs limit 1) first;
                update runs set status = 'running', queue_state = 'running', due_at = null where id like 'many-%';
                insert into image_jobs.watermarks (lane, priority, watermark) values ('demo', 0, 4999)"""
            )
            await db.execute("alter table runs enable trigger user")
            await db.execute("analyze runs")
            await buffers_of(db, "select image_jobs.claim_runs($1, 5, false)", daemon.id)
            await insert_for(db, user, 5, workflow=workflow)
            assert await buffers_of(db, "select image_jobs.claim_runs($1, 5, false)", daemon.id) < before + 150
    finally:
        await old.close()
