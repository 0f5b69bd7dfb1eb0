"""Provider jobs of a run that was rerouted: no run waits for them, and none is paid for in silence."""

from typing import Any

import pytest

from tests.sql.test_provider_jobs import attach, deliver, open_deliveries
from tests.sql.test_provider_jobs import daemon as daemon  # noqa: PLC0414 - a fixture
from tests.support.protocol import Daemon, Db, new_daemon
from tests.support.runs import event_names, insert_run, run_row

MODEL, STEP = "openai:gpt-image-2", "google:gemini-3-pro-image"
SILENT = {"error": "No result.", "code": "outcome_unknown"}


async def claimed_run(db: Db, daemon: Daemon) -> dict[str, Any]:
    await insert_run(db, processor=MODEL, fallback=[STEP])
    return await daemon.claim_one()


async def go_on(daemon: Daemon, claimed: dict[str, Any], code: str = "outcome_unknown") -> str:
    return await daemon.settle(claimed, "failed", payload={**SILENT, "code": code}, fall_back=True)


async def cancellations(db: Db) -> list[tuple[str, str]]:
    rows = await db.fetch("select provider, provider_job_id from image_jobs.cancellations")
    return [tuple(row) for row in rows]


@pytest.mark.parametrize(
    ("code", "cancelled"), [("polling_timeout", [("openai", "order-1")]), ("provider_unavailable", [])]
)
async def test_a_timed_out_job_is_cancelled_where_it_was_made(
    db: Db, daemon: Daemon, code: str, cancelled: list[tuple[str, str]]
) -> None:
    claimed = await claimed_run(db, daemon)
    await daemon.park(claimed, due_in=0)
    await go_on(daemon, await daemon.claim_one(), code)
    assert await cancellations(db) == cancelled


async def test_a_job_of_a_step_is_cancelled_at_that_step(db: Db, daemon: Daemon) -> None:
    await go_on(daemon, await claimed_run(db, daemon))
    google = await new_daemon(db, "google")
    await google.park(await google.claim_one(), "order-7")
    await db.execute("update runs set status = 'cancelled'")
    assert await cancellations(db) == [("google", "order-7")]


async def test_an_orphan_of_a_rerouted_run_is_cancelled(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await go_on(daemon, claimed)
    await deliver(db)
    assert await attach(db, claimed) == "cancelled"
    assert await cancellations(db) == [("openai", "order-1")]
    assert await open_deliveries(db) == 0
    row = await run_row(db, claimed["id"])
    assert (row["status"], row["routed_to"], row["provider_job_id"]) == ("pending", STEP, None)


async def test_an_orphan_of_a_provider_never_named_is_not_attached(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    assert await attach(db, claimed, provider="stability") == "unknown"


async def test_a_run_stays_with_a_job_whose_webhook_has_come(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await deliver(db)
    assert await attach(db, claimed) == "held"
    assert await go_on(daemon, claimed) == "settled"
    row = await run_row(db, claimed["id"])
    assert (row["status"], row["routed_to"], row["provider_job_id"], row["attempt"]) == ("running", None, "order-1", 1)
    assert "fallback" not in await event_names(db, claimed["id"])
    checking = await daemon.claim_one()
    assert (checking["processor"], checking["provider_job_id"]) == (MODEL, "order-1")


async def test_a_webhook_never_matches_a_job_of_another_provider(db: Db, daemon: Daemon) -> None:
    claimed = await claimed_run(db, daemon)
    await deliver(db)
    await go_on(daemon, claimed)
    await db.execute(
        "update image_jobs.webhook_deliveries set run_id = $1, ticket = $2", claimed["id"], claimed["ticket"]
    )
    google = await new_daemon(db, "google")
    await google.settle(await google.claim_one(), "retry", payload=SILENT, due_in=60)
    row = await run_row(db, claimed["id"])
    assert (row["status"], row["routed_to"], row["provider_job_id"]) == ("pending", STEP, None)


@pytest.mark.parametrize("requeued", [False, True])
async def test_a_job_of_a_lost_claim_is_cancelled_at_its_step(db: Db, daemon: Daemon, requeued: bool) -> None:
    await go_on(daemon, await claimed_run(db, daemon))
    google = await new_daemon(db, "google")
    claimed = await google.claim_one()
    await db.execute(f"update runs set status = '{'pending' if requeued else 'cancelled'}'")
    result = await google.settle(
        claimed, "parked", provider_job_id="order-7", ticket=claimed["ticket"], processor=claimed["processor"]
    )
    assert result == "lost"
    assert await cancellations(db) == [("google", "order-7")]
