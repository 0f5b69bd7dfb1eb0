"""The state table of sql/README.md, row by row, each as the role in question; and the sentences around it."""

from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.support.postgres import signed_in
from tests.support.protocol import (
    IMAGE,
    OPERATORS,
    STATES,
    UNFINISHED,
    Daemon,
    Db,
    as_operator,
    events,
    move_clock,
    new_daemon,
    run_in,
    set_status,
)
from tests.support.runs import WORKFLOW, event_names, insert_run, run_row

REFUSED = asyncpg.InvalidParameterValueError


def image_run(workflow: UUID, status: str = "pending") -> tuple[object, ...]:
    return ("image_gen", workflow, status, "demo:painter", {"promptSpec": {"basePrompt": "a red fox"}})


INSERT = "insert into runs (kind, subject_id, status, processor, metadata) values ($1, $2, $3, $4, $5) returning id"


# insert → pending


async def test_a_client_inserts_a_pending_run(db: Db) -> None:
    async with signed_in(db) as user:
        run = await db.fetchval(INSERT, *image_run(uuid4()))
    row = await run_row(db, run)
    assert (row["status"], row["created_by"], row["attempt"], row["progress"]) == ("pending", user, 0, 0)
    assert row["claim"] and row["ticket"]
    assert (row["claimed_by"], row["finished_at"], row["payload"]) == (None, None, None)
    assert await event_names(db, run) == ["created"]


@pytest.mark.parametrize("role", OPERATORS)
async def test_an_operator_inserts_a_pending_run(db: Db, role: str) -> None:
    row = await as_operator(db, role, INSERT, *image_run(uuid4()))
    assert row is not None
    stored = await run_row(db, row["id"])
    assert (stored["status"], stored["created_by"]) == ("pending", None)
    assert stored["claim"] and stored["ticket"]


async def test_start_image_job_makes_a_pending_run(db: Db) -> None:
    request = {
        "nodeId": "n",
        "workflowId": str(uuid4()),
        "provider": "demo",
        "model": "painter",
        "promptSpec": {"basePrompt": "a red fox"},
    }
    async with signed_in(db) as user:
        record = await db.fetchval("select start_image_job($1)", request)
    row = await run_row(db, record["jobId"])
    assert (record["status"], row["created_by"], row["processor"]) == ("pending", user, "demo:painter")
    assert await event_names(db, record["jobId"]) == ["created"]


async def test_anon_cannot_insert_a_run(db: Db) -> None:
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with signed_in(db, role="anon"):
            await db.execute(INSERT, *image_run(uuid4()))


async def test_every_run_has_a_claim_and_a_ticket_of_its_own(db: Db) -> None:
    rows = [await run_row(db, await insert_run(db)) for _ in range(3)]
    assert len({row["claim"] for row in rows}) == len({row["ticket"] for row in rows}) == 3


# pending → running


