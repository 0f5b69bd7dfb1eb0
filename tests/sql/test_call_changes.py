"""The books: what may change in them, and what payloads say."""

from decimal import Decimal

import asyncpg
import pytest

from tests.sql.test_models import publish
from tests.support.calls import call, claimed, closes, payload, state, take_over
from tests.support.protocol import Daemon, Db, events, insert_run, move_clock, new_daemon, set_status
from tests.support.runs import run_row

ESTIMATE = Decimal("0.05")


@pytest.fixture(autouse=True)
async def price(db: Db) -> None:
    await publish(db, "demo", {"model": "painter", "price": float(ESTIMATE)})


# what may change


@pytest.mark.parametrize("was", ["open", "charged", "unknown", "free"])
@pytest.mark.parametrize("becomes", ["open", "charged", "unknown", "free"])
async def test_only_an_unknown_call_changes_once_it_is_closed(db: Db, daemon: Daemon, was: str, becomes: str) -> None:
    allowed = was in ("open", becomes) or (was == "unknown" and becomes in ("charged", "free"))
    claim = (await claimed(db, daemon))["claim"]
    await db.execute("select image_jobs.close_calls($1)", [{"id": claim, "state": was}])
    await db.execute("select image_jobs.close_calls($1)", [{"id": claim, "state": becomes}])
    assert (await state(db, claim))[0] == (becomes if allowed else was)
    await db.execute("delete from image_jobs.calls; ")
    second = (await claimed(db, daemon))["claim"]
    await db.execute("select image_jobs.close_calls($1)", [{"id": second, "state": was}])
    change = db.execute("update image_jobs.calls set state = $2 where id = $1", second, becomes)
    if allowed and becomes != "open":
        await change
    elif was != becomes:
        with pytest.raises(asyncpg.InvalidParameterValueError, match="cannot become"):
            await change
    else:
        await change


async def test_the_daemons_estimate_and_model_replace_the_guess(db: Db, daemon: Daemon) -> None:
    claim = await claimed(db, daemon)
    said = {"id": claim["call"], "estimate": 0.19, "model": "painter-2", "sent_ago": 0}
    assert await daemon.record(claim, calls=[said]) == "recorded"
    row = await call(db, claim["claim"])
    assert (row["estimate"], row["model"], row["state"]) == (Decimal("0.19"), "painter-2", "open")
    assert row["sent_at"] is not None


async def test_a_cost_that_is_recorded_survives_a_take_over(db: Db, daemon: Daemon) -> None:
    claim = await claimed(db, daemon)
    await daemon.record(claim, calls=closes(claim, "charged", cost=0.04, image=True))
    await take_over(db, daemon, claim["id"])
    assert await state(db, claim["claim"]) == ("charged", Decimal("0.04"))
    (taken,) = [it for it in await events(db, claim["id"]) if it["event"] == "taken_over"]
    assert "possibleCost" not in taken["data"]


# payloads


