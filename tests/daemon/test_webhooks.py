"""Webhook first, poll second: whole daemons, the database as the receiver, and a fake of a proxy that sends webhooks."""

import signal
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.fakes.midjourney_api import MidjourneyAPI
from tests.support.daemon_harness import DaemonHarness, with_settings
from tests.support.midjourney_harness import cancels, midjourney_harness, polls
from tests.support.postgres import wait_until
from tests.support.runs import run_row

SECRET = "a webhook secret of these tests"
DRAWING = {"status": "IN_PROGRESS", "progress": "10%"}


@pytest.fixture
async def harness(
    database: str, midjourney_api: MidjourneyAPI, request: pytest.FixtureRequest
) -> AsyncIterator[DaemonHarness]:
    """A daemon that receives webhooks; `with_settings` sets more."""
    midjourney_api.stages = [DRAWING]
    more = getattr(request, "param", {})
    async with midjourney_harness(database, midjourney_api, WEBHOOK_SECRET=SECRET, **more) as harness:
        yield harness


async def incidents(harness: DaemonHarness, run: str) -> list[str]:
    """The messages of a run's incidents."""
    return [incident["message"] for incident in await harness.events(run, "incident")]


async def test_webhook_triggers_exactly_one_poll(harness: DaemonHarness, midjourney_api: MidjourneyAPI) -> None:
    run = await harness.insert_run()
    assert (await harness.wait_until_parked(run))["webhook"] == "awaited"
    assert 30 < await harness.seconds_until_due(run) <= 60
    assert not polls(midjourney_api)
    assert await midjourney_api.happen("1000", **midjourney_api.done()) == 200
    row = await harness.wait_for_status(run, "completed")

    assert row["webhook"] is None
    assert len(polls(midjourney_api)) == 1
    assert len(midjourney_api.jobs) == 1
    assert await incidents(harness, run) == []
    assert "webhook" in await harness.event_names(run)


async def test_progress_webhook_leads_to_waiting_for_the_next(
    harness: DaemonHarness, midjourney_api: MidjourneyAPI
) -> None:
    run = await harness.insert_run()
    await harness.wait_until_parked(run)
    await midjourney_api.happen("1000", **DRAWING)

    async def awaited_again() -> bool:
        row = await run_row(harness.db, run)
        return row["progress"] == 10 and row["webhook"] == "awaited"

    await wait_until(awaited_again, timeout=20)
    assert 30 < await harness.seconds_until_due(run) <= 60
    assert len(polls(midjourney_api)) == 1
    await midjourney_api.happen("1000", **midjourney_api.done())
    await harness.wait_for_status(run, "completed")
    assert len(polls(midjourney_api)) == 2
    assert await incidents(harness, run) == []


@with_settings(IMAGE_JOBS_WEBHOOK_WAIT="1")
async def test_missing_webhook_is_an_incident_and_polled(harness: DaemonHarness, midjourney_api: MidjourneyAPI) -> None:
    midjourney_api.deaf = True
    midjourney_api.stages = [DRAWING, DRAWING, DRAWING, midjourney_api.done()]
    run = await harness.insert_run()
    row = await harness.wait_for_status(run, "completed")

    assert len(polls(midjourney_api)) == 4
    assert await incidents(harness, run) == ["No webhook came within 1 s; it is polled from now on."]
    assert row["provider_job_id"] == "1000"


@with_settings(IMAGE_JOBS_WEBHOOK_WAIT="1", IMAGE_JOBS_POLL_TIMEOUT="2")
async def test_requeue_after_a_late_webhook_fetches_the_same_job(
    harness: DaemonHarness, midjourney_api: MidjourneyAPI
) -> None:
    run = await harness.insert_run()
    row = await harness.wait_for_status(run, "failed")
    assert (row["payload"]["error"], row["payload"]["code"]) == ("Polling timeout exceeded", "polling_timeout")
    assert await incidents(harness, run) == [
        "No webhook came within 1 s; it is polled from now on.",
        "Polling timeout exceeded",
    ]
    assert await midjourney_api.happen("1000", **midjourney_api.done()) == 200
    (late,) = await harness.events(run, "late_webhook")
    assert "Requeue the run" in late["data"]["hint"]
    assert (await run_row(harness.db, run))["status"] == "failed"
    await harness.requeue(run)
    row = await harness.wait_for_status(run, "completed")
    assert row["provider_job_id"] == "1000"
    assert len(midjourney_api.jobs) == 1
    assert cancels(midjourney_api) == []


