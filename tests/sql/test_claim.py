"""Claims: which run comes first, and which daemon serves which provider."""

from uuid import UUID, uuid4

import pytest

from tests.support.postgres import connect
from tests.support.protocol import Daemon, Db, move_clock, new_daemon
from tests.support.runs import insert_run, insert_runs

# who comes first


@pytest.mark.timeout(180)
@pytest.mark.one_postgres
async def test_10_000_runs_of_one_workflow_do_not_delay_another(db: Db, daemon: Daemon) -> None:
    crowd, one = uuid4(), uuid4()
    await insert_runs(db, 10_000, workflow=crowd)
    await daemon.claim(4, full_scan=False)
    first = await insert_run(db, workflow=one)
    assert first in {claimed["id"] for claimed in await daemon.claim(4, full_scan=False)}


async def test_workflows_interleave_forever(db: Db, daemon: Daemon) -> None:
    workflows = [uuid4() for _ in range(3)]
    for workflow in workflows:
        await insert_runs(db, 4, workflow=workflow)
    for _ in range(4):
        claims = await daemon.claim(3, full_scan=False)
        assert {UUID(claimed["subject_id"]) for claimed in claims} == set(workflows)


async def test_runs_of_one_workflow_are_claimed_as_inserted(db: Db, daemon: Daemon) -> None:
    ids = [await insert_run(db) for _ in range(5)]
    assert [(await daemon.claim(1, full_scan=False))[0]["id"] for _ in ids] == ids


async def test_higher_priorities_come_first(db: Db, daemon: Daemon) -> None:
    low, middle, high = await insert_runs(db, 3)
    await db.execute("update runs set priority = case id when $1 then 10 when $2 then 5 else -1 end", high, middle)
    assert [(await daemon.claim())[0]["id"] for _ in range(3)] == [high, middle, low]


async def test_a_delayed_run_is_claimed_when_it_is_due(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await db.execute("update runs set due_at = now() + interval '1 min' where id = $1", run)
    assert await daemon.claim(10) == []
    await move_clock(db, "61 s")
    claimed = await daemon.claim_one()
    assert claimed["id"] == run
    assert claimed["waited"] < 5, "it waits from the time it was due"


async def test_a_delayed_run_opens_the_lane_of_its_priority(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await db.execute("update runs set due_at = image_jobs.now() + interval '1 min', priority = 5 where id = $1", run)
    await move_clock(db, "2 min")
    assert [claim["id"] for claim in await daemon.claim(2)] == [run]


async def test_a_full_scan_finds_a_run_that_committed_late(database: str, db: Db, daemon: Daemon) -> None:
    slow = await connect(database)
    await insert_run(db)
    try:
        async with slow.transaction():
            late = await insert_run(slow, workflow=uuid4())
            for _ in range(5):
                await insert_run(db)
                await daemon.complete((await daemon.claim(1, full_scan=False))[0])
            await daemon.claim(5, full_scan=False)
    finally:
        await slow.close()
    assert [claimed["id"] for claimed in await daemon.claim(5, full_scan=True)] == [late]


async def test_a_full_daemon_claims_nothing(db: Db, daemon: Daemon) -> None:
    await insert_runs(db, 3)
    assert await daemon.claim(0) == []
    assert len(await daemon.claim(2)) == 2


async def test_two_daemons_never_claim_the_same_run(db: Db, daemon: Daemon) -> None:
    await insert_runs(db, 10)
    other = await new_daemon(db)
    mine, theirs = await daemon.claim(6), await other.claim(6)
    assert len({claimed["id"] for claimed in mine + theirs}) == 10


# providers


async def test_a_run_of_an_unknown_provider_is_claimed_by_any_daemon(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db, processor="dreams:deep")
    assert (await daemon.claim_one())["id"] == run
    assert await db.fetchval("select count(*) from image_jobs.lanes where lane like 'dreams%'") == 0


async def test_a_daemon_without_a_key_leaves_runs_to_those_with_one(db: Db) -> None:
    run = await insert_run(db, processor="openai:gpt-image-2")
    without, having = await new_daemon(db, "demo"), await new_daemon(db, "openai")
    assert await without.claim(10) == []
    assert (await having.claim_one())["id"] == run


async def test_a_run_no_daemon_has_a_key_for_is_claimed_by_any(db: Db) -> None:
    run = await insert_run(db, processor="openai:gpt-image-2")
    daemon = await new_daemon(db, "demo")
    assert (await daemon.claim_one())["id"] == run


async def test_a_minute_without_a_key_holder_is_a_deploy(db: Db) -> None:
    run = await insert_run(db, processor="openai:gpt-image-2")
    having, without = await new_daemon(db, "openai"), await new_daemon(db, "demo")
    await db.execute("select image_jobs.leave($1)", having.id)
    await move_clock(db, "1 min")
    assert await without.claim(10) == []
    await move_clock(db, "3 min")
    assert (await without.claim_one())["id"] == run
