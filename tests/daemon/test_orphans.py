"""Orphans, provider jobs that no run has: found by their webhooks. Whole daemons, and a fake of OpenAI."""

import json
import signal
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.fakes.openai_responses import IN_PROGRESS, ResponsesAPI
from tests.fakes.server import Response
from tests.support.daemon_harness import DaemonHarness
from tests.support.openai_harness import background_harness
from tests.support.postgres import wait_until
from tests.support.runs import run_row
from tests.support.webhooks import SECRET, signed


@pytest.fixture
async def harness(database: str, responses_api: ResponsesAPI) -> AsyncIterator[DaemonHarness]:
    async with background_harness(database, responses_api, WEBHOOK_SECRET_OPENAI=SECRET) as harness:
        yield harness


async def send_webhook(harness: DaemonHarness, response: str, *, message: str = "msg_1") -> None:
    """Post OpenAI's webhook of a completed response."""
    body = json.dumps({"object": "event", "type": "response.completed", "data": {"id": response}})
    url = f"{harness.project.url}/rest/v1/rpc/webhook_openai?apikey={harness.project.keys.anon_key}"
    headers = {"content-type": "application/json", **signed(body, message=message)}
    async with httpx.AsyncClient() as client:
        posted = await client.post(url, content=body, headers=headers)
    assert posted.json() == {"received": True, "duplicate": False}


async def test_webhook_finds_the_run_of_an_unsaved_provider_job(
    harness: DaemonHarness, responses_api: ResponsesAPI
) -> None:
    responses_api.mute = True
    run = await harness.insert_run()
    await wait_until(lambda: responses_api.jobs)
    await harness.wait_for_event(run, "submitted")
    async with harness.run_daemon() as other:
        await other.started()
        harness.daemon.signal(signal.SIGKILL)
        await harness.wait_for_event(run, "taken_over")
        assert 40 < await harness.seconds_until_due(run) <= 60
        (response,) = responses_api.responses
        await send_webhook(harness, response)
        row = await harness.wait_for_status(run, "completed")

    assert (row["provider_job_id"], row["attempt"]) == (response, 1)
    assert len(responses_api.jobs) == 1
    assert len(await harness.events(run, "submitted")) == 1
    assert (await harness.events(run, "parked"))[0]["data"]["providerJobId"] == response


async def test_webhook_during_a_dead_claim_is_not_lost(harness: DaemonHarness, responses_api: ResponsesAPI) -> None:
    responses_api.mute = True
    run = await harness.insert_run()
    await wait_until(lambda: responses_api.jobs)
    await harness.wait_for_event(run, "submitted")
    (response,) = responses_api.responses
    await harness.db.execute("update runs set max_attempts = 1")  # no other attempt follows
    harness.daemon.signal(signal.SIGSTOP)
    await send_webhook(harness, response)
    # Old enough to be looked up before the run is taken over.
    await harness.db.execute("update image_jobs.webhook_deliveries set received_at = received_at - interval '3 s'")
    async with harness.run_daemon() as other:
        await other.started()
        row = await harness.wait_for_status(run, "completed")
        harness.daemon.signal(signal.SIGKILL)

    assert (row["provider_job_id"], row["attempt"]) == (response, 1)
    assert len(responses_api.jobs) == 1


async def test_broken_submit_waits_for_a_webhook_before_a_retry(
    harness: DaemonHarness, responses_api: ResponsesAPI
) -> None:
    responses_api.next(Response(cut=0))
    run = await harness.insert_run()
    await harness.wait_for_retry(run)
    assert 40 < await harness.seconds_until_due(run) <= 60
    assert len(await harness.events(run, "unknown_outcome")) == 1
    (response,) = responses_api.responses
    await send_webhook(harness, response)
    row = await harness.wait_for_status(run, "completed")

    assert row["provider_job_id"] == response
    assert len(responses_api.jobs) == 1


async def test_foreign_provider_job_is_looked_up_once(harness: DaemonHarness, responses_api: ResponsesAPI) -> None:
    responses_api.known("resp_foreign", metadata={"purpose": "homework"})
    await send_webhook(harness, "resp_foreign")
    await send_webhook(harness, "resp_nowhere", message="msg_2")
    await wait_until(lambda: len(harness.daemon.logged("provider_job.traced")) == 2, timeout=20)
    assert [line["result"] for line in harness.daemon.logged("provider_job.traced")] == ["unknown", "unknown"]
    assert len(responses_api.questions) == 2
    waiting = await harness.db.fetch(
        "select ask_at = 'infinity' as looked_up, closed_at from image_jobs.webhook_deliveries"
    )
    assert [tuple(row) for row in waiting] == [(True, None), (True, None)]
    run = await harness.insert_run()
    await send_webhook(harness, (await harness.wait_until_parked(run))["provider_job_id"], message="msg_3")
    await harness.wait_for_status(run, "completed")


async def test_failed_owner_lookup_is_repeated(harness: DaemonHarness, responses_api: ResponsesAPI) -> None:
    responses_api.next(Response(cut=0), Response(503))
    run = await harness.insert_run()
    await harness.wait_for_retry(run)
    (response,) = responses_api.responses
    await send_webhook(harness, response)
    await wait_until(lambda: harness.daemon.logged("provider_job.owner_unknown"), timeout=20)
    await harness.db.execute("update image_jobs.webhook_deliveries set ask_at = now()")  # its lease is over
    await harness.wait_for_status(run, "completed")
    assert len(responses_api.jobs) == 1


async def test_cancelling_a_parked_run_cancels_its_response(
    harness: DaemonHarness, responses_api: ResponsesAPI
) -> None:
    responses_api.stages = [IN_PROGRESS]
    run = await harness.insert_run()
    response = (await harness.wait_until_parked(run))["provider_job_id"]
    await harness.cancel(run)
    await harness.wait_for_event(run, "provider_job_cancelled")
    assert responses_api.cancelled == [response]
    assert responses_api.responses[response]["status"] == "cancelled"


async def test_orphan_of_a_cancelled_run_is_cancelled(harness: DaemonHarness, responses_api: ResponsesAPI) -> None:
    responses_api.stages = [IN_PROGRESS]
    responses_api.next(Response(cut=0))
    run = await harness.insert_run()
    await harness.wait_for_retry(run)
    await harness.cancel(run)
    (response,) = responses_api.responses
    await send_webhook(harness, response)
    await harness.wait_for_event(run, "provider_job_cancelled")
    assert responses_api.cancelled == [response]
    assert (await run_row(harness.db, run))["status"] == "cancelled"
