"""Provider jobs that no run waits for any more: which are cancelled, by which daemon, and with which events."""

from typing import Any

import pytest

from tests.support.protocol import OPERATORS, Daemon, Db, events, move_clock, new_daemon, run_in, set_status
from tests.support.runs import insert_run, run_row


async def outbox(db: Db) -> list[str]:
    return [row[0] for row in await db.fetch("select provider_job_id from image_jobs.cancellations order by 1")]


async def take(db: Db, *providers: str, limit: int = 10) -> list[dict[str, Any]]:
    rows = await db.fetch("select image_jobs.take_cancellations($1, $2)", list(providers or ("demo",)), limit)
    return [row[0] for row in rows]


async def finish(db: Db, reason: str | None = None, *, final: bool = False, job: str = "order-1") -> None:
    await db.execute("select image_jobs.finish_cancellation('demo', $1, $2, $3)", job, reason, final)


# which they are


@pytest.mark.parametrize("role", OPERATORS)
@pytest.mark.parametrize("status", ["cancelled", "pending"])
@pytest.mark.parametrize("state", ["parked", "checked"])
async def test_an_outside_cancel_or_requeue_cancels_the_job(
    db: Db, daemon: Daemon, state: str, status: str, role: str
) -> None:
    run = await run_in(db, daemon, "parked")
    if state == "checked":
        await move_clock(db, "6 s")
        await daemon.claim_one()
    await set_status(db, run, status, role)
    assert await take(db) == [{"provider": "demo", "provider_job_id": "order-1", "run_id": run}]


