"""Orders at providers: whose webhook is awaited, which nobody wrote down, and how each finds its run."""

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from standardwebhooks import Webhook

from daemon.providers.vendor import LONGEST_ID
from tests.postgres import connect
from tests.runs import insert_run, run_row
from tests.sql.protocol import Daemon, Db, events, move_clock, new_daemon, run_in, set_status

SECRET = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSwMfKQ9r8GKYo="
MODEL = "openai:gpt-image-2"


@pytest.fixture
async def daemon(db: Db) -> Daemon:
    """One that serves openai, whose webhooks are verified."""
    await db.execute("select private.set_webhook_secrets($1)", {"openai": [SECRET]})
    return await new_daemon(db, "openai")


async def deliver(db: Db, order: str = "order-1", message: str = "msg_1") -> None:
    """A webhook of an order comes, as the provider signs it."""
    body, at = json.dumps({"type": "response.completed", "data": {"id": order}}), datetime.now(UTC)
    headers = {
        "webhook-id": message,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": Webhook(SECRET).sign(message, at, body),
    }
    said = await db.fetchval("select private.receive_webhook('openai', $1, $2)", headers, body)
    assert said["received"], said


async def attach(db: Db, claimed: dict[str, Any], order: str = "order-1", provider: str = "openai") -> str:
    """The provider has said whose the order is."""
    return await db.fetchval(
        "select private.attach_order($1, $2, $3, $4)", provider, order, claimed["id"], claimed["ticket"]
    )


async def unmatched(db: Db) -> list[dict[str, Any]]:
    return [row[0] for row in await db.fetch("select private.unmatched_deliveries('{openai}', 10)")]


async def open_deliveries(db: Db) -> int:
    return await db.fetchval("select count(*) from private.webhook_deliveries where closed_at is null")


async def claimed_run(db: Db, daemon: Daemon) -> dict[str, Any]:
    await insert_run(db, processor=MODEL)
    return await daemon.claim_one()


async def ended_unknown(db: Db, daemon: Daemon) -> dict[str, Any]:
    """A run whose order was taken and not written down: it waits for its next attempt."""
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


@pytest.mark.parametrize("when", ["before the order is written down", "while it is checked"])
async def test_a_webhook_that_crosses_with_a_park_counts_as_come(db: Db, daemon: Daemon, when: str) -> None:
    claimed = await claimed_run(db, daemon)
    if when == "while it is checked":
        await daemon.park(claimed, due_in=0, webhook=True)
        claimed = await daemon.claim_one()
    await deliver(db)
    await daemon.park(claimed, due_in=60, webhook=True)
    assert (await daemon.claim_one())["webhook"] == "came"


