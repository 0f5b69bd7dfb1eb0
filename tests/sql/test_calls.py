"""The books: a run's requests, and what becomes of the call of each."""

import asyncio
from decimal import Decimal
from typing import Any

import asyncpg
import pytest

from tests.sql.test_models import publish
from tests.sql.test_take_over import beat_for
from tests.support.postgres import connect, wait_until
from tests.support.protocol import IMAGE, Daemon, Db, events, insert_run, move_clock, new_daemon, set_status
from tests.support.runs import run_row

ESTIMATE = Decimal("0.05")


@pytest.fixture(autouse=True)
async def price(db: Db) -> None:
    await publish(db, "demo", {"model": "painter", "price": float(ESTIMATE)})


async def call(db: Db, number: int) -> dict[str, Any]:
    """Fetch one call."""
    row = await db.fetchrow("select * from image_jobs.calls where id = $1", number)
    assert row is not None
    return dict(row)


async def state(db: Db, number: int) -> tuple[str, Decimal | None]:
    row = await call(db, number)
    assert (row["closed_at"] is None) == (row["state"] == "open")
    return row["state"], row["cost"]


async def payload(db: Db, run: str) -> dict[str, Any]:
    found = (await run_row(db, run))["payload"] or {}
    return {key: found[key] for key in ("cost", "possibleCost") if key in found}


async def claimed(db: Db, daemon: Daemon, **options: Any) -> dict[str, Any]:
    await insert_run(db, **options)
    return await daemon.claim_one()


async def parked(db: Db, daemon: Daemon) -> dict[str, Any]:
    """Return the claim whose run is parked with a provider job."""
    first = await claimed(db, daemon)
    assert await daemon.park(first, due_in=0) == "settled"
    return first


def closes(claim: dict[str, Any], state: str, **more: Any) -> list[dict[str, Any]]:
    return [{"id": claim["call"], "state": state, **more}]


# opened


async def test_starting_a_run_opens_its_call(db: Db, daemon: Daemon) -> None:
    claim = await claimed(db, daemon)
    row = await call(db, claim["claim"])
    run = await run_row(db, claim["id"])
    assert claim["call"] == claim["claim"]
    assert (row["run_id"], row["workflow_id"], row["user_id"]) == (run["id"], run["subject_id"], run["created_by"])
    assert (row["provider"], row["model"], row["requested_model"]) == ("demo", "painter", "painter")
    assert (row["estimate"], row["cost"], row["state"], row["closed_at"]) == (ESTIMATE, None, "open", None)


async def test_a_check_opens_no_call_and_names_the_first(db: Db, daemon: Daemon) -> None:
    first = await parked(db, daemon)
    check = await daemon.claim_one()
    assert (check["claim"] > first["claim"], check["call"]) == (True, first["claim"])
    assert await db.fetchval("select count(*) from image_jobs.calls") == 1
    assert (await call(db, first["claim"]))["provider_job_id"] == "order-1"


async def test_a_retired_model_is_booked_on_its_successor(db: Db, daemon: Daemon) -> None:
    await publish(
        db, "demo", {"model": "new", "price": 0.07}, {"model": "old", "retired": "2020-01-01", "successor": "new"}
    )
    claim = await claimed(db, daemon, processor="demo:old")
    row = await call(db, claim["claim"])
    assert (row["model"], row["requested_model"], row["estimate"]) == ("new", "old", Decimal("0.07"))
    await daemon.complete(claim, cost=0.07)
    (costs,) = await db.fetch("select model, calls, images, cost from image_jobs.run_costs")
    assert tuple(costs) == ("new", 1, 1, Decimal("0.07"))


async def test_a_fallback_is_booked_on_the_provider_that_drew(db: Db, daemon: Daemon) -> None:
    other = await new_daemon(db, "demo", "openai")
    claim = await claimed(db, daemon, fallback=["openai:gpt-image-2"])
    await daemon.settle(
        claim,
        "failed",
        payload={"error": "Gone.", "code": "model_retired"},
        fall_back=True,
        calls=closes(claim, "free"),
    )
    again = await other.claim_one()
    row = await call(db, again["claim"])
    assert (row["provider"], row["model"], row["requested_model"]) == ("openai", "gpt-image-2", "painter")


