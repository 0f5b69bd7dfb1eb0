"""The books: whose call a provider job is charged to."""

import asyncio
from decimal import Decimal

import pytest

from tests.sql.test_models import publish
from tests.support.calls import claimed, closes, parked, payload, state, take_over
from tests.support.postgres import connect, wait_until
from tests.support.protocol import IMAGE, Daemon, Db, insert_run, move_clock, new_daemon, set_status

ESTIMATE = Decimal("0.05")


@pytest.fixture(autouse=True)
async def price(db: Db) -> None:
    await publish(db, "demo", {"model": "painter", "price": float(ESTIMATE)})


async def test_late_success_replaces_a_polling_timeout(db: Db, daemon: Daemon) -> None:
    first = await parked(db, daemon)
    check = await daemon.claim_one()
    await daemon.settle(
        check, "failed", payload={"error": "Late.", "code": "polling_timeout"}, calls=closes(check, "unknown")
    )
    assert await state(db, first["claim"]) == ("unknown", None)
    assert await payload(db, first["id"]) == {"possibleCost": float(ESTIMATE)}
    await set_status(db, first["id"], "pending")
    again = await daemon.claim_one()
    assert (again["provider_job_id"], again["call"]) == ("order-1", first["claim"])
    await daemon.complete(again, cost=0.04)
    assert await db.fetch("select state, cost from image_jobs.calls") == [("charged", Decimal("0.04"))]
    assert await payload(db, first["id"]) == {"cost": 0.04}


@pytest.mark.parametrize("named", [True, False])
async def test_a_job_that_was_found_keeps_the_call_that_made_it(db: Db, daemon: Daemon, named: bool) -> None:
    """Its id was never saved, or its check was given up; the next attempt looks at the provider before it submits."""
    first = await claimed(db, daemon)
    lost = closes(first, "unknown", **({"provider_job_id": "order-1"} if named else {}))
    await daemon.settle(first, "retry", payload={"error": "Late."}, due_in=0, calls=lost)
    second = await daemon.claim_one()
    await daemon.park(second, due_in=0, found=True, calls=closes(second, "open", provider_job_id="order-1"))
    check = await daemon.claim_one()
    assert check["call"] == first["claim"]
    await daemon.complete(check, cost=0.04)
    assert [await state(db, it["claim"]) for it in (first, second)] == [("charged", Decimal("0.04")), ("free", None)]
    assert await payload(db, first["id"]) == {"cost": 0.04}


async def test_a_job_that_was_found_without_its_call_gets_one(db: Db, daemon: Daemon) -> None:
    first = await claimed(db, daemon)
    await daemon.settle(first, "retry", payload={"error": "No."}, due_in=0, refund=True, calls=closes(first, "free"))
    second = await daemon.claim_one()
    await daemon.park(second, due_in=0, found=True, calls=closes(second, "open", provider_job_id="order-1"))
    check = await daemon.claim_one()
    assert check["call"] == second["claim"]
    await daemon.complete(check, cost=0.04)
    assert await state(db, second["claim"]) == ("charged", Decimal("0.04"))


async def test_a_found_job_of_a_lost_claim_stays_with_its_maker(db: Db, daemon: Daemon) -> None:
    first = await claimed(db, daemon)
    await daemon.settle(first, "retry", payload={"error": "Late."}, due_in=0, calls=closes(first, "unknown"))
    finder = await daemon.claim_one()
    await take_over(db, daemon, finder["id"])
    found = {"found": True, "ticket": finder["ticket"], "processor": "demo:painter"}
    found["calls"] = closes(finder, "open", provider_job_id="order-1")
    assert await daemon.park(finder, due_in=0, **found) == "lost"
    judge = await new_daemon(db)
    check = await judge.claim_one()
    assert (check["provider_job_id"], check["call"]) == ("order-1", first["claim"])
    await judge.complete(check, cost=0.04)
    assert [await state(db, it["claim"]) for it in (first, finder)] == [("charged", Decimal("0.04")), ("free", None)]


@pytest.mark.parametrize("together", [True, False])
async def test_a_job_of_two_runs_is_booked_once(db: Db, daemon: Daemon, together: bool) -> None:
    """Some providers return the same job for the same request."""
    await insert_run(db)
    await insert_run(db)
    claims = await daemon.claim(2)
    shared = [
        {"id": it["id"], "claim": it["claim"], "outcome": "parked", "provider_job_id": "order-1", "due_in": 0,
         "ticket": it["ticket"], "processor": "demo:painter", "calls": closes(it, "open", provider_job_id="order-1")}
        for it in claims
    ]  # fmt: skip
    for batch in [shared] if together else [[it] for it in reversed(shared)]:
        await daemon.sync(settlements=batch)
    first = min(it["claim"] for it in claims) if together else shared[1]["claim"]
    checks = await daemon.claim(2)
    assert {it["call"] for it in checks} == {first}
    for check in checks:
        await daemon.complete(check, cost=0.04)
    found = {it["claim"]: await state(db, it["claim"]) for it in claims}
    assert found.pop(first) == ("charged", Decimal("0.04"))
    assert list(found.values()) == [("free", None)]
    assert sorted([(await payload(db, it["id"]))["cost"] for it in claims]) == [0, 0.04]


async def test_a_job_is_charged_by_the_run_that_still_waits(db: Db, daemon: Daemon) -> None:
    first = await parked(db, daemon)
    await insert_run(db)
    (other,) = [it for it in await daemon.claim(2) if it["id"] != first["id"]]
    await daemon.park(other, due_in=0)
    await set_status(db, first["id"], "cancelled")
    assert await state(db, first["claim"]) == ("unknown", None)
    check = await daemon.claim_one()
    await daemon.complete(check, cost=0.04)
    assert await state(db, first["claim"]) == ("charged", Decimal("0.04"))


async def test_an_old_job_of_the_same_id_is_another(db: Db, daemon: Daemon) -> None:
    await parked(db, daemon)
    await daemon.complete(await daemon.claim_one(), cost=0.04)
    await move_clock(db, "2 days")
    second = await parked(db, await new_daemon(db))
    assert await state(db, second["claim"]) == ("open", None)


async def test_two_daemons_that_park_a_job_at_once_book_it_once(database: str, db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    await insert_run(db)
    first, second = await daemon.claim(2)
    other = await connect(database)
    try:
        async with db.transaction():
            await daemon.park(first)
            later = asyncio.create_task(Daemon(other, daemon.id).park(second))
            waits = "select count(*) from pg_locks where pid = $1 and locktype = 'advisory' and not granted"
            await wait_until(lambda: db.fetchval(waits, other.get_server_pid()))
        assert await later == "settled"
    finally:
        await other.close()
    assert await state(db, first["claim"]) == ("open", None)
    assert await state(db, second["claim"]) == ("free", None)


async def test_an_adopted_picture_charges_the_call_that_drew_it(db: Db, daemon: Daemon) -> None:
    first = await claimed(db, daemon)
    await take_over(db, daemon, first["id"])
    await move_clock(db, "2 min")
    judge = await new_daemon(db)
    second = await judge.claim_one()
    drawn = {"id": first["call"], "state": "charged", "cost": 0.04, "image": True}
    calls = [*closes(second, "free"), drawn]
    await judge.settle(second, "completed", payload={"imageUrl": IMAGE}, calls=calls)
    assert [await state(db, it["claim"]) for it in (first, second)] == [("charged", Decimal("0.04")), ("free", None)]
    assert await payload(db, first["id"]) == {"cost": 0.04}
