"""Orders that nobody waits for any more: which they are, who cancels them, and what is said of it."""

from typing import Any

import pytest

from tests.runs import insert_run, run_row
from tests.sql.protocol import OPERATORS, Daemon, Db, events, move_clock, new_daemon, run_in, set_status


async def outbox(db: Db) -> list[str]:
    return [row[0] for row in await db.fetch("select provider_job_id from private.cancellations order by 1")]


async def take(db: Db, *providers: str, limit: int = 10) -> list[dict[str, Any]]:
    rows = await db.fetch("select private.take_cancellations($1, $2)", list(providers or ("demo",)), limit)
    return [row[0] for row in rows]


async def finish(db: Db, reason: str | None = None, *, final: bool = False, order: str = "order-1") -> None:
    await db.execute("select private.finish_cancellation('demo', $1, $2, $3)", order, reason, final)


# which they are


@pytest.mark.parametrize("role", OPERATORS)
@pytest.mark.parametrize("status", ["cancelled", "pending"])
@pytest.mark.parametrize("state", ["parked", "checked"])
async def test_a_run_that_is_taken_away_by_hand_has_its_order_cancelled(
    db: Db, daemon: Daemon, state: str, status: str, role: str
) -> None:
    run = await run_in(db, daemon, "parked")
    if state == "checked":
        await move_clock(db, "6 s")
        await daemon.claim_one()
    await set_status(db, run, status, role)
    assert await take(db) == [{"provider": "demo", "provider_job_id": "order-1", "run_id": run}]


