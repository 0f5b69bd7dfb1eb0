"""Webhooks of OpenAI, signed as OpenAI signs: from the REST endpoint to the image, with whole daemons."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from uuid import uuid4

import httpx
import pytest
from openai import OpenAI

from tests.fakes.openai_responses import COST, IN_PROGRESS, ResponsesAPI, failed
from tests.fakes.server import Response
from tests.support.daemon_harness import DaemonHarness, with_settings
from tests.support.openai_harness import background_harness
from tests.support.postgres import wait_until
from tests.support.runs import run_row
from tests.support.webhooks import SECRET, signed


@pytest.fixture
async def harness(
    database: str, responses_api: ResponsesAPI, request: pytest.FixtureRequest
) -> AsyncIterator[DaemonHarness]:
    """A daemon that receives webhooks; `with_settings` sets more."""
    responses_api.stages = [IN_PROGRESS]
    more = getattr(request, "param", {})
    async with background_harness(database, responses_api, WEBHOOK_SECRET_OPENAI=SECRET, **more) as harness:
        yield harness


async def send_webhook(
    harness: DaemonHarness, response: str, kind: str = "response.completed", *, secret: str = SECRET
) -> int:
    """Post a webhook as OpenAI does. Returns the status."""
    event = {"id": "evt_1", "object": "event", "type": kind, "created_at": int(time.time()), "data": {"id": response}}
    body = json.dumps(event)
    headers = signed(body, secret=secret, message=f"wh_{uuid4().hex}")
    assert OpenAI(api_key="none").webhooks.unwrap(body, headers, secret=secret).type == kind
    url = f"{harness.project.url}/rest/v1/rpc/webhook_openai?apikey={harness.project.keys.anon_key}"
    async with httpx.AsyncClient() as client:
        posted = await client.post(url, content=body, headers={"content-type": "application/json", **headers})
    return posted.status_code


async def test_webhook_of_a_completed_response_triggers_a_poll(
    harness: DaemonHarness, responses_api: ResponsesAPI
) -> None:
    run = await harness.insert_run()
    row = await harness.wait_until_parked(run)
    assert row["webhook"] == "awaited"
    assert responses_api.questions == []
    responses_api.stages = [responses_api.completed()]
    assert await send_webhook(harness, row["provider_job_id"]) == 200
    row = await harness.wait_for_status(run, "completed")

    assert row["payload"]["cost"] == pytest.approx(COST)
    assert len(responses_api.questions) == 1
    assert len(responses_api.jobs) == 1
    assert await harness.events(run, "incident") == []
    (webhook,) = await harness.events(run, "webhook")
    assert (webhook["kind"], webhook["data"]["type"]) == ("webhook", "response.completed")


async def test_webhook_of_a_failed_response_is_verified_by_a_poll(
    harness: DaemonHarness, responses_api: ResponsesAPI
) -> None:
    run = await harness.insert_run()
    row = await harness.wait_until_parked(run)
    responses_api.stages = [failed("invalid_prompt", "Flagged.")]
    assert await send_webhook(harness, row["provider_job_id"], "response.failed") == 200
    row = await harness.wait_for_status(run, "failed")

    assert row["payload"]["code"] == "content_policy"
    assert len(responses_api.questions) == 1


async def test_webhook_with_a_foreign_signature_triggers_no_poll(
    harness: DaemonHarness, responses_api: ResponsesAPI
) -> None:
    run = await harness.insert_run()
    row = await harness.wait_until_parked(run)
    other = "whsec_" + "b" * 44

    assert await send_webhook(harness, row["provider_job_id"], secret=other) == 401
    assert responses_api.questions == []
    assert (await run_row(harness.db, run))["due_at"] == row["due_at"]


@with_settings(IMAGE_JOBS_WEBHOOK_WAIT="1")
async def test_missing_webhook_is_an_incident_and_polled(harness: DaemonHarness, responses_api: ResponsesAPI) -> None:
    run = await harness.insert_run()
    await wait_until(lambda: len(responses_api.questions) >= 2, timeout=20)
    responses_api.stages = [responses_api.completed()]
    await harness.wait_for_status(run, "completed")

    (incident,) = await harness.events(run, "incident")
    assert incident["message"] == "No webhook came within 1 s; it is polled from now on."
    assert len(responses_api.jobs) == 1


@with_settings(IMAGE_JOBS_DRAIN_TIMEOUT="0")
async def test_broken_submit_at_shutdown_waits_for_a_webhook(
    harness: DaemonHarness, responses_api: ResponsesAPI
) -> None:
    breaks_off = asyncio.Event()
    responses_api.next(Response(after=breaks_off, cut=0))
    run = await harness.insert_run()
    await wait_until(lambda: responses_api.jobs, timeout=20)
    harness.daemon.signal(signal.SIGTERM)
    await wait_until(lambda: harness.daemon.logged("daemon.out_of_time"))
    breaks_off.set()
    await harness.daemon.ended()

    (unknown,) = await harness.events(run, "unknown_outcome")
    assert "broken off" in unknown["message"]
    assert 40 < await harness.seconds_until_due(run) <= 60


async def test_deleted_response_is_resubmitted_without_waiting(
    harness: DaemonHarness, responses_api: ResponsesAPI
) -> None:
    run = await harness.insert_run()
    row = await harness.wait_until_parked(run)
    responses_api.responses.clear()
    assert await send_webhook(harness, row["provider_job_id"]) == 200
    await harness.wait_for_retry(run)

    assert await harness.seconds_until_due(run) < 10


async def test_cancelling_during_submit_cancels_the_response(
    harness: DaemonHarness, responses_api: ResponsesAPI
) -> None:
    go = responses_api.hold()
    run = await harness.insert_run()
    await wait_until(lambda: responses_api.jobs, timeout=20)
    await harness.cancel(run)
    await harness.wait_for_event(run, "cancelled")
    go.set()
    await wait_until(lambda: responses_api.cancelled == list(responses_api.responses), timeout=20)
    await harness.wait_for_event(run, "provider_job_cancelled")