@with_settings(IMAGE_JOBS_WEBHOOK_WAIT="60", IMAGE_JOBS_POLL_TIMEOUT="1")
async def test_webhook_wait_is_capped_by_the_poll_timeout(
    harness: DaemonHarness, midjourney_api: MidjourneyAPI
) -> None:
    run = await harness.insert_run()
    await harness.wait_for_status(run, "failed")
    assert await incidents(harness, run) == [
        "No webhook came within 1 s; it is polled from now on.",
        "Polling timeout exceeded",
    ]


async def test_duplicate_stale_and_unknown_webhooks_are_harmless(
    harness: DaemonHarness, midjourney_api: MidjourneyAPI
) -> None:
    run = await harness.insert_run()
    await harness.wait_until_parked(run)
    task, hook = dict(midjourney_api.tasks["1000"]), midjourney_api.hooks["1000"]
    midjourney_api.tasks["1000"].update(midjourney_api.done())  # the stage that a poll returns
    stages: list[dict[str, Any]] = [
        midjourney_api.done(),
        midjourney_api.done(),
        DRAWING,
        {"status": "FAILURE"},
        {"id": "9999"},
    ]
    for each in stages:
        assert await midjourney_api.post(hook, {**task, **each}) == 200
    await harness.wait_for_status(run, "completed")
    for each in stages:
        assert await midjourney_api.post(hook, {**task, **each}) == 200

    async def closed() -> bool:
        return not await harness.db.fetchval(
            "select exists (select from image_jobs.webhook_deliveries where closed_at is null and provider_job_id = '1000')"
        )

    await wait_until(closed, timeout=20)
    assert (await run_row(harness.db, run))["status"] == "completed"
    assert len(midjourney_api.jobs) == 1
    assert len(await harness.events(run, "completed")) == 1


async def test_webhook_after_a_kill_goes_to_another_daemon(
    harness: DaemonHarness, midjourney_api: MidjourneyAPI
) -> None:
    run = await harness.insert_run()
    await harness.wait_until_parked(run)
    harness.daemon.signal(signal.SIGKILL)
    await harness.daemon.ended()
    assert await midjourney_api.happen("1000", **midjourney_api.done()) == 200  # only the database is there
    async with harness.run_daemon() as other:
        await other.started()
        await harness.wait_for_status(run, "completed")
    assert len(midjourney_api.jobs) == 1
    assert len(polls(midjourney_api)) == 1
    assert cancels(midjourney_api) == []


async def test_leaving_daemon_saves_a_submit_in_flight(harness: DaemonHarness, midjourney_api: MidjourneyAPI) -> None:
    go = midjourney_api.hold()
    run = await harness.insert_run()
    await wait_until(lambda: midjourney_api.jobs, timeout=20)
    harness.daemon.signal(signal.SIGTERM)
    await wait_until(lambda: harness.daemon.logged("daemon.draining"))
    harness.daemon.signal(signal.SIGTERM)
    go.set()
    assert await harness.daemon.ended() == 0
    row = await run_row(harness.db, run)
    assert (row["status"], row["provider_job_id"], row["webhook"]) == ("running", "1000", "awaited")
    assert await harness.events(run, "unknown_outcome") == []


async def test_start_replaces_webhook_secrets_but_not_foreign_ones(harness: DaemonHarness) -> None:
    await harness.db.execute(
        "insert into image_jobs.webhook_secrets values ('another', '\\x00112233445566778899aabbccddeeff')"
    )
    replaced = "the first of two secrets,the second of two secrets"
    async with harness.run_daemon(WEBHOOK_SECRET_MIDJOURNEY=replaced) as other:
        await other.started()
        found = await harness.db.fetch("select provider, encode(key, 'escape') as key from image_jobs.webhook_secrets")
    secrets = [(row["provider"], row["key"]) for row in found if row["provider"] != "another"]
    assert sorted(secrets) == [
        ("hmac", SECRET),
        ("midjourney", "the first of two secrets"),
        ("midjourney", "the second of two secrets"),
        ("openai", SECRET),
    ]
    assert len(found) == 5


async def test_invalid_webhook_secret_is_refused_without_showing_it(harness: DaemonHarness) -> None:
    broken = "whsec_!this is no base64!"
    async with harness.run_daemon(WEBHOOK_SECRET_OPENAI=broken) as other:
        assert await other.ended() == 2
    written = "\n".join(other.raw)
    assert "WEBHOOK_SECRET_OPENAI" in written
    assert "Traceback" not in written
    assert broken[6:] not in written