async def test_payload_adds_up_the_calls_of_the_ticket(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    again = {"payload": {"error": "Again.", "code": "unavailable"}, "due_in": 0}
    first = await daemon.claim_one()
    await daemon.settle(first, "retry", **again, calls=closes(first, "charged", cost=0.01))
    second = await daemon.claim_one()
    await daemon.settle(second, "retry", **again, calls=closes(second, "unknown"))
    third = await daemon.claim_one()
    await daemon.complete(third, cost=0.04)
    assert await payload(db, run) == {"cost": 0.05, "possibleCost": float(ESTIMATE)}
    await set_status(db, run, "pending")
    await daemon.complete(await daemon.claim_one())
    assert await payload(db, run) == {"cost": None}


@pytest.mark.parametrize("end", ["completed", "failed"])
async def test_payload_of_an_ended_run_follows_a_late_result(db: Db, daemon: Daemon, end: str) -> None:
    first = await claimed(db, daemon)
    await take_over(db, daemon, first["id"])
    await move_clock(db, "2 min")
    judge = await new_daemon(db)
    second = await judge.claim_one()
    if end == "completed":
        await judge.complete(second, cost=0.04)
    else:
        await judge.settle(second, "failed", payload={"error": "No."}, calls=closes(second, "charged", cost=0.04))
    assert await payload(db, first["id"]) == {"cost": 0.04, "possibleCost": float(ESTIMATE)}
    await daemon.settle(first, "released", calls=closes(first, "charged", cost=0.03))
    assert await payload(db, first["id"]) == {"cost": 0.07}


async def test_a_possible_cost_that_was_none_goes(db: Db, daemon: Daemon) -> None:
    first = await claimed(db, daemon)
    await take_over(db, daemon, first["id"])
    await move_clock(db, "2 min")
    judge = await new_daemon(db)
    second = await judge.claim_one()
    await judge.settle(second, "failed", payload={"error": "No."}, calls=closes(second, "free"))
    assert await payload(db, first["id"]) == {"possibleCost": float(ESTIMATE)}
    await daemon.settle(first, "released", calls=closes(first, "free"))
    assert await payload(db, first["id"]) == {}


@pytest.mark.parametrize("said", ["before", "afterwards"])
async def test_payload_of_a_run_given_up_says_what_it_cost(db: Db, daemon: Daemon, said: str) -> None:
    claim = await claimed(db, daemon)
    charged = closes(claim, "charged", cost=0.04)
    await db.execute("update runs set max_attempts = 1")
    if said == "before":
        await daemon.record(claim, calls=charged)
    await take_over(db, daemon, claim["id"])
    assert (await run_row(db, claim["id"]))["status"] == "failed"
    if said == "afterwards":
        assert await payload(db, claim["id"]) == {"possibleCost": float(ESTIMATE)}
        assert await daemon.record(claim, calls=charged) == "lost"
    assert await payload(db, claim["id"]) == {"cost": 0.04}


# given back as unheld


async def test_the_second_time_unheld_costs_an_attempt(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    states = []
    for _ in range(4):
        claim = await daemon.claim_one()
        await daemon.sync(held=[])
        row = await run_row(db, run)
        states.append((row["status"], row["attempt"], (await call(db, claim["claim"]))["state"]))
    assert states == [
        ("pending", 0, "free"),
        ("pending", 1, "unknown"),
        ("pending", 2, "unknown"),
        ("failed", 3, "unknown"),
    ]
    assert (await run_row(db, run))["payload"]["code"] == "outcome_unknown"


async def test_an_unheld_run_whose_request_went_out_costs_an_attempt(db: Db, daemon: Daemon) -> None:
    claim = await claimed(db, daemon)
    await daemon.record(claim, calls=[{"id": claim["call"], "sent_ago": 0}])
    await daemon.sync(held=[])
    assert (await run_row(db, claim["id"]))["attempt"] == 1
    assert await state(db, claim["claim"]) == ("unknown", None)


async def test_a_late_list_of_held_claims_frees_no_newer_one(db: Db, daemon: Daemon) -> None:
    newest = await db.fetchval("select last_value from image_jobs.claims")
    claim = await claimed(db, daemon)
    await daemon.sync(held=[], newest=newest)
    assert (await run_row(db, claim["id"]))["claimed_by"] == daemon.id
    assert await daemon.record(claim, calls=closes(claim, "charged", cost=0.04)) == "recorded"
    assert await state(db, claim["claim"]) == ("charged", Decimal("0.04"))


async def test_a_list_made_after_a_claim_gives_back_what_it_lacks(db: Db, daemon: Daemon) -> None:
    claim = await claimed(db, daemon)
    await daemon.sync(held=[], newest=await db.fetchval("select last_value from image_jobs.claims"))
    assert (await run_row(db, claim["id"]))["claimed_by"] is None
    assert await state(db, claim["claim"]) == ("free", None)


async def test_requeueing_forgets_that_a_run_was_unheld(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    for _ in range(2):
        await daemon.claim_one()
        await daemon.sync(held=[])
        assert (await run_row(db, run))["attempt"] == 0
        await set_status(db, run, "pending")
