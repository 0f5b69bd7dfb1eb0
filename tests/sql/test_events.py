"""The audit trail: each transition adds its event, in sequence, with the data that is known."""

from typing import Any
from uuid import uuid4

import asyncpg
import pytest

from tests.support.postgres import connect
from tests.support.protocol import IMAGE, Daemon, Db, events, move_clock, new_daemon, run_in
from tests.support.runs import event_names, insert_run, insert_runs, run_row


async def test_a_whole_life_has_its_events_in_sequence(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    await daemon.record(claimed, progress=40, message="Drawing.")
    generated = {"kind": "log", "payload": {"event": "generated", "message": "Made.", "data": {"cost": 0.02}}}
    await daemon.record(claimed, events=[generated])
    stored = {"kind": "log", "payload": {"event": "stored", "message": "Stored.", "data": {"uploadTries": 1}}}
    await daemon.settle(claimed, "completed", payload={"imageUrl": IMAGE}, events=[stored])
    assert await events(db, run) == [
        {
            "kind": "log",
            "event": "created",
            "message": "Waiting in line.",
            "progress": 0,
            "data": await created(db, run),
        },
        {
            "kind": "log",
            "event": "claimed",
            "message": "Attempt 1 of 3.",
            "progress": 0,
            "data": {"daemon": str(daemon.id), "attempt": 1, "processor": "demo:painter"},
        },
        {"kind": "progress", "event": "progress", "message": "Drawing.", "progress": 40},
        {"kind": "log", "event": "generated", "message": "Made.", "data": {"cost": 0.02}},
        {"kind": "log", "event": "stored", "message": "Stored.", "data": {"uploadTries": 1}},
        {
            "kind": "log",
            "event": "completed",
            "message": "The image is ready.",
            "progress": 100,
            "data": {"imageUrl": IMAGE, "timings": (await run_row(db, run))["payload"]["timings"]},
        },
    ]


async def created(db: Db, run: str) -> dict[str, Any]:
    """Return the data of the first event."""
    data = (await events(db, run))[0]["data"]
    assert data["processor"] == "demo:painter"
    assert set(data) == {"processor", "dueAt"}
    return data


@pytest.mark.parametrize(
    ("state", "names"),
    [
        ("pending", ["created"]),
        ("running", ["created", "claimed"]),
        ("parked", ["created", "claimed", "parked"]),
        ("completed", ["created", "claimed", "completed"]),
        ("failed", ["created", "claimed", "failed"]),
        ("cancelled", ["created", "cancelled"]),
    ],
)
async def test_each_state_has_its_events(db: Db, daemon: Daemon, state: str, names: list[str]) -> None:
    run = await run_in(db, daemon, state)
    assert await event_names(db, run) == names
    await db.execute("update runs set status = 'pending' where id = $1", run)
    assert await event_names(db, run) == [*names, "requeued"]


async def test_the_parked_event_has_the_job_and_the_next_check(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await daemon.settle(await daemon.claim_one(), "parked", provider_job_id="order-1", due_in=5, message="In the line.")
    last = (await events(db, run))[-1]
    assert (last["event"], last["kind"], last["message"]) == ("parked", "log", "In the line.")
    assert last["data"]["providerJobId"] == "order-1"
    assert last["data"]["checkAt"]


async def test_a_check_that_finds_nothing_new_adds_no_event(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "parked")
    before = await event_names(db, run)
    await move_clock(db, "6 s")
    await daemon.settle(await daemon.claim_one(), "parked", due_in=5)
    assert await event_names(db, run) == before


async def test_the_retry_event_has_the_reason_and_the_time(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    reason = {"error": "The provider is busy.", "code": "unavailable", "hint": "It is tried again."}
    await daemon.settle(await daemon.claim_one(), "retry", payload=reason, due_in=5)
    last = (await events(db, run))[-1]
    assert (last["kind"], last["event"], last["message"]) == ("error", "retry", "The provider is busy.")
    data = last["data"]
    assert data.pop("dueAt")
    assert data == {"code": "unavailable", "hint": "It is tried again.", "attempt": 1}


async def test_a_failure_is_an_error_with_its_code(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await daemon.fail(await daemon.claim_one(), "refused", "The provider refused this prompt.")
    last = (await events(db, run))[-1]
    assert (last["kind"], last["event"], last["message"]) == ("error", "failed", "The provider refused this prompt.")
    timings = (await run_row(db, run))["payload"]["timings"]
    assert last["data"] == {"code": "refused", "hint": "Ask again.", "attempts": 1, "timings": timings}


async def test_a_released_claim_is_an_event(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await daemon.claim_one()
    await daemon.sync(held=[])
    assert (await events(db, run))[-1]["message"] == "In line again."


async def test_every_event_has_a_message(db: Db, daemon: Daemon) -> None:
    for state in ("parked", "completed", "failed", "cancelled"):
        await run_in(db, daemon, state)
    await db.execute("update runs set status = 'pending'")
    await daemon.claim(10)
    await daemon.sync(held=[])
    assert not await db.fetch("select payload from run_events where payload ->> 'message' is null")


async def test_events_of_many_runs_are_in_sequence_per_run(db: Db, daemon: Daemon) -> None:
    ids = await insert_runs(db, 50)
    claims = await daemon.claim(50)
    drawn = {"kind": "log", "payload": {"event": "stored", "message": "Stored."}}
    await daemon.sync(
        settlements=[
            {
                "id": c["id"],
                "claim": c["claim"],
                "outcome": "completed",
                "payload": {"imageUrl": IMAGE},
                "events": [drawn],
            }
            for c in claims
        ]
    )
    for run in ids:
        assert await event_names(db, run) == ["created", "claimed", "stored", "completed"]


async def test_an_update_that_changes_nothing_adds_no_event(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "completed")
    before = await event_names(db, run)
    await db.execute("update runs set status = status, progress = progress, metadata = metadata, due_at = now()")
    assert await event_names(db, run) == before


async def test_a_rolled_back_change_adds_no_event(database: str, db: Db) -> None:
    other = await connect(database)
    transaction = other.transaction()
    await transaction.start()
    await insert_run(other)
    await transaction.rollback()
    await other.close()
    assert await db.fetchval("select count(*) from run_events") == 0


async def test_the_seq_of_an_event_cannot_be_chosen(db: Db) -> None:
    run = await insert_run(db)
    await db.execute(
        "insert into run_events (run_id, kind, payload, seq) values ($1, 'log', '{\"event\": \"x\"}', -5)", run
    )
    assert await event_names(db, run) == ["created", "x"]


async def test_the_kind_of_an_event_is_known(db: Db) -> None:
    run = await insert_run(db)
    with pytest.raises(asyncpg.CheckViolationError, match="run_events_kind_is_known"):
        await db.execute("insert into run_events (run_id, kind) values ($1, 'gossip')", run)


async def test_an_insert_wakes_once_and_only_idle_daemons(db: Db, daemon: Daemon) -> None:
    heard: list[str] = []
    await db.add_listener("image_jobs_wake", lambda *notification: heard.append(notification[-1]))
    await insert_runs(db, 20, workflow=uuid4())
    await db.execute("select")
    assert heard == [""]
    await daemon.sync(awake=30)
    await insert_run(db)
    await db.execute("select")
    assert heard == [""]
    await move_clock(db, "31 s")
    await insert_run(db)
    await db.execute("select")
    assert heard == ["", ""]


async def test_a_busy_daemon_silences_only_its_own_providers(db: Db, daemon: Daemon) -> None:
    await new_daemon(db, "openai")
    heard: list[str] = []
    await db.add_listener("image_jobs_wake", lambda *notification: heard.append(notification[-1]))
    await daemon.sync(awake=30)
    await insert_run(db)
    await insert_run(db, processor="dreams:deep")
    await db.execute("select")
    assert heard == []
    await insert_run(db, processor="openai:gpt-image-2")
    await db.execute("select")
    assert heard == [""]
