"""A clock that was hours ahead for a while: what was noted meanwhile neither opens nor closes anything afterwards."""

from collections.abc import AsyncIterator
from datetime import timedelta
from decimal import Decimal

import pytest

from tests.support.postgres import connect, wait_until
from tests.support.protocol import NOON, Daemon, Db, move_clock_to, new_daemon, run_in
from tests.support.runs import insert_run, run_row

pytestmark = pytest.mark.one_postgres

AHEAD = NOON + timedelta(hours=6)


@pytest.fixture
async def listener(database: str) -> AsyncIterator[list[str]]:
    """Listen as daemons do; return what is heard."""
    connection = await connect(database)
    heard: list[str] = []
    await connection.add_listener("image_jobs_wake", lambda *message: heard.append(str(message[3])))
    yield heard
    await connection.close()


async def test_hours_that_were_added_up_too_early_count(db: Db) -> None:
    used = "select usd from image_jobs.used_together(image_jobs.period_start('day'))"
    await move_clock_to(db, AHEAD)
    daemon = await new_daemon(db)
    await db.execute("select image_jobs.add_up_hours()")
    await move_clock_to(db, NOON)
    claim = """insert into image_jobs.calls (id, run_id, provider, model, requested_model, cost, state, opened_at, closed_at, ticket)
        values (nextval('image_jobs.claims'), 'r', 'demo', 'm', 'm', 2, 'charged', image_jobs.now(), image_jobs.now(), 1)"""
    await db.execute(claim)
    assert await db.fetchval(used) == Decimal(2)
    await db.execute("select image_jobs.add_up_hours()")
    await move_clock_to(db, AHEAD)
    await daemon.beat()
    await db.execute("select image_jobs.add_up_hours()")
    assert await db.fetchval(used) == Decimal(2)


async def test_a_mark_that_lies_ahead_hides_no_run(db: Db) -> None:
    await move_clock_to(db, NOON)
    daemon = await new_daemon(db)
    await move_clock_to(db, AHEAD)
    await daemon.beat()
    await daemon.claim()
    await move_clock_to(db, NOON)
    await daemon.beat()
    run = await run_in(db, daemon, "parked")
    await move_clock_to(db, NOON + timedelta(seconds=8))
    (checked,) = await daemon.claim(full_scan=False)
    assert checked["id"] == run
    marks = "select max(due_at) < image_jobs.now() + interval '1 min' from image_jobs.due_marks"
    assert await db.fetchval(marks)


async def test_starts_that_lie_ahead_use_up_no_minute(db: Db) -> None:
    await db.execute("insert into image_jobs.provider_limits (provider, per_minute) values ('demo', 1)")
    await move_clock_to(db, AHEAD)
    daemon = await new_daemon(db)
    await run_in(db, daemon, "running")
    await move_clock_to(db, NOON)
    await daemon.beat()
    await run_in(db, daemon, "running")
    await insert_run(db)
    assert await daemon.claim() == []
    assert await db.fetchval(
        "select until < image_jobs.now() + interval '2 min' from image_provider_status where state = 'limited'"
    )


async def test_a_daemon_last_seen_ahead_is_taken_over(db: Db) -> None:
    await move_clock_to(db, AHEAD)
    daemon, silent = await new_daemon(db, lease="300 s"), await new_daemon(db, lease="300 s")
    run = await run_in(db, silent, "running")
    await move_clock_to(db, NOON)
    # A lease until it may take over, another from when it has first looked, and some steps more: milliseconds decide on each.
    for second in range(0, 1000, 100):
        await move_clock_to(db, NOON + timedelta(seconds=second))
        await daemon.beat()
        await daemon.take_over()
    assert (await run_row(db, run))["status"] == "pending"


async def test_a_daemon_awake_ahead_keeps_others_not_asleep(db: Db, listener: list[str]) -> None:
    await move_clock_to(db, AHEAD)
    daemon: Daemon = await new_daemon(db)
    await daemon.sync(awake=2)
    await move_clock_to(db, NOON)
    await insert_run(db)
    await db.execute("select pg_notify('image_jobs_wake', 'last')")
    await wait_until(lambda: "last" in listener)
    assert listener == ["", "last"]
    await daemon.sync(awake=2)
    assert await db.fetchval(
        "select max(awake_until) < image_jobs.now() + interval '1 min' from image_jobs.wake where provider = 'demo'"
    )