async def test_an_operators_provider_job_gets_a_call_of_its_own(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await db.execute("update runs set provider_job_id = 'theirs' where id = $1", run)
    claim = await daemon.claim_one()
    assert (claim["provider_job_id"], claim["call"]) == ("theirs", claim["claim"])
    assert (await call(db, claim["claim"]))["provider_job_id"] == "theirs"


# the table of fates


FATES: list[tuple[str, dict[str, Any], str, tuple[str, Decimal | None]]] = [
    ("picture", {"payload": {"imageUrl": IMAGE}}, "completed", ("charged", Decimal("0.04"))),
    ("picture without a price", {"payload": {"imageUrl": IMAGE}}, "completed", ("charged", None)),
    ("refusal with usage", {"payload": {"error": "No."}}, "failed", ("charged", Decimal("0.01"))),
    ("refusal", {"payload": {"error": "No."}}, "failed", ("free", None)),
    ("rate limit", {"payload": {"error": "Slow."}, "refund": True}, "retry", ("free", None)),
    ("timeout", {"payload": {"error": "Silence."}}, "retry", ("unknown", None)),
    ("handed back", {}, "released", ("free", None)),
    ("storage failed", {"payload": {"error": "Full.", "code": "storage"}}, "failed", ("charged", Decimal("0.04"))),
]


@pytest.mark.parametrize("fate", FATES, ids=[fate[0] for fate in FATES])
async def test_each_fate_closes_the_call_as_it_says(db: Db, daemon: Daemon, fate: tuple[Any, ...]) -> None:
    """The rows of the table of fates that a settlement decides: first the daemon says so, then it is left to the outcome."""
    _, settlement, outcome, wanted = fate
    claim = await claimed(db, daemon)
    await daemon.settle(
        claim, outcome, **settlement, calls=closes(claim, wanted[0], cost=wanted[1] and float(wanted[1]))
    )
    assert await state(db, claim["claim"]) == wanted
    assert await daemon.settle(claim, outcome, **settlement) == "already"
    assert await state(db, claim["claim"]) == wanted


@pytest.mark.parametrize(("outcome", "settlement", "wanted"), [
    ("completed", {"payload": {"imageUrl": IMAGE, "cost": 0.04}}, ("charged", Decimal("0.04"))),
    ("failed", {"payload": {"error": "No."}}, ("unknown", None)),
    ("retry", {"payload": {"error": "No."}}, ("unknown", None)),
    ("retry", {"payload": {"error": "No."}, "refund": True}, ("free", None)),
    ("parked", {"provider_job_id": "job", "due_in": 9}, ("open", None)),
    ("released", {}, ("free", None)),
])  # fmt: skip
async def test_a_settlement_without_calls_goes_by_its_outcome(
    db: Db, daemon: Daemon, outcome: str, settlement: dict[str, Any], wanted: tuple[str, Decimal | None]
) -> None:
    claim = await claimed(db, daemon)
    await daemon.settle(claim, outcome, **settlement)
    assert await state(db, claim["claim"]) == wanted


async def test_a_check_that_is_handed_back_leaves_the_call_open(db: Db, daemon: Daemon) -> None:
    first = await parked(db, daemon)
    await daemon.settle(await daemon.claim_one(), "released")
    assert await state(db, first["claim"]) == ("open", None)


async def take_over(db: Db, daemon: Daemon, run: str) -> None:
    judge = await new_daemon(db)
    await beat_for(judge, 5, 40)
    assert await judge.take_over() == 1


async def cancel(db: Db, daemon: Daemon, run: str) -> None:
    await set_status(db, run, "cancelled")


async def requeue(db: Db, daemon: Daemon, run: str) -> None:
    await set_status(db, run, "pending")


async def delete(db: Db, daemon: Daemon, run: str) -> None:
    await db.execute("delete from runs where id = $1", run)


AWAY = (take_over, cancel, requeue, delete)


@pytest.mark.parametrize("away", AWAY, ids=lambda it: it.__name__)
@pytest.mark.parametrize(("said", "wanted"), [
    (None, ("unknown", None)), ("charged", ("charged", Decimal("0.04"))), ("free", ("free", None)), ("unknown", ("unknown", None)),
])  # fmt: skip
async def test_a_call_taken_away_is_unknown_until_the_holder_speaks(
    db: Db, daemon: Daemon, away: Any, said: str | None, wanted: tuple[str, Decimal | None]
) -> None:
    claim = await claimed(db, daemon)
    await away(db, daemon, claim["id"])
    assert await state(db, claim["claim"]) == ("unknown", None)
    if said is not None:
        cost = 0.04 if said == "charged" else None
        assert await daemon.settle(claim, "released", calls=closes(claim, said, cost=cost, image=True)) == "lost"
    assert await state(db, claim["claim"]) == wanted


@pytest.mark.parametrize("away", (cancel, requeue, delete), ids=lambda it: it.__name__)
@pytest.mark.parametrize("response", [
    (None, False, {"state": "free"}, ("free", None)),
    (None, False, {"state": "charged", "cost": 0.03}, ("charged", Decimal("0.03"))),
    (None, False, None, ("unknown", None)),
    ("Too late.", True, None, ("unknown", None)),
])  # fmt: skip
@pytest.mark.parametrize("held", [False, True])
async def test_a_parked_call_stays_open_until_the_cancel_is_answered(
    db: Db, daemon: Daemon, away: Any, held: bool, response: tuple[Any, ...]
) -> None:
    *said, wanted = response
    first = await parked(db, daemon)
    if held:
        await daemon.claim_one()
    await away(db, daemon, first["id"])
    await db.fetch("select image_jobs.sweep_calls()")
    assert await state(db, first["claim"]) == ("open", None)
    await db.execute("select image_jobs.finish_cancellation('demo', 'order-1', $1, $2, $3)", *said)
    assert await state(db, first["claim"]) == wanted


async def test_a_take_over_of_a_check_leaves_the_call_open(db: Db, daemon: Daemon) -> None:
    first = await parked(db, daemon)
    check = await daemon.claim_one()
    await take_over(db, daemon, first["id"])
    assert await state(db, first["claim"]) == ("open", None)
    judge = await new_daemon(db)
    again = await judge.claim_one()
    assert again["call"] == first["claim"]
    for late in (again, check):
        await judge.settle(late, "completed", payload={"imageUrl": IMAGE, "cost": 0.04})
    assert await state(db, first["claim"]) == ("charged", Decimal("0.04"))
    assert await payload(db, first["id"]) == {"cost": 0.04}
    (costs,) = await db.fetch("select calls, images, cost, possible_cost from image_jobs.run_costs")
    assert tuple(costs) == (1, 1, Decimal("0.04"), None)


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
    said = {"id": claim["call"], "estimate": 0.19, "model": "painter-2", "sent": True}
    assert await daemon.record(claim, calls=[said]) == "recorded"
    row = await call(db, claim["claim"])
    assert (row["estimate"], row["model"], row["sent"], row["state"]) == (Decimal("0.19"), "painter-2", True, "open")


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
async def test_payload_of_an_ended_run_follows_a_late_answer(db: Db, daemon: Daemon, end: str) -> None:
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
    await daemon.record(claim, calls=[{"id": claim["call"], "sent": True}])
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


# the sweep


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