async def test_cancelling_a_requeued_run_cancels_its_kept_job(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    await daemon.fail(await daemon.claim_one(), "polling_timeout")
    await set_status(db, run, "pending")
    assert await outbox(db) == []
    await set_status(db, run, "cancelled")
    assert await outbox(db) == ["order-1"]


@pytest.mark.parametrize("state", ["pending", "running"])
async def test_a_run_without_a_job_cancels_none(db: Db, daemon: Daemon, state: str) -> None:
    run = await run_in(db, daemon, state)
    await set_status(db, run, "cancelled")
    assert await outbox(db) == []


async def test_taking_over_polling_and_ending_cancel_no_job(db: Db, daemon: Daemon) -> None:
    await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    await daemon.claim_one()
    await db.execute("select image_jobs.abandon_runs($1)", daemon.id)
    other = await new_daemon(db)
    await other.park(await other.claim_one(), due_in=0)
    await other.complete(await other.claim_one())
    await db.execute("update runs set status = 'pending'")
    assert await outbox(db) == []


async def test_a_retry_does_not_cancel_the_failed_job(db: Db, daemon: Daemon) -> None:
    await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    await daemon.settle(await daemon.claim_one(), "retry", payload={"error": "It failed."})
    assert await outbox(db) == []


@pytest.mark.parametrize("status", ["cancelled", "pending"])
async def test_a_job_parked_with_a_lost_claim_is_cancelled(db: Db, daemon: Daemon, status: str) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    await set_status(db, run, status)
    before = await run_row(db, run)
    assert await daemon.park(claimed, ticket=claimed["ticket"]) == "lost"
    assert await daemon.park(claimed, ticket=claimed["ticket"]) == "lost"  # the acknowledgement was lost
    assert await outbox(db) == ["order-1"]
    assert await run_row(db, run) == before


async def test_a_job_parked_after_a_take_over_goes_to_the_waiting_run(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    await db.execute("select image_jobs.abandon_runs($1)", daemon.id)
    assert await daemon.park(claimed, ticket=claimed["ticket"]) == "lost"
    assert await outbox(db) == []
    other = await new_daemon(db)
    assert (await other.claim_one())["provider_job_id"] == "order-1"


async def test_a_job_parked_after_a_take_over_waits_for_the_attempt(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    await db.execute("select image_jobs.abandon_runs($1)", daemon.id)
    await move_clock(db, "3 s")
    other = await new_daemon(db)
    again = await other.claim_one()
    assert await daemon.park(claimed, ticket=claimed["ticket"]) == "lost"
    assert await outbox(db) == []
    assert await other.complete(again) == "settled"


async def test_a_waiting_job_is_cancelled_if_the_attempt_makes_another(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    await db.execute("select image_jobs.abandon_runs($1)", daemon.id)
    await move_clock(db, "3 s")
    other = await new_daemon(db)
    again = await other.claim_one()
    assert await daemon.park(claimed, ticket=claimed["ticket"]) == "lost"
    assert await other.park(again, "order-2", due_in=3600) == "settled"
    await move_clock(db, "65 s")
    await db.execute("select image_jobs.sweep_webhooks()")
    assert await outbox(db) == ["order-1"]
    assert "webhook" not in [event["event"] for event in await events(db, again["id"])]


async def test_a_waiting_job_is_used_if_the_attempt_ends_unknown(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    await db.execute("select image_jobs.abandon_runs($1)", daemon.id)
    await move_clock(db, "3 s")
    other = await new_daemon(db)
    again = await other.claim_one()
    assert await daemon.park(claimed, ticket=claimed["ticket"]) == "lost"
    await other.settle(again, "retry", due_in=60, payload={"error": "No answer.", "code": "outcome_unknown"})
    checking = await other.claim_one()
    assert (checking["provider_job_id"], checking["webhook"]) == ("order-1", None)  # no webhook of it will come
    await other.complete(checking)
    await move_clock(db, "65 s")
    await db.execute("select image_jobs.sweep_webhooks()")
    assert await outbox(db) == []


async def test_a_waiting_job_that_the_attempt_found_itself_is_kept(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    await db.execute("select image_jobs.abandon_runs($1)", daemon.id)
    await move_clock(db, "3 s")
    other = await new_daemon(db)
    again = await other.claim_one()
    assert await daemon.park(claimed, ticket=claimed["ticket"]) == "lost"
    assert await other.park(again, due_in=3600) == "settled"
    await move_clock(db, "65 s")
    await db.execute("select image_jobs.sweep_webhooks()")
    assert await outbox(db) == []
    assert (await run_row(db, again["id"]))["provider_job_id"] == "order-1"


async def test_a_repeated_park_is_not_late_once_its_check_has_begun(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    claimed = await daemon.claim_one()
    late = {"kind": "log", "payload": {"event": "late_provider_job", "message": "It came late."}}
    assert await daemon.park(claimed, due_in=0, ticket=claimed["ticket"], if_lost=late) == "settled"
    checking = await daemon.claim_one()
    assert await daemon.park(claimed, due_in=0, ticket=claimed["ticket"], if_lost=late) == "lost"
    assert [event["event"] for event in await events(db, claimed["id"])] == ["created", "claimed", "parked"]
    assert await outbox(db) == []
    assert await daemon.complete(checking) == "settled"


@pytest.mark.parametrize("state", ["parked", "checked", "pending"])
async def test_deleting_a_run_cancels_its_job(db: Db, daemon: Daemon, state: str) -> None:
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


async def test_deleting_a_terminal_run_cancels_no_job(db: Db, daemon: Daemon) -> None:
    await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    await daemon.complete(await daemon.claim_one())
    await db.execute("delete from runs")
    assert await outbox(db) == []


@pytest.mark.parametrize("change", ["update runs set status = 'cancelled'", "delete from runs"])
async def test_a_shared_job_is_cancelled_with_its_last_run(db: Db, daemon: Daemon, change: str) -> None:
    first, second = await run_in(db, daemon, "parked"), await run_in(db, daemon, "parked")
    await db.execute(f"{change} where id = $1", first)
    assert await outbox(db) == []
    await db.execute(f"{change} where id = $1", second)
    assert await outbox(db) == ["order-1"]


# who cancels them


async def test_a_cancellation_is_leased_to_one_serving_daemon(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await set_status(db, run, "cancelled")
    assert await take(db, "openai") == []
    assert len(await take(db)) == 1
    assert await take(db) == []
    await move_clock(db, "61 s")  # the daemon that took it was killed
    assert len(await take(db)) == 1
    assert await outbox(db) == ["order-1"]


async def test_daemons_are_notified_of_a_cancellation_at_once(database: str, db: Db, daemon: Daemon) -> None:
    heard: list[str] = []
    await db.add_listener("image_jobs_drop", lambda *said: heard.append(str(said[-1])))
    run = await run_in(db, daemon, "parked")
    await set_status(db, run, "cancelled")
    await db.execute("select 1")
    assert heard == [""]


# what is said of it


async def test_a_finished_cancellation_is_an_event_of_its_run(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await set_status(db, run, "cancelled")
    await take(db)
    await finish(db)
    await finish(db)
    assert await outbox(db) == []
    told = (await events(db, run))[-1]
    assert (told["kind"], told["event"]) == ("log", "provider_job_cancelled")
    assert told["message"] == "The order was cancelled at the provider."
    assert told["data"]["providerJobId"] == "order-1"


async def test_a_cancellation_is_tried_five_times_then_warned_about(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await set_status(db, run, "cancelled")
    pauses: list[float] = []
    clock = 0.0
    while await take(db):
        await finish(db, "It does not answer.")
        pause = await db.fetchval(
            "select extract(epoch from due_at - image_jobs.now())::float8 from image_jobs.cancellations"
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


async def test_a_final_refusal_is_not_retried_and_loses_its_base64(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await set_status(db, run, "cancelled")
    await take(db)
    await finish(db, "data:image/png;base64,iVBORw0KGgo", final=True)
    assert (await events(db, run))[-1]["data"] == {"providerJobId": "order-1", "tries": 1}
    assert await outbox(db) == []


async def test_a_cancellation_untried_for_a_day_is_given_up(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await set_status(db, run, "cancelled")
    await move_clock(db, "25 hours")
    assert await take(db, "openai") == []
    assert (await events(db, run))[-1]["data"]["reason"] == "No daemon serves this provider."


async def test_the_cancellation_of_a_deleted_run_ends_without_events(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await set_status(db, run, "cancelled")
    await db.execute("delete from runs")
    assert len(await take(db)) == 1
    await finish(db)
    assert await outbox(db) == []