async def test_claiming_starts_the_work(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    before = await run_row(db, run)
    await move_clock(db, "10 s")
    claimed = await daemon.claim_one()
    row = await run_row(db, run)
    assert (row["status"], row["attempt"], row["claimed_by"], row["due_at"]) == ("running", 1, daemon.id, None)
    assert row["claim"] == claimed["claim"] > before["claim"]
    assert row["ticket"] == before["ticket"]
    assert row["started_at"] > before["started_at"]
    assert row["created_at"] == before["created_at"]
    assert row["finished_at"] is None
    assert await event_names(db, run) == ["created", "claimed"]


async def test_a_claimed_run_has_all_that_the_daemon_needs(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db, nodeId="n")
    claimed = await daemon.claim_one()
    assert claimed.pop("waited") >= 0
    row = await run_row(db, run)
    assert claimed == {
        "part": "claimed",
        "id": run,
        "claim": row["claim"],
        "ticket": row["ticket"],
        "subject_id": str(WORKFLOW),
        "processor": "demo:painter",
        "requested": "demo:painter",
        "metadata": row["metadata"],
        "attempt": 1,
        "max_attempts": 3,
        "provider_job_id": None,
        "call": row["claim"],
        "webhook": None,
        "submitted_ago": None,
        "created_by": None,
        "source_workflow": None,
        "generated": None,
        "contested": False,
    }


@pytest.mark.parametrize("state", [state for state in STATES if state != "pending"])
async def test_only_pending_runs_are_claimed(db: Db, daemon: Daemon, state: str) -> None:
    await run_in(db, daemon, state)
    assert await daemon.claim(10) == []


# running → running, parked


async def test_a_parked_run_has_no_holder(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    assert await daemon.park(claimed, "order-7", due_in=5) == "settled"
    row = await run_row(db, run)
    assert (row["status"], row["claimed_by"], row["provider_job_id"]) == ("running", None, "order-7")
    assert row["claim"] == claimed["claim"]
    assert 4 < (row["due_at"] - row["submitted_at"]).total_seconds() <= 5
    assert row["finished_at"] is None


# parked → running, held


async def test_a_parked_run_is_checked_when_it_is_due_and_not_before(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    before = await run_row(db, run)
    assert await daemon.claim(10) == []
    await move_clock(db, "6 s")
    claimed = await daemon.claim_one()
    row = await run_row(db, run)
    assert (row["status"], row["claimed_by"], row["attempt"]) == ("running", daemon.id, 1)
    assert row["claim"] == claimed["claim"] > before["claim"]
    assert (claimed["provider_job_id"], claimed["attempt"]) == ("order-1", 1)
    assert 5 < claimed["submitted_ago"] < 60
    assert row["started_at"] == before["started_at"]


async def test_any_daemon_checks_a_parked_run(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    other = await new_daemon(db)
    assert (await other.claim_one())["id"] == run


# running → pending (retry)


async def test_a_retry_waits_for_its_pause_and_counts_an_attempt(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    reason = {"error": "Later.", "code": "unavailable"}
    assert await daemon.settle(claimed, "retry", payload=reason, due_in=8) == "settled"
    row = await run_row(db, run)
    assert (row["status"], row["attempt"], row["claimed_by"], row["progress"]) == ("pending", 1, None, 0)
    assert await daemon.claim(10) == []
    await move_clock(db, "9 s")
    assert (await daemon.claim_one())["attempt"] == 2


async def test_a_retry_of_an_unaccepted_request_refunds_its_attempt(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    await daemon.settle(claimed, "retry", payload={"error": "Later.", "code": "rate_limited"}, due_in=0, refund=True)
    assert (await run_row(db, run))["attempt"] == 0


# running → completed, failed


async def test_a_completed_run_has_its_image(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    assert await daemon.complete(claimed, width=1024, cost=0.04) == "settled"
    row = await run_row(db, run)
    payload = {"imageUrl": IMAGE, "width": 1024, "cost": 0.04, "timings": row["payload"]["timings"]}
    assert (row["status"], row["progress"], row["payload"]) == ("completed", 100, payload)
    assert row["finished_at"] >= row["started_at"]
    assert row["claim"] == claimed["claim"], "the claim stays: a settlement may come twice"
    assert (row["claimed_by"], row["due_at"]) == (None, None)


async def test_a_failed_run_has_its_reason(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    assert await daemon.fail(claimed, "refused", "The provider refused this prompt.") == "settled"
    row = await run_row(db, run)
    assert row["status"] == "failed"
    assert row["payload"] == {
        "error": "The provider refused this prompt.",
        "code": "refused",
        "hint": "Ask again.",
        "attempts": 1,
        "timings": row["payload"]["timings"],
    }
    assert row["finished_at"] >= row["started_at"]
    assert row["claim"] == claimed["claim"]


# pending, running → cancelled


@pytest.mark.parametrize("state", UNFINISHED)
async def test_a_member_cancels_by_cancel_run(db: Db, daemon: Daemon, member: UUID, state: str) -> None:
    run = await run_in(db, daemon, state)
    before = await run_row(db, run)
    async with signed_in(db, member):
        record = await db.fetchval("select cancel_run($1)", run)
    assert (record["jobId"], record["status"]) == (run, "cancelled")
    row = await run_row(db, run)
    assert row["claim"] > before["claim"]
    assert (row["status"], row["claimed_by"]) == ("cancelled", None)
    assert row["finished_at"] is not None
    assert (await event_names(db, run))[-1] == "cancelled"


@pytest.mark.parametrize("role", OPERATORS)
@pytest.mark.parametrize("state", UNFINISHED)
async def test_an_operator_cancels_by_plain_update(db: Db, daemon: Daemon, role: str, state: str) -> None:
    run = await run_in(db, daemon, state)
    before = await run_row(db, run)
    await set_status(db, run, "cancelled", role)
    row = await run_row(db, run)
    assert row["claim"] > before["claim"]
    assert (row["status"], row["claimed_by"]) == ("cancelled", None)
    assert row["finished_at"] is not None


@pytest.mark.parametrize("status", ["cancelled", "pending"])
async def test_cancelling_a_held_run_notifies_its_daemon(db: Db, daemon: Daemon, status: str) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    heard: list[str] = []
    await db.add_listener("image_jobs_drop", lambda *notification: heard.append(notification[-1]))
    await set_status(db, run, status)
    await db.execute("select")
    assert heard == [str(claimed["claim"])]
    assert await daemon.complete(claimed) == "lost"


async def test_no_drop_is_sent_for_a_run_that_was_not_held(db: Db) -> None:
    run = await insert_run(db)
    heard: list[str] = []
    await db.add_listener("image_jobs_drop", lambda *notification: heard.append(notification[-1]))
    await set_status(db, run, "cancelled")
    await db.execute("select")
    assert heard == []


# failed, cancelled → pending, by a member; any → pending, by an operator


@pytest.mark.parametrize("state", ["failed", "cancelled"])
async def test_a_member_requeues_by_requeue_run(db: Db, daemon: Daemon, member: UUID, state: str) -> None:
    run = await run_in(db, daemon, state)
    before = await run_row(db, run)
    async with signed_in(db, member):
        record = await db.fetchval("select requeue_run($1)", run)
    assert (record["jobId"], record["status"], record["finishedAt"]) == (run, "pending", None)
    assert_in_line_again(before, await run_row(db, run))


@pytest.mark.parametrize("state", ["pending", "running", "parked", "completed"])
async def test_a_member_requeues_nothing_else(db: Db, daemon: Daemon, member: UUID, state: str) -> None:
    run = await run_in(db, daemon, state)
    before = await run_row(db, run)
    with pytest.raises(REFUSED) as refused:
        async with signed_in(db, member):
            await db.fetchval("select requeue_run($1)", run)
    assert refused.value.hint
    assert await run_row(db, run) == before


@pytest.mark.parametrize("role", OPERATORS)
@pytest.mark.parametrize("state", STATES)
async def test_an_operator_requeues_any_run_by_plain_update(db: Db, daemon: Daemon, role: str, state: str) -> None:
    run = await run_in(db, daemon, state)
    before = await run_row(db, run)
    await set_status(db, run, "pending", role)
    assert_in_line_again(before, await run_row(db, run))
    assert (await daemon.claim_one())["attempt"] == 1


@pytest.mark.parametrize("state", STATES)
async def test_an_operator_requeues_any_run_by_requeue_run(db: Db, daemon: Daemon, state: str) -> None:
    run = await run_in(db, daemon, state)
    before = await run_row(db, run)
    async with signed_in(db, role="service_role"):
        assert (await db.fetchval("select requeue_run($1)", run))["status"] == "pending"
    assert_in_line_again(before, await run_row(db, run))


def assert_in_line_again(before: asyncpg.Record, row: asyncpg.Record) -> None:
    assert row["claim"] > before["claim"]
    assert row["ticket"] > before["ticket"]
    assert (row["status"], row["attempt"], row["progress"], row["claimed_by"]) == ("pending", 0, 0, None)
    assert (row["payload"], row["finished_at"], row["message"], row["preview_url"]) == (None, None, None, None)
    assert abs((row["due_at"] - row["updated_at"]).total_seconds()) < 1, "due now"
    assert row["created_at"] == before["created_at"]
    assert row["started_at"] == before["started_at"]


async def test_requeueing_keeps_the_old_payload_in_the_event(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "completed")
    payload = (await run_row(db, run))["payload"]
    assert payload["imageUrl"] == IMAGE
    await set_status(db, run, "pending")
    last = (await events(db, run))[-1]
    assert last["event"] == "requeued"
    assert last["data"] == {
        "before": "completed",
        "attempts": 1,
        "payload": {key: value for key, value in payload.items() if value is not None},
    }


async def test_pending_to_pending_runs_it_now(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await db.execute("update runs set due_at = now() + interval '1 day' where id = $1", run)
    assert await daemon.claim(10) == []
    await set_status(db, run, "pending")
    assert (await daemon.claim_one())["id"] == run


async def test_a_requeue_can_be_put_off(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "failed")
    await db.execute("update runs set status = 'pending', due_at = now() + interval '1 hour' where id = $1", run)
    assert await daemon.claim(10) == []
    await move_clock(db, "61 min")
    assert (await daemon.claim_one())["id"] == run


@pytest.mark.parametrize("code", ["polling_timeout", "download", "download_failed", "storage", "storage_down"])
async def test_a_job_that_may_still_have_its_image_is_resumed(db: Db, daemon: Daemon, code: str) -> None:
    run = await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    await daemon.fail(await daemon.claim_one(), code)
    await set_status(db, run, "pending")
    assert (await run_row(db, run))["provider_job_id"] == "order-1"
    claimed = await daemon.claim_one()
    assert (claimed["provider_job_id"], claimed["attempt"]) == ("order-1", 1)
    assert claimed["submitted_ago"] < 5, "its time for polling begins anew"


@pytest.mark.parametrize("code", ["refused", "outcome_unknown", "my_storage", "polling_timeout_of_another_kind"])
async def test_after_any_other_failure_the_job_moves_to_the_event(db: Db, daemon: Daemon, code: str) -> None:
    run = await run_in(db, daemon, "parked")
    await move_clock(db, "6 s")
    await daemon.fail(await daemon.claim_one(), code)
    await set_status(db, run, "pending")
    row = await run_row(db, run)
    assert (row["provider_job_id"], row["submitted_at"]) == (None, None)
    assert (await events(db, run))[-1]["data"]["providerJobId"] == "order-1"


@pytest.mark.parametrize("state", ["parked", "cancelled"])
async def test_requeueing_an_unfailed_run_drops_its_job(db: Db, daemon: Daemon, state: str) -> None:
    run = await run_in(db, daemon, "parked")
    if state == "cancelled":
        await set_status(db, run, "cancelled")
    await set_status(db, run, "pending")
    assert (await run_row(db, run))["provider_job_id"] is None
    assert (await events(db, run))[-1]["data"]["providerJobId"] == "order-1"