async def test_a_cancelled_requeue_has_the_order_cancelled_that_it_was_to_ask_for(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    await daemon.fail(await daemon.claim_one(), "polling_timeout")
    await set_status(db, run, "pending")
    assert await outbox(db) == []
    await set_status(db, run, "cancelled")
    assert await outbox(db) == ["order-1"]


@pytest.mark.parametrize("state", ["pending", "running"])
async def test_a_run_without_an_order_has_none_to_cancel(db: Db, daemon: Daemon, state: str) -> None:
    run = await run_in(db, daemon, state)
    await set_status(db, run, "cancelled")
    assert await outbox(db) == []


async def test_taking_over_polling_and_ending_cancel_no_order(db: Db, daemon: Daemon) -> None:
    await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    await daemon.claim_one()
    await db.execute("select private.abandon_runs($1)", daemon.id)
    other = await new_daemon(db)
    await other.park(await other.claim_one(), due_in=0)
    await other.complete(await other.claim_one())
    await db.execute("update runs set status = 'pending'")
    assert await outbox(db) == []


async def test_a_daemon_that_orders_anew_leaves_the_order_that_had_failed(db: Db, daemon: Daemon) -> None:
    await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    await daemon.settle(await daemon.claim_one(), "retry", payload={"error": "It failed."})
    assert await outbox(db) == []


@pytest.mark.parametrize("status", ["cancelled", "pending"])
async def test_an_order_that_comes_after_its_run_was_taken_away_is_cancelled(
    db: Db, daemon: Daemon, status: str
) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    await set_status(db, run, status)
    before = await run_row(db, run)
    assert await daemon.park(claimed, ticket=claimed["ticket"]) == "lost"
    assert await daemon.park(claimed, ticket=claimed["ticket"]) == "lost"  # the acknowledgement was lost
    assert await outbox(db) == ["order-1"]
    assert await run_row(db, run) == before


async def test_an_order_that_comes_after_a_take_over_goes_to_the_run_that_waits_for_its_next_attempt(
    db: Db, daemon: Daemon
) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    await db.execute("select private.abandon_runs($1)", daemon.id)
    assert await daemon.park(claimed, ticket=claimed["ticket"]) == "lost"
    assert await outbox(db) == []
    other = await new_daemon(db)
    assert (await other.claim_one())["provider_job_id"] == "order-1"


async def test_an_order_that_comes_after_a_take_over_is_left_while_the_next_attempt_is_at_work(
    db: Db, daemon: Daemon
) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    await db.execute("select private.abandon_runs($1)", daemon.id)
    await move_clock(db, "3 s")
    other = await new_daemon(db)
    again = await other.claim_one()
    assert await daemon.park(claimed, ticket=claimed["ticket"]) == "lost"
    assert await outbox(db) == []
    assert await other.complete(again) == "settled"


async def test_that_order_is_not_forgotten_and_cancelled_if_the_next_attempt_makes_its_own(
    db: Db, daemon: Daemon
) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    await db.execute("select private.abandon_runs($1)", daemon.id)
    await move_clock(db, "3 s")
    other = await new_daemon(db)
    again = await other.claim_one()
    assert await daemon.park(claimed, ticket=claimed["ticket"]) == "lost"
    assert await other.park(again, "order-2", due_in=3600) == "settled"
    await move_clock(db, "65 s")
    await db.execute("select private.sweep_webhooks()")
    assert await outbox(db) == ["order-1"]
    assert "webhook" not in [event["event"] for event in await events(db, again["id"])]


async def test_that_order_is_used_if_the_next_attempt_ends_without_knowing_what_came_of_it(
    db: Db, daemon: Daemon
) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    await db.execute("select private.abandon_runs($1)", daemon.id)
    await move_clock(db, "3 s")
    other = await new_daemon(db)
    again = await other.claim_one()
    assert await daemon.park(claimed, ticket=claimed["ticket"]) == "lost"
    await other.settle(again, "retry", due_in=60, payload={"error": "No answer.", "code": "outcome_unknown"})
    checking = await other.claim_one()
    assert (checking["provider_job_id"], checking["webhook"]) == ("order-1", None)  # no webhook of it will come
    await other.complete(checking)
    await move_clock(db, "65 s")
    await db.execute("select private.sweep_webhooks()")
    assert await outbox(db) == []


async def test_that_order_is_left_alone_if_the_next_attempt_found_it_itself(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    await db.execute("select private.abandon_runs($1)", daemon.id)
    await move_clock(db, "3 s")
    other = await new_daemon(db)
    again = await other.claim_one()
    assert await daemon.park(claimed, ticket=claimed["ticket"]) == "lost"
    assert await other.park(again, due_in=3600) == "settled"
    await move_clock(db, "65 s")
    await db.execute("select private.sweep_webhooks()")
    assert await outbox(db) == []
    assert (await run_row(db, again["id"]))["provider_job_id"] == "order-1"


async def test_an_order_whose_acknowledgement_was_lost_is_not_late_although_its_check_has_begun(
    db: Db, daemon: Daemon
) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    late = {"kind": "log", "payload": {"event": "late_order", "message": "It came late."}}
    assert await daemon.park(claimed, due_in=0, ticket=claimed["ticket"], if_lost=late) == "settled"
    checking = await daemon.claim_one()
    assert await daemon.park(claimed, due_in=0, ticket=claimed["ticket"], if_lost=late) == "lost"
    assert [event["event"] for event in await events(db, claimed["id"])] == ["created", "claimed", "parked"]
    assert await outbox(db) == []
    assert await daemon.complete(checking) == "settled"


@pytest.mark.parametrize("state", ["parked", "checked", "pending"])
async def test_a_run_that_is_deleted_has_its_order_cancelled(db: Db, daemon: Daemon, state: str) -> None:
    run = await run_in(db, daemon, "parked")
    if state != "parked":
        await move_clock(db, "6 s")
        checking = await daemon.claim_one()
        if state == "pending":
            await daemon.fail(checking, "polling_timeout")
            await set_status(db, run, "pending")
    await db.execute("delete from runs")
    assert await outbox(db) == ["order-1"]
    await take(db)
    await finish(db)
    assert await outbox(db) == []


async def test_a_run_that_is_deleted_after_its_end_has_no_order_to_cancel(db: Db, daemon: Daemon) -> None:
    await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    await daemon.complete(await daemon.claim_one())
    await db.execute("delete from runs")
    assert await outbox(db) == []


@pytest.mark.parametrize("change", ["update runs set status = 'cancelled'", "delete from runs"])
async def test_an_order_that_two_runs_share_is_cancelled_with_the_last_of_them(
    db: Db, daemon: Daemon, change: str
) -> None:
    first, second = await run_in(db, daemon, "parked"), await run_in(db, daemon, "parked")
    await db.execute(f"{change} where id = $1", first)
    assert await outbox(db) == []
    await db.execute(f"{change} where id = $1", second)
    assert await outbox(db) == ["order-1"]


# who cancels them


async def test_a_cancellation_is_leased_to_one_daemon_that_serves_the_provider(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await set_status(db, run, "cancelled")
    assert await take(db, "openai") == []
    assert len(await take(db)) == 1
    assert await take(db) == []
    await move_clock(db, "61 s")  # whoever took it was killed
    assert len(await take(db)) == 1
    assert await outbox(db) == ["order-1"]


async def test_they_are_told_at_once(database: str, db: Db, daemon: Daemon) -> None:
    heard: list[str] = []
    await db.add_listener("image_jobs_drop", lambda *said: heard.append(str(said[-1])))
    run = await run_in(db, daemon, "parked")
    await set_status(db, run, "cancelled")
    await db.execute("select 1")
    assert heard == [""]


# what is said of it


async def test_the_runs_trail_says_that_it_is_done(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await set_status(db, run, "cancelled")
    await take(db)
    await finish(db)
    await finish(db)
    assert await outbox(db) == []
    told = (await events(db, run))[-1]
    assert (told["kind"], told["event"]) == ("log", "order_cancelled")
    assert told["message"] == "The order was cancelled at the provider."
    assert told["data"]["providerJobId"] == "order-1"


async def test_what_fails_is_tried_five_times_with_growing_pauses_and_then_given_up_with_a_warning(
    db: Db, daemon: Daemon
) -> None:
    run = await run_in(db, daemon, "parked")
    await set_status(db, run, "cancelled")
    pauses: list[float] = []
    clock = 0.0
    while await take(db):
        await finish(db, "It does not answer.")
        pause = await db.fetchval(
            "select extract(epoch from due_at - private.now())::float8 from private.cancellations"
        )
        if pause is None:
            break
        assert not await take(db)
        pauses.append(pause)
        clock += pause + 1
        await move_clock(db, f"{clock} s")
    assert [round(pause, -1) for pause in pauses] == [10, 20, 40, 80]
    warning = (await events(db, run))[-1]
    assert (warning["kind"], warning["event"]) == ("error", "warning")
    assert warning["message"] == "The order could not be cancelled at the provider; it may still be charged."
    assert warning["data"] == {"providerJobId": "order-1", "tries": 5, "reason": "It does not answer."}
    assert await outbox(db) == []


async def test_a_final_no_is_not_asked_again_and_base64_in_it_is_left_out(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await set_status(db, run, "cancelled")
    await take(db)
    await finish(db, "data:image/png;base64,iVBORw0KGgo", final=True)
    assert (await events(db, run))[-1]["data"] == {"providerJobId": "order-1", "tries": 1}
    assert await outbox(db) == []


async def test_what_nobody_could_try_for_a_day_is_given_up(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await set_status(db, run, "cancelled")
    await move_clock(db, "25 hours")
    assert await take(db, "openai") == []
    assert (await events(db, run))[-1]["data"]["reason"] == "No daemon serves this provider."


async def test_a_deleted_run_has_no_trail_and_its_cancellation_ends_all_the_same(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await set_status(db, run, "cancelled")
    await db.execute("delete from runs")
    assert len(await take(db)) == 1
    await finish(db)
    assert await outbox(db) == []
