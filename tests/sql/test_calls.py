"""The books: a run's requests, and what becomes of the call of each."""

from decimal import Decimal
from typing import Any

import pytest

from tests.sql.test_models import publish
from tests.support.calls import call, cancel, claimed, closes, delete, parked, payload, requeue, state, take_over
from tests.support.protocol import IMAGE, Daemon, Db, insert_run, new_daemon
from tests.support.runs import run_row

ESTIMATE = Decimal("0.05")


@pytest.fixture(autouse=True)
async def price(db: Db) -> None:
    await publish(db, "demo", {"model": "painter", "price": float(ESTIMATE)})


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
