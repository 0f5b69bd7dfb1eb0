"""Provider jobs: how their webhooks are awaited, and how orphans find their runs."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from standardwebhooks import Webhook

from daemon.providers.errors import MAX_JOB_ID
from tests.support.postgres import connect
from tests.support.protocol import Daemon, Db, events, move_clock, new_daemon, run_in, set_status
from tests.support.runs import insert_run, run_row

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYo="
MODEL = "openai:gpt-image-2"


@pytest.fixture
async def daemon(db: Db) -> Daemon:
    """Register a daemon that serves openai, whose webhooks are verified."""
    await db.execute("select image_jobs.set_webhook_secrets($1)", {"openai": [SECRET]})
    return await new_daemon(db, "openai")


async def deliver(db: Db, job: str = "order-1", message: str = "msg_1") -> None:
    """Deliver a webhook of a job, as the provider signs it."""
    body, at = json.dumps({"type": "response.completed", "data": {"id": job}}), datetime.now(UTC)
    headers = {
        "webhook-id": message,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(SECRET).sign(message, at, body),
    }
    said = await db.fetchval("select image_jobs.receive_webhook('openai', $1, $2)", headers, body)
    assert said["received"], said


async def attach(db: Db, claimed: dict[str, Any], job: str = "order-1", provider: str = "openai") -> str:
    """Attach a job to the run for which the provider says it was made."""
    return await db.fetchval(
        "select image_jobs.attach_provider_job($1, $2, $3, $4)", provider, job, claimed["id"], claimed["ticket"]
    )


async def unmatched(db: Db) -> list[dict[str, Any]]:
    return [row[0] for row in await db.fetch("select image_jobs.unmatched_deliveries('{openai}', 10)")]


async def open_deliveries(db: Db) -> int:
    return await db.fetchval("select count(*) from image_jobs.webhook_deliveries where closed_at is null")


async def claimed_run(db: Db, daemon: Daemon) -> dict[str, Any]:
    await insert_run(db, processor=MODEL)
    return await daemon.claim_one()


async def ended_unknown(db: Db, daemon: Daemon) -> dict[str, Any]:
    """Make a run whose job was submitted and not saved: it waits for its next attempt."""
    claimed = await claimed_run(db, daemon)
    await daemon.settle(claimed, "retry", due_in=60, payload={"error": "No answer.", "code": "outcome_unknown"})
    return claimed


# webhooks that are awaited


async def test_a_webhook_is_awaited_comes_and_is_awaited_again(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    assert claimed["webhook"] is None
    await daemon.park(claimed, due_in=60, webhook=True)
    assert (await run_row(db, claimed["id"]))["webhook"] == "awaited"
    assert not await daemon.claim()
    await deliver(db)
    assert (await run_row(db, claimed["id"]))["webhook"] == "came"
    checking = await daemon.claim_one()
    assert checking["webhook"] == "came"
    await daemon.park(checking, due_in=60, webhook=True)
    assert (await run_row(db, claimed["id"]))["webhook"] == "awaited"
    await deliver(db, message="msg_2")
    assert (await daemon.claim_one())["webhook"] == "came"


async def test_a_check_without_a_webhook_knows_that_none_came(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await daemon.park(claimed, due_in=60, webhook=True)
    await move_clock(db, "61 s")
    checking = await daemon.claim_one()
    assert checking["webhook"] == "awaited"
    await daemon.park(checking, webhook=False)
    assert (await run_row(db, claimed["id"]))["webhook"] is None


@pytest.mark.parametrize("when", ["before the job is saved", "while it is checked"])
async def test_a_webhook_that_crosses_with_a_park_counts_as_come(db: Db, daemon: Daemon, when: str) -> None:
    claimed = await claimed_run(db, daemon)
    if when == "while it is checked":
        await daemon.park(claimed, due_in=0, webhook=True)
        claimed = await daemon.claim_one()
    await deliver(db)
    await daemon.park(claimed, due_in=60, webhook=True)
    assert (await daemon.claim_one())["webhook"] == "came"


async def test_a_webhook_of_a_polled_run_makes_its_check_due(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await daemon.park(claimed, due_in=60)
    await deliver(db)
    assert (await daemon.claim_one())["webhook"] == "came"


async def test_a_released_check_keeps_its_webhook_state(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await daemon.park(claimed, due_in=60, webhook=True)
    await deliver(db)
    await daemon.settle(await daemon.claim_one(), "released")
    assert (await daemon.claim_one())["webhook"] == "came"


@pytest.mark.parametrize("change", ["status = 'pending'", "status = 'cancelled'", "due_at = now() + interval '9 s'"])
async def test_an_outside_change_ends_the_wait_for_a_webhook(db: Db, daemon: Daemon, change: str) -> None:
    claimed = await claimed_run(db, daemon)
    await daemon.park(claimed, due_in=60, webhook=True)
    await db.execute("update runs set webhook = 'came', priority = 3")
    assert (await run_row(db, claimed["id"]))["webhook"] == "awaited"
    await db.execute(f"update runs set {change}")
    assert (await run_row(db, claimed["id"]))["webhook"] is None


@pytest.mark.parametrize("outcome", ["completed", "failed"])
async def test_a_run_that_has_ended_waits_for_no_webhook(db: Db, daemon: Daemon, outcome: str) -> None:
    claimed = await claimed_run(db, daemon)
    await daemon.park(claimed, due_in=0, webhook=True)
    checking = await daemon.claim_one()
    await (daemon.complete(checking) if outcome == "completed" else daemon.fail(checking))
    assert (await run_row(db, claimed["id"]))["webhook"] is None


async def test_a_webhook_after_polling_timeout_adds_one_event(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked", processor=MODEL)
    await move_clock(db, "6 s")
    await daemon.fail(await daemon.claim_one(), "polling_timeout", "Polling timeout exceeded")
    before = await run_row(db, run)
    for number in range(3):
        await deliver(db, message=f"msg_{number}")
    assert await run_row(db, run) == before
    (late,) = [event for event in await events(db, run) if event["event"] == "late_webhook"]
    assert late["data"]["providerJobId"] == "order-1"
    assert "Requeue the run" in late["data"]["hint"]
    await set_status(db, run, "pending")
    assert (await daemon.claim_one())["provider_job_id"] == "order-1"


async def test_a_webhook_after_another_failure_adds_no_event(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked", processor=MODEL)
    await move_clock(db, "6 s")
    await daemon.fail(await daemon.claim_one(), "content_policy")
    await deliver(db)
    assert "late_webhook" not in [event["event"] for event in await events(db, run)]


async def test_a_job_id_of_the_longest_length_works_throughout(db: Db, daemon: Daemon) -> None:
    job = "resp_" + "bGl0ZWxsbTpjdXN0b20" * 30  # as gateways make them: base64, of what they wrap
    job = job[:MAX_JOB_ID]
    claimed = await claimed_run(db, daemon)
    assert await daemon.park(claimed, job, due_in=60, webhook=True) == "settled"
    await deliver(db, job)
    checking = await daemon.claim_one()
    assert (checking["provider_job_id"], checking["webhook"]) == (job, "came")
    await daemon.fail(checking, "polling_timeout", details={"providerJobId": job})
    await set_status(db, claimed["id"], "pending")
    await set_status(db, claimed["id"], "pending")
    assert await db.fetchval("select provider_job_id from image_jobs.cancellations") == job
    for _ in range(2):
        await db.execute("select image_jobs.finish_cancellation('openai', $1, 'No.', true)", job)


async def test_a_webhook_without_a_job_is_kept_and_not_looked_up(db: Db, daemon: Daemon) -> None:
    await deliver(db, "")
    await move_clock(db, "4 s")
    assert await unmatched(db) == []


async def test_a_job_named_by_an_operator_times_out_as_any_other(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "failed", processor=MODEL)
    await set_status(db, run, "pending")
    await db.execute("update runs set provider_job_id = 'mine'")
    checking = await daemon.claim_one()
    assert checking["provider_job_id"] == "mine"
    assert 0 <= checking["submitted_ago"] < 60


# orphans: jobs whose ids were never saved


async def test_an_unmatched_delivery_is_leased_to_one_daemon(db: Db, daemon: Daemon) -> None:
    await deliver(db)
    assert await unmatched(db) == []
    await move_clock(db, "4 s")
    assert await db.fetch("select image_jobs.unmatched_deliveries('{midjourney}', 10)") == []
    assert await unmatched(db) == [{"provider": "openai", "provider_job_id": "order-1"}]
    assert await unmatched(db) == []
    await move_clock(db, "65 s")  # the daemon that asked has died
    assert len(await unmatched(db)) == 1
    assert await db.fetchval("select image_jobs.attach_provider_job('openai', 'order-1', null, null)") == "unknown"
    await move_clock(db, "59 min")
    assert await unmatched(db) == []
    assert await open_deliveries(db) == 1


async def test_duplicate_webhooks_trigger_one_lookup(db: Db, daemon: Daemon) -> None:
    for number in range(3):
        await deliver(db, message=f"msg_{number}")
    await move_clock(db, "4 s")
    assert len(await unmatched(db)) == 1


async def test_a_delivery_of_a_known_job_is_not_looked_up(db: Db, daemon: Daemon) -> None:
    await claimed_run(db, daemon)
    await deliver(db)
    await db.execute("update runs set provider_job_id = 'order-1'")
    await move_clock(db, "4 s")
    assert await unmatched(db) == []


async def test_a_run_waiting_for_a_retry_resumes_the_orphan(db: Db, daemon: Daemon) -> None:
    claimed = await ended_unknown(db, daemon)
    await deliver(db)
    assert await attach(db, claimed) == "attached"
    row = await run_row(db, claimed["id"])
    assert (row["status"], row["provider_job_id"], row["attempt"], row["payload"]) == ("running", "order-1", 1, None)
    assert [event["event"] for event in await events(db, claimed["id"])][-3:] == ["retry", "parked", "webhook"]
    assert await open_deliveries(db) == 0
    checking = await daemon.claim_one()
    assert (checking["provider_job_id"], checking["attempt"], checking["webhook"]) == ("order-1", 1, "came")
    assert await attach(db, claimed) == "known"
    assert await daemon.complete(checking) == "settled"


@pytest.mark.parametrize("model", [None, "gpt-image-2"])
async def test_an_orphan_waits_for_room_and_is_polled_then(db: Db, daemon: Daemon, model: str | None) -> None:
    claimed = await ended_unknown(db, daemon)
    await db.execute("delete from image_jobs.provider_limits where provider = 'openai'")
    other = await claimed_run(db, daemon)
    await db.execute(
        "insert into image_jobs.provider_limits (provider, model, max_running) values ('openai', $1, 1)", model
    )
    await deliver(db)
    assert await attach(db, claimed) == "attached"
    row = await run_row(db, claimed["id"])
    assert (row["status"], row["provider_job_id"]) == ("pending", "order-1")
    await move_clock(db, "2 min")
    assert await daemon.claim(10) == []
    await daemon.complete(other)
    checking = await daemon.claim_one()
    assert (checking["id"], checking["provider_job_id"], checking["attempt"]) == (claimed["id"], "order-1", 1)
    assert checking["call"] == claimed["call"]
    assert await daemon.complete(checking) == "settled"


async def test_an_orphan_does_not_wait_for_a_claim(database: str, db: Db, daemon: Daemon) -> None:
    """Its caller holds a run, and claims take the limits first: whoever waited here could deadlock."""
    claimed = await ended_unknown(db, daemon)
    await db.execute("update image_jobs.provider_limits set max_running = 10 where provider = 'openai'")
    other = await connect(database)
    try:
        async with other.transaction():
            await other.execute("select from image_jobs.limits_in_force for update")
            await db.execute("set statement_timeout = '5s'")
            assert await attach(db, claimed) == "attached"
    finally:
        await other.close()
    assert (await run_row(db, claimed["id"]))["status"] == "pending"


async def test_a_stale_settlement_does_not_touch_a_resumed_run(db: Db, daemon: Daemon) -> None:
    claimed = await ended_unknown(db, daemon)
    assert await attach(db, claimed) == "attached"
    assert await daemon.settle(claimed, "retry", payload={"error": "No answer."}) == "lost"
    assert (await run_row(db, claimed["id"]))["status"] == "running"


async def test_a_held_run_resumes_the_orphan_when_it_ends_unknown(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await deliver(db)
    before = await run_row(db, claimed["id"])
    assert await attach(db, claimed) == "held"
    assert await run_row(db, claimed["id"]) == before
    await daemon.settle(claimed, "retry", due_in=60, payload={"error": "No answer.", "code": "outcome_unknown"})
    checking = await daemon.claim_one()
    assert (checking["provider_job_id"], checking["attempt"], checking["webhook"]) == ("order-1", 1, "came")
    assert await open_deliveries(db) == 0


async def test_a_resumed_orphan_consumes_the_webhook_that_came(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    assert await attach(db, claimed) == "held"
    await deliver(db)
    await daemon.settle(claimed, "retry", due_in=60, payload={"error": "No answer.", "code": "outcome_unknown"})
    assert (await daemon.claim_one())["webhook"] == "came"
    assert await open_deliveries(db) == 0


async def test_a_delivery_outlives_an_outside_claimed_by(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await daemon.park(claimed, due_in=0)
    checking = await daemon.claim_one()
    await deliver(db)
    await db.execute("update runs set claimed_by = null where id = $1", claimed["id"])
    await daemon.park(checking, due_in=60)
    assert (await daemon.claim_one())["webhook"] == "came"


async def test_the_orphan_of_a_dead_last_attempt_is_resumed(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await db.execute("update runs set max_attempts = 1")
    await deliver(db)
    assert await attach(db, claimed) == "held"
    await db.execute("select image_jobs.abandon_runs($1)", daemon.id)
    checking = await daemon.claim_one()
    assert (checking["id"], checking["provider_job_id"]) == (claimed["id"], "order-1")


@pytest.mark.parametrize("code", ["outcome_unknown", "timeout", "storage_disk"])
async def test_a_last_attempt_of_any_unknown_end_resumes_the_orphan(db: Db, daemon: Daemon, code: str) -> None:
    claimed = await claimed_run(db, daemon)
    await db.execute("update runs set max_attempts = 1")
    await deliver(db)
    assert await attach(db, claimed) == "held"
    await daemon.settle(claimed, "retry", due_in=60, payload={"error": "No answer.", "code": code})
    assert (await daemon.claim_one())["provider_job_id"] == "order-1"


async def test_a_job_saved_by_its_own_attempt_is_matched_as_usual(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await deliver(db)
    assert await attach(db, claimed) == "held"
    await daemon.park(claimed, due_in=60, webhook=True)
    assert (await daemon.claim_one())["webhook"] == "came"
    assert await open_deliveries(db) == 0
    assert [event["event"] for event in await events(db, claimed["id"])].count("webhook") == 1


async def test_a_refusal_stands_despite_a_webhook_of_a_job(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await deliver(db)
    assert await attach(db, claimed) == "held"
    await daemon.fail(claimed, "content_policy")
    assert (await run_row(db, claimed["id"]))["status"] == "failed"


async def test_a_held_result_is_retried_by_the_sweeps(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await deliver(db)
    assert await attach(db, claimed) == "held"
    await daemon.park(claimed, "order-2", due_in=3600)  # the attempt had made another order
    await move_clock(db, "65 s")
    await db.execute("select image_jobs.sweep_webhooks()")
    assert await open_deliveries(db) == 0
    assert await db.fetchval("select provider_job_id from image_jobs.cancellations") == "order-1"


async def test_late_webhooks_and_jobs_count_as_no_images(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await daemon.fail(claimed, "outcome_unknown")
    await deliver(db)
    assert await attach(db, claimed) == "noted"
    assert not await db.fetch("select from image_jobs.run_costs where images > 0")


async def test_an_orphan_of_a_failed_run_is_an_event(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await daemon.fail(claimed, "outcome_unknown")
    await deliver(db)
    before = await run_row(db, claimed["id"])
    assert await attach(db, claimed) == "noted"
    assert await run_row(db, claimed["id"]) == before
    (late,) = [event for event in await events(db, claimed["id"]) if event["event"] == "late_provider_job"]
    assert late["data"] == {"providerJobId": "order-1"}
    assert not await db.fetch("select from image_jobs.cancellations")


@pytest.mark.parametrize("state", ["cancelled", "completed", "requeued", "ordered again"])
async def test_an_orphan_that_its_run_cannot_use_is_cancelled(db: Db, daemon: Daemon, state: str) -> None:
    claimed = await claimed_run(db, daemon)
    match state:
        case "completed":
            await daemon.complete(claimed)
        case "ordered again":
            await daemon.park(claimed, "order-2")
        case _:
            await set_status(db, claimed["id"], {"requeued": "pending"}.get(state, state))
    await deliver(db)
    before = await run_row(db, claimed["id"])
    assert await attach(db, claimed) == "cancelled"
    assert await run_row(db, claimed["id"]) == before
    assert await db.fetchval("select provider_job_id from image_jobs.cancellations") == "order-1"
    assert await open_deliveries(db) == 0


async def test_a_foreign_job_changes_nothing(db: Db, daemon: Daemon) -> None:
    claimed = await ended_unknown(db, daemon)
    before = await run_row(db, claimed["id"])
    assert await attach(db, {"id": "nobody", "ticket": 1}) == "unknown"
    assert await attach(db, claimed, provider="midjourney") == "unknown"
    assert await run_row(db, claimed["id"]) == before


async def test_a_locked_run_is_left_for_later(database: str, db: Db, daemon: Daemon) -> None:
    claimed = await ended_unknown(db, daemon)
    await deliver(db)
    other = await connect(database)
    async with other.transaction():
        await other.execute("select from runs for update")
        assert await attach(db, claimed) == "held"
    await other.close()
    assert await attach(db, claimed) == "attached"


@pytest.mark.parametrize(
    ("said", "secrets", "wait"), [(60, True, 60), (300, True, 300), (None, True, 2), (60, False, 2)], ids=str
)
async def test_a_taken_over_run_waits_for_a_webhook_before_retrying(
    db: Db, daemon: Daemon, said: int | None, secrets: bool, wait: int
) -> None:
    if not secrets:
        await db.execute("delete from image_jobs.webhook_secrets")
    claimed = await claimed_run(db, daemon)
    data = {} if said is None else {"webhookWait": said}
    submitted = {"kind": "log", "payload": {"event": "submitted", "message": "It goes.", "data": data}}
    await daemon.record(claimed, events=[submitted])
    await db.execute("select image_jobs.abandon_runs($1)", daemon.id)
    left = await db.fetchval("select extract(epoch from due_at - image_jobs.now())::float8 from runs")
    assert wait - 2 < left <= wait
