"""Runs whose daemon never got the reply, fell silent, or left."""

import asyncpg
import pytest

from tests.support.postgres import connect
from tests.support.protocol import Daemon, Db, events, move_clock, new_daemon, run_in
from tests.support.runs import event_names, insert_run, insert_runs, run_row

# a claim whose reply was lost


async def test_claims_whose_reply_was_lost_are_released(db: Db, daemon: Daemon) -> None:
    ids = await insert_runs(db, 3)
    claims = await daemon.claim(3)
    held, *lost = claims
    await daemon.sync(held=[held["claim"]])
    for run in (claimed["id"] for claimed in lost):
        row = await run_row(db, run)
        assert (row["status"], row["attempt"], row["claimed_by"]) == ("pending", 0, None)
    assert (await run_row(db, held["id"]))["claimed_by"] == daemon.id
    assert {claimed["id"] for claimed in await daemon.claim(3, full_scan=False)} == set(ids) - {held["id"]}
    assert await daemon.complete(held) == "settled"


async def test_a_released_run_with_a_job_is_checked_again(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    await daemon.claim_one()
    await daemon.sync(held=[])
    row = await run_row(db, run)
    assert (row["status"], row["attempt"], row["claimed_by"]) == ("running", 1, None)
    assert (await daemon.claim_one())["id"] == run


async def test_a_daemon_releases_only_its_own_runs(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await daemon.claim_one()
    other = await new_daemon(db)
    await other.sync(held=[])
    assert (await run_row(db, run))["claimed_by"] == daemon.id


# take-over


async def beat_for(daemon: Daemon, start: int, seconds: int) -> None:
    """Beat every four seconds of the moved clock."""
    for second in (*range(start, start + seconds, 4), start + seconds):
        await move_clock(daemon.connection, f"{second} s")
        await daemon.beat()


async def test_only_a_daemon_fresh_for_a_lease_takes_over(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    judge = await new_daemon(db)
    await beat_for(judge, 5, 20)
    assert await judge.take_over() == 0, "not silent for long enough"
    await beat_for(judge, 30, 5)
    assert await judge.take_over() == 1
    row = await run_row(db, run)
    assert (row["status"], row["claimed_by"], row["attempt"]) == ("pending", None, 1)
    assert row["claim"] > claimed["claim"]
    assert await daemon.complete(claimed) == "lost"
    assert (await event_names(db, run))[-1] == "taken_over"
    assert await db.fetchval("select state from image_jobs.daemon_status where id = $1", daemon.id) == "taken over"


async def test_after_an_outage_no_daemon_takes_over_at_once(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    await daemon.claim_one()
    first_back = await new_daemon(db)
    await beat_for(first_back, 5, 60)
    await daemon.beat()
    await move_clock(db, "10 min")
    await first_back.beat()
    assert await first_back.take_over() == 0
    await daemon.beat()
    await beat_for(first_back, 605, 40)
    assert await first_back.take_over() == 1


async def test_a_daemon_without_beats_takes_over_from_none(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    await daemon.claim_one()
    sleeper = await new_daemon(db)
    await beat_for(sleeper, 5, 35)
    await move_clock(db, "5 min")
    assert await sleeper.take_over() == 0


async def test_a_fenced_daemon_gets_ij001_from_beat_and_claim(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    await daemon.claim_one()
    judge = await new_daemon(db)
    await beat_for(judge, 5, 40)
    assert await judge.take_over() == 1
    for call in (daemon.beat(), daemon.claim()):
        with pytest.raises(asyncpg.PostgresError) as fenced:
            await call
        assert fenced.value.sqlstate == "IJ001"


async def test_a_free_session_lock_means_dead_after_six_seconds(database: str, db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    await daemon.claim_one()
    judge = await new_daemon(db, lease="10 s")
    await db.fetchval("select pg_advisory_lock(image_jobs.session_lock_key($1))", judge.id)
    listener = await connect(database)
    try:
        await listener.fetchval("select pg_advisory_lock(image_jobs.session_lock_key($1))", daemon.id)
        await daemon.beat(session_lock=True)
        await beat_for(judge, 3, 20)
        assert await judge.take_over() == 0, "its session lives"
    finally:
        await listener.close()
    async with db.transaction():  # waits for the lock to be free: the server notices a closed session by itself
        await db.execute("select pg_advisory_xact_lock(image_jobs.session_lock_key($1))", daemon.id)
    assert await judge.take_over() == 1


async def test_a_taken_over_parked_run_is_checked_not_submitted(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    await daemon.claim_one()
    judge = await new_daemon(db)
    await beat_for(judge, 10, 45)
    assert await judge.take_over() == 1
    row = await run_row(db, run)
    assert (row["status"], row["attempt"], row["provider_job_id"]) == ("running", 1, "order-1")
    assert (await judge.claim_one())["provider_job_id"] == "order-1"


async def test_an_unknown_outcome_is_retried_as_the_next_attempt(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await db.execute("update runs set max_attempts = 1 where id = $1", run)
    await daemon.claim_one()
    judge = await new_daemon(db)
    await beat_for(judge, 5, 40)
    assert await judge.take_over() == 1
    row = await run_row(db, run)
    assert (row["status"], row["payload"]["code"]) == ("failed", "outcome_unknown")
    taken = next(event for event in await events(db, run) if event["event"] == "taken_over")
    assert "unknown" in taken["message"]


async def test_a_locked_run_is_taken_over_at_the_next_look(database: str, db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await daemon.claim_one()
    judge = await new_daemon(db)
    await beat_for(judge, 5, 40)
    locker = await connect(database)
    try:
        async with locker.transaction():
            await locker.execute("select from runs where id = $1 for update", run)
            assert await judge.take_over() == 0
    finally:
        await locker.close()
    assert await judge.take_over() == 1
    assert (await run_row(db, run))["status"] == "pending"


async def test_a_daemon_that_leaves_gives_back_what_it_holds(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await daemon.claim_one()
    await db.execute("select image_jobs.leave($1)", daemon.id)
    assert (await run_row(db, run))["claimed_by"] is None
    assert await db.fetchval("select state from image_jobs.daemon_status") == "stopped"
