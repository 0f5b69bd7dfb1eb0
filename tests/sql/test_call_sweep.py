"""The books: calls that no run names any more."""

from decimal import Decimal

import pytest

from tests.sql.test_models import publish
from tests.support.calls import call, claimed, payload, state, take_over
from tests.support.postgres import connect
from tests.support.protocol import Daemon, Db, new_daemon, set_status

ESTIMATE = Decimal("0.05")


@pytest.fixture(autouse=True)
async def price(db: Db) -> None:
    await publish(db, "demo", {"model": "painter", "price": float(ESTIMATE)})


async def test_the_sweep_closes_calls_that_nothing_names(db: Db, daemon: Daemon) -> None:
    held = await claimed(db, daemon)
    lost = await claimed(db, daemon)
    waiting = await claimed(db, daemon)
    await daemon.park(waiting)
    await db.execute("alter table runs disable trigger user")
    await db.execute("delete from run_events")
    await db.execute("delete from runs where id = $1", lost["id"])
    await db.execute("alter table runs enable trigger user")
    last = None
    for _ in range(3):
        last = await db.fetchval("select image_jobs.sweep_calls($1, 1)", last or 0)
    assert await db.fetchval("select image_jobs.sweep_calls($1, 1)", last) is None
    found = [(await state(db, it["claim"]))[0] for it in (held, lost, waiting)]
    assert found == ["open", "unknown", "open"]


async def forget_claims(db: Db) -> None:
    """Leave calls that no run names, as no statement of ours does."""
    await db.execute("alter table runs disable trigger user")
    await db.execute("update runs set claim = nextval('image_jobs.claims')")
    await db.execute("alter table runs enable trigger user")


async def test_the_sweep_brings_the_payload_up_to_date(db: Db, daemon: Daemon) -> None:
    claim = await claimed(db, daemon)
    await daemon.fail(claim)
    await db.execute("alter table image_jobs.calls disable trigger user")
    await db.execute("update image_jobs.calls set state = 'open', closed_at = null")
    await db.execute("alter table image_jobs.calls enable trigger user")
    await forget_claims(db)
    await db.execute("select image_jobs.sweep_calls()")
    assert await state(db, claim["claim"]) == ("unknown", None)
    assert await payload(db, claim["id"]) == {"possibleCost": float(ESTIMATE)}


async def test_the_sweep_leaves_a_locked_run_to_the_next(database: str, db: Db, daemon: Daemon) -> None:
    claim = await claimed(db, daemon)
    await forget_claims(db)
    other = await connect(database)
    try:
        async with db.transaction():
            await db.execute("select from runs for update")
            await other.execute("select image_jobs.sweep_calls()")
            assert (await state(db, claim["claim"]))[0] == "open"
        await other.execute("select image_jobs.sweep_calls()")
    finally:
        await other.close()
    assert (await state(db, claim["claim"]))[0] == "unknown"


async def test_an_orphaned_job_is_booked_on_the_call_that_made_it(db: Db, daemon: Daemon) -> None:
    first = await claimed(db, daemon)
    await take_over(db, daemon, first["id"])
    attached = await db.fetchval(
        "select image_jobs.attach_provider_job('demo', 'lost-job', $1, $2)", first["id"], first["ticket"]
    )
    assert attached == "attached"
    judge = await new_daemon(db)
    check = await judge.claim_one()
    assert check["call"] == first["claim"]
    await judge.complete(check, cost=0.04)
    assert await db.fetch("select id, state, provider_job_id from image_jobs.calls") == [
        (first["claim"], "charged", "lost-job")
    ]


async def test_a_lost_parked_settlement_names_the_job_on_its_call(db: Db, daemon: Daemon) -> None:
    claim = await claimed(db, daemon)
    await set_status(db, claim["id"], "cancelled")
    assert await daemon.park(claim, "late-job", ticket=claim["ticket"], processor="demo:painter") == "lost"
    assert (await call(db, claim["claim"]))["provider_job_id"] == "late-job"
    (cancellation,) = await db.fetch("select call from image_jobs.cancellations")
    assert cancellation["call"] == claim["claim"]
    await db.execute("select image_jobs.finish_cancellation('demo', 'late-job', null, false, '{\"state\": \"free\"}')")
    assert await state(db, claim["claim"]) == ("free", None)