async def test_a_webhook_of_a_run_that_is_polled_makes_its_check_due_too(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await daemon.park(claimed, due_in=60)
    await deliver(db)
    assert (await daemon.claim_one())["webhook"] == "came"


async def test_a_check_that_is_handed_back_still_knows_whether_a_webhook_came(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await daemon.park(claimed, due_in=60, webhook=True)
    await deliver(db)
    await daemon.settle(await daemon.claim_one(), "released")
    assert (await daemon.claim_one())["webhook"] == "came"


@pytest.mark.parametrize("change", ["status = 'pending'", "status = 'cancelled'", "due_at = now() + interval '9 s'"])
async def test_nobody_waits_for_a_webhook_once_somebody_else_decides(db: Db, daemon: Daemon, change: str) -> None:
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


async def test_a_webhook_after_we_gave_up_says_once_that_a_requeue_asks_for_the_same_order(
    db: Db, daemon: Daemon
) -> None:
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


async def test_a_webhook_of_a_run_that_failed_in_another_way_promises_nothing(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked", processor=MODEL)
    await move_clock(db, "6 s")
    await daemon.fail(await daemon.claim_one(), "content_policy")
    await deliver(db)
    assert "late_webhook" not in [event["event"] for event in await events(db, run)]


async def test_an_order_of_the_longest_id_that_is_kept_is_written_down_heard_of_and_cancelled(
    db: Db, daemon: Daemon
) -> None:
    order = "resp_" + "bGl0ZWxsbTpjdXN0b20" * 30  # as gateways make them: base64, of what they wrap
    order = order[:LONGEST_ID]
    claimed = await claimed_run(db, daemon)
    assert await daemon.park(claimed, order, due_in=60, webhook=True) == "settled"
    await deliver(db, order)
    checking = await daemon.claim_one()
    assert (checking["provider_job_id"], checking["webhook"]) == (order, "came")
    await daemon.fail(checking, "polling_timeout", details={"providerJobId": order})
    await set_status(db, claimed["id"], "pending")
    await set_status(db, claimed["id"], "pending")
    assert await db.fetchval("select provider_job_id from private.cancellations") == order
    for _ in range(2):
        await db.execute("select private.finish_cancellation('openai', $1, 'No.', true)", order)


async def test_a_webhook_of_no_order_is_kept_and_nobody_is_asked_about_it(db: Db, daemon: Daemon) -> None:
    await deliver(db, "")
    await move_clock(db, "4 s")
    assert await unmatched(db) == []


async def test_an_order_that_an_operator_names_is_given_up_in_time_like_any_other(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "failed", processor=MODEL)
    await set_status(db, run, "pending")
    await db.execute("update runs set provider_job_id = 'mine'")
    checking = await daemon.claim_one()
    assert checking["provider_job_id"] == "mine"
    assert 0 <= checking["submitted_ago"] < 60


# orders that nobody wrote down


async def test_a_delivery_without_a_run_is_asked_about_after_a_few_seconds_by_one_daemon(
    db: Db, daemon: Daemon
) -> None:
    await deliver(db)
    assert await unmatched(db) == []
    await move_clock(db, "4 s")
    assert await db.fetch("select private.unmatched_deliveries('{midjourney}', 10)") == []
    assert await unmatched(db) == [{"provider": "openai", "provider_job_id": "order-1"}]
    assert await unmatched(db) == []
    await move_clock(db, "65 s")  # whoever asked has died
    assert len(await unmatched(db)) == 1
    assert await db.fetchval("select private.attach_order('openai', 'order-1', null, null)") == "unknown"
    await move_clock(db, "59 min")
    assert await unmatched(db) == []
    assert await open_deliveries(db) == 1


async def test_several_words_of_one_order_are_one_question(db: Db, daemon: Daemon) -> None:
    for number in range(3):
        await deliver(db, message=f"msg_{number}")
    await move_clock(db, "4 s")
    assert len(await unmatched(db)) == 1


async def test_a_delivery_of_an_order_that_a_run_has_is_not_asked_about(db: Db, daemon: Daemon) -> None:
    await claimed_run(db, daemon)
    await deliver(db)
    await db.execute("update runs set provider_job_id = 'order-1'")
    await move_clock(db, "4 s")
    assert await unmatched(db) == []


async def test_a_run_that_waits_for_its_next_attempt_goes_on_with_the_order_of_the_one_before(
    db: Db, daemon: Daemon
) -> None:
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


async def test_a_settlement_of_before_does_not_touch_a_run_that_has_its_order_back(db: Db, daemon: Daemon) -> None:
    claimed = await ended_unknown(db, daemon)
    assert await attach(db, claimed) == "attached"
    assert await daemon.settle(claimed, "retry", payload={"error": "No answer."}) == "lost"
    assert (await run_row(db, claimed["id"]))["status"] == "running"


async def test_an_attempt_that_is_at_work_is_left_and_its_run_goes_on_with_the_order_when_it_ends_unknown(
    db: Db, daemon: Daemon
) -> None:
    claimed = await claimed_run(db, daemon)
    await deliver(db)
    before = await run_row(db, claimed["id"])
    assert await attach(db, claimed) == "held"
    assert await run_row(db, claimed["id"]) == before
    await daemon.settle(claimed, "retry", due_in=60, payload={"error": "No answer.", "code": "outcome_unknown"})
    checking = await daemon.claim_one()
    assert (checking["provider_job_id"], checking["attempt"], checking["webhook"]) == ("order-1", 1, "came")
    assert await open_deliveries(db) == 0


async def test_a_run_whose_daemon_died_in_its_last_attempt_goes_on_with_the_order(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await db.execute("update runs set max_attempts = 1")
    await deliver(db)
    assert await attach(db, claimed) == "held"
    await db.execute("select private.abandon_runs($1)", daemon.id)
    checking = await daemon.claim_one()
    assert (checking["id"], checking["provider_job_id"]) == (claimed["id"], "order-1")


@pytest.mark.parametrize("code", ["outcome_unknown", "timeout", "storage_disk"])
async def test_a_last_attempt_that_ends_unknown_in_whatever_way_goes_on_with_the_order(
    db: Db, daemon: Daemon, code: str
) -> None:
    claimed = await claimed_run(db, daemon)
    await db.execute("update runs set max_attempts = 1")
    await deliver(db)
    assert await attach(db, claimed) == "held"
    await daemon.settle(claimed, "retry", due_in=60, payload={"error": "No answer.", "code": code})
    assert (await daemon.claim_one())["provider_job_id"] == "order-1"


async def test_what_the_attempt_wrote_down_itself_is_matched_as_ever(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await deliver(db)
    assert await attach(db, claimed) == "held"
    await daemon.park(claimed, due_in=60, webhook=True)
    assert (await daemon.claim_one())["webhook"] == "came"
    assert await open_deliveries(db) == 0
    assert [event["event"] for event in await events(db, claimed["id"])].count("webhook") == 1


async def test_a_refusal_of_the_attempt_stands_although_a_webhook_of_an_order_is_here(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await deliver(db)
    assert await attach(db, claimed) == "held"
    await daemon.fail(claimed, "content_policy")
    assert (await run_row(db, claimed["id"]))["status"] == "failed"


async def test_what_is_held_is_looked_at_again_by_the_sweeps(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await deliver(db)
    assert await attach(db, claimed) == "held"
    await daemon.park(claimed, "order-2", due_in=3600)  # the attempt had made another order
    await move_clock(db, "65 s")
    await db.execute("select private.sweep_webhooks()")
    assert await open_deliveries(db) == 0
    assert await db.fetchval("select provider_job_id from private.cancellations") == "order-1"


async def test_webhooks_and_orders_that_come_late_are_no_images(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await daemon.fail(claimed, "outcome_unknown")
    await deliver(db)
    assert await attach(db, claimed) == "noted"
    assert not await db.fetch("select from run_costs where images > 0")


async def test_a_failed_run_is_told_that_there_is_an_order(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await daemon.fail(claimed, "outcome_unknown")
    await deliver(db)
    before = await run_row(db, claimed["id"])
    assert await attach(db, claimed) == "noted"
    assert await run_row(db, claimed["id"]) == before
    (late,) = [event for event in await events(db, claimed["id"]) if event["event"] == "late_order"]
    assert late["data"] == {"providerJobId": "order-1"}
    assert not await db.fetch("select from private.cancellations")


@pytest.mark.parametrize("state", ["cancelled", "completed", "requeued", "ordered again"])
async def test_an_order_that_its_run_has_no_use_for_is_cancelled(db: Db, daemon: Daemon, state: str) -> None:
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
    assert await db.fetchval("select provider_job_id from private.cancellations") == "order-1"
    assert await open_deliveries(db) == 0


async def test_an_order_of_nobody_or_of_another_provider_changes_nothing(db: Db, daemon: Daemon) -> None:
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
async def test_after_a_take_over_an_order_is_made_again_only_when_its_webhook_had_time_to_come(
    db: Db, daemon: Daemon, said: int | None, secrets: bool, wait: int
) -> None:
    if not secrets:
        await db.execute("delete from private.webhook_secrets")
    claimed = await claimed_run(db, daemon)
    data = {} if said is None else {"webhookWait": said}
    submitted = {"kind": "log", "payload": {"event": "submitted", "message": "It goes.", "data": data}}
    await daemon.record(claimed, events=[submitted])
    await db.execute("select private.abandon_runs($1)", daemon.id)
    left = await db.fetchval("select extract(epoch from due_at - private.now())::float8 from runs")
    assert wait - 2 < left <= wait
