"""Settlements: the fence, attempts, progress."""

from typing import Any

import asyncpg
import pytest

from tests.support.postgres import connect
from tests.support.protocol import Daemon, Db, move_clock, new_daemon, run_in
from tests.support.runs import event_names, insert_run, insert_runs, run_row

LATER = {"error": "Later.", "code": "unavailable"}


# the fence


async def test_a_repeated_settlement_is_already_settled(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    assert await daemon.complete(claimed) == "settled"
    before = await run_row(db, run), await event_names(db, run)
    assert await daemon.complete(claimed, "https://example.com/other.png") == "already"
    assert (await run_row(db, run), await event_names(db, run)) == before


@pytest.mark.parametrize("outcome", ["retry", "parked", "released"])
async def test_a_repeated_retry_or_park_is_already_settled(db: Db, daemon: Daemon, outcome: str) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    for result in ("settled", "already"):
        entry = {"payload": LATER} if outcome == "retry" else {}
        assert await daemon.settle(claimed, outcome, due_in=60, **entry) == result


async def test_after_requeue_and_reclaim_the_old_claim_is_lost(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    old = await daemon.claim_one()
    await db.execute("update runs set status = 'pending' where id = $1", run)
    new = await daemon.claim_one()
    assert (old["id"], old["attempt"]) == (new["id"], new["attempt"]), "the same pair again"
    assert await daemon.complete(old) == "lost"
    assert await daemon.record(old, progress=90) == "lost"
    assert (await run_row(db, run))["progress"] == 0
    assert await daemon.complete(new) == "settled"


async def test_an_old_and_a_new_claim_in_one_batch_are_told_apart(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    old = await daemon.claim_one()
    await db.execute("update runs set status = 'pending' where id = $1", run)
    new = await daemon.claim_one()
    settlements = [
        {"id": run, "claim": claim["claim"], "outcome": "completed", "payload": {"imageUrl": f"https://{name}.io"}}
        for name, claim in (("old", old), ("new", new))
    ]
    results = {row["claim"]: row["result"] for row in await daemon.sync(settlements=settlements)}
    assert results == {old["claim"]: "lost", new["claim"]: "settled"}
    payload = (await run_row(db, run))["payload"]
    assert payload == {"imageUrl": "https://new.io", "cost": None, "timings": payload["timings"]}


async def test_a_daemon_cannot_settle_runs_of_another(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    other = await new_daemon(db)
    assert await other.complete(claimed) != "settled"
    assert await other.record(claimed, progress=50) == "lost"
    assert (await run_row(db, run))["status"] == "running"
    assert await daemon.complete(claimed) == "settled"


async def test_the_cost_of_a_lost_claim_is_recorded_once(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    await db.execute("update runs set status = 'cancelled' where id = $1", run)
    late = {"kind": "log", "payload": {"event": "late", "message": "Too late.", "data": {"cost": 0.02}}}
    for _ in range(2):
        assert (
            await daemon.settle(claimed, "completed", payload={"imageUrl": "x", "cost": 0.02}, if_lost=late) == "lost"
        )
    assert await event_names(db, run) == ["created", "claimed", "cancelled", "late"]
    assert float(await db.fetchval("select cost from image_jobs.run_costs")) == 0.02


async def test_a_locked_row_is_busy_and_does_not_stall_the_others(database: str, db: Db, daemon: Daemon) -> None:
    locked, free = await insert_runs(db, 2)
    claims = {claimed["id"]: claimed for claimed in await daemon.claim(2)}
    settlements = [
        {"id": run, "claim": claims[run]["claim"], "outcome": "completed", "payload": {"imageUrl": "https://x.io"}}
        for run in (locked, free)
    ]
    progress = [{"id": locked, "claim": claims[locked]["claim"], "progress": 40}]
    locker = await connect(database)
    try:
        async with locker.transaction():
            await locker.execute("select from runs where id = $1 for update", locked)
            await db.execute("set statement_timeout = '5s'")
            rows = await daemon.sync(settlements=settlements, progress=progress)
    finally:
        await locker.close()
    assert {(row["part"], row["id"]): row["result"] for row in rows} == {
        ("recorded", locked): "busy",
        ("settled", locked): "busy",
        ("settled", free): "settled",
    }
    assert await daemon.complete(claims[locked]) == "settled"


async def test_an_unknown_outcome_is_refused(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    with pytest.raises(asyncpg.InvalidParameterValueError, match="unknown outcome"):
        await daemon.settle(claimed, "done")


async def test_completing_needs_an_image_and_failing_a_reason(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    with pytest.raises(asyncpg.CheckViolationError, match="runs_image_when_completed"):
        await daemon.settle(claimed, "completed", payload={})
    with pytest.raises(asyncpg.CheckViolationError, match="runs_reason_when_failed"):
        await daemon.settle(claimed, "failed", payload={"code": "refused"})


# attempts


async def test_a_retry_beyond_the_last_attempt_fails_with_the_reason(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    for attempt in (1, 2, 3):
        claimed = await daemon.claim_one()
        assert claimed["attempt"] == attempt
        await daemon.settle(claimed, "retry", payload=LATER, due_in=0)
    row = await run_row(db, run)
    assert (row["status"], row["attempt"], row["due_at"]) == ("failed", 3, None)
    timings = row["payload"]["timings"]
    assert row["payload"] == {**LATER, "attempts": 3, "possibleCost": None, "timings": timings}
    assert row["finished_at"] is not None
    assert (await event_names(db, run))[-1] == "failed"


async def test_attempts_come_back_for_at_most_an_hour(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)

    async def refused(minutes: int) -> int:
        await move_clock(db, f"{minutes} min")
        await daemon.settle(await daemon.claim_one(), "retry", payload=LATER, due_in=0, refund=True)
        return (await run_row(db, run))["attempt"]

    assert [await refused(minutes) for minutes in (0, 30, 59)] == [0, 0, 0]
    assert [await refused(minutes) for minutes in (61, 62)] == [1, 2]
    assert await refused(63) == 3
    assert (await run_row(db, run))["status"] == "failed"


async def test_an_accepted_request_begins_a_new_hour(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await daemon.settle(await daemon.claim_one(), "retry", payload=LATER, due_in=0, refund=True)
    await move_clock(db, "50 min")
    await daemon.settle(await daemon.claim_one(), "retry", payload=LATER, due_in=0)
    await move_clock(db, "70 min")
    await daemon.settle(await daemon.claim_one(), "retry", payload=LATER, due_in=0, refund=True)
    assert (await run_row(db, run))["attempt"] == 1


async def test_parking_counts_no_attempt_however_often(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    for minutes in range(5):
        await move_clock(db, f"{minutes} min")
        claimed = await daemon.claim_one()
        assert (
            await daemon.settle(claimed, "parked", provider_job_id="order-1", due_in=5, progress=minutes) == "settled"
        )
    row = await run_row(db, run)
    assert (row["attempt"], row["progress"]) == (1, 4)
    assert (await event_names(db, run)).count("parked") == 1


async def test_a_released_run_gets_its_attempt_back_and_goes_first(db: Db, daemon: Daemon) -> None:
    released, *_ = await insert_runs(db, 5)
    claims = await daemon.claim(3, full_scan=False)
    mine = next(claimed for claimed in claims if claimed["id"] == released)
    assert await daemon.settle(mine, "released") == "settled"
    row = await run_row(db, released)
    assert (row["status"], row["attempt"]) == ("pending", 0)
    assert released in {claimed["id"] for claimed in await daemon.claim(2, full_scan=False)}


async def test_a_released_job_is_parked_again(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    assert await daemon.settle(await daemon.claim_one(), "released") == "settled"
    row = await run_row(db, run)
    assert (row["status"], row["attempt"], row["provider_job_id"], row["claimed_by"]) == ("running", 1, "order-1", None)


# progress


async def test_progress_only_grows(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    seen: list[Any] = []
    for progress in (10, 5, 60, None):
        assert await daemon.record(claimed, progress=progress) == "recorded"
        seen.append((await run_row(db, run))["progress"])
    assert seen == [10, 10, 60, 60]


async def test_claim_settle_and_progress_go_in_one_sync(db: Db, daemon: Daemon) -> None:
    await insert_runs(db, 2)
    first, second = await daemon.claim(2)
    waiting = await insert_run(db)
    rows = await daemon.sync(
        1,
        settlements=[
            {
                "id": first["id"],
                "claim": first["claim"],
                "outcome": "completed",
                "payload": {"imageUrl": "https://x.io"},
            }
        ],
        progress=[{"id": second["id"], "claim": second["claim"], "progress": 30}],
    )
    assert [(row["part"], row["id"]) for row in rows] == [
        ("claimed", waiting),
        ("recorded", second["id"]),
        ("settled", first["id"]),
    ]
