"""OpenAI in the background from the row to the image: real daemons, database and storage, and a fake of the Responses API
that keeps what was submitted."""

import json
import signal
from collections.abc import AsyncIterator

import pytest

from tests.fakes.openai_api import error, moderation
from tests.fakes.openai_responses import COST, IN_PROGRESS, QUEUED, ResponsesAPI, failed, not_drawn, picture_of
from tests.fakes.server import Response, size_of
from tests.support.daemon_harness import DaemonHarness, fetch
from tests.support.openai_harness import FLARE, background_harness
from tests.support.postgres import wait_until

STORY = ["created", "claimed", "warning", "submitted", "parked", "generated", "stored", "completed"]


@pytest.fixture
async def harness(database: str, responses_api: ResponsesAPI) -> AsyncIterator[DaemonHarness]:
    async with background_harness(database, responses_api) as harness:
        yield harness


async def wait_for_polls(api: ResponsesAPI, count: int = 1) -> None:
    """Wait until responses have been polled so often."""
    await wait_until(lambda: len(api.questions) >= count)


async def test_background_run_is_submitted_polled_and_completed(
    harness: DaemonHarness, responses_api: ResponsesAPI
) -> None:
    responses_api.stages = [QUEUED, IN_PROGRESS, responses_api.completed()]
    run = await harness.insert_run(prompt={"size": "1536x1024"})
    row = await harness.wait_for_status(run, "completed")

    payload = row["payload"]
    assert payload["cost"] == pytest.approx(COST)
    assert payload["revisedPrompt"] == "A red fox, as it was drawn"
    assert (payload["model"], row["attempt"]) == (FLARE, 1)
    assert size_of((await fetch(payload["imageUrl"])).content) == (64, 48)
    assert await harness.event_names(run) == STORY
    (call,) = responses_api.jobs
    assert row["provider_job_id"] in responses_api.responses
    (submitted,) = await harness.events(run, "submitted")
    assert submitted["data"]["request"] == {"endpoint": "responses", **call.fields}
    assert call.fields["metadata"] == {"run_id": run, "ticket": str(row["ticket"])}
    (generated,) = await harness.events(run, "generated")
    assert generated["data"]["response_id"] == row["provider_job_id"]
    assert (await harness.node_data(run))["status"] == "completed"


async def test_own_image_is_edited(harness: DaemonHarness, responses_api: ResponsesAPI) -> None:
    first = await harness.wait_for_status(await harness.insert_run(), "completed")
    url = first["payload"]["imageUrl"]
    await harness.wait_for_status(await harness.insert_run(prompt={"previousImage": url}), "completed")

    _, edit = responses_api.jobs
    assert edit.fields["tools"][0]["action"] == "edit"
    sent = picture_of(edit.fields["input"][0]["content"][1]["image_url"])
    assert sent == (await fetch(url)).content


async def test_provider_job_outlives_a_killed_daemon(harness: DaemonHarness, responses_api: ResponsesAPI) -> None:
    responses_api.stages = [IN_PROGRESS]
    run = await harness.insert_run()
    await wait_for_polls(responses_api)
    async with harness.run_daemon() as other:
        await other.started()
        harness.daemon.signal(signal.SIGKILL)
        await harness.daemon.ended()
        responses_api.stages = [responses_api.completed()]
        row = await harness.wait_for_status(run, "completed")

    assert row["attempt"] == 1
    assert row["provider_job_id"] in responses_api.responses
    assert len(responses_api.jobs) == 1
    assert len(await harness.events(run, "submitted")) == 1


async def test_job_lost_with_its_daemon_is_an_unknown_outcome(
    harness: DaemonHarness, responses_api: ResponsesAPI
) -> None:
    responses_api.mute = True
    run = await harness.insert_run()
    await wait_until(lambda: responses_api.jobs)
    await harness.wait_for_event(run, "submitted")
    async with harness.run_daemon() as other:
        await other.started()
        harness.daemon.signal(signal.SIGKILL)
        (taken,) = await harness.wait_for_event(run, "taken_over")
        responses_api.mute = False
        await harness.make_due(run)
        row = await harness.wait_for_status(run, "completed")

    assert taken["data"]["possibleCost"] == pytest.approx(0.0132, abs=1e-4)
    assert row["attempt"] == 2
    assert len(responses_api.jobs) == 2


async def test_requeue_after_polling_timeout_finds_the_same_job(database: str, responses_api: ResponsesAPI) -> None:
    responses_api.stages = [IN_PROGRESS]
    async with background_harness(database, responses_api, IMAGE_JOBS_POLL_TIMEOUT="1") as harness:
        run = await harness.insert_run()
        row = await harness.wait_for_status(run, "failed")

        assert (row["payload"]["error"], row["payload"]["code"]) == ("Polling timeout exceeded", "polling_timeout")
        assert await harness.events(run, "incident")
        responses_api.stages = [responses_api.completed()]
        await harness.requeue(run)
        again = await harness.wait_for_status(run, "completed")

        assert again["provider_job_id"] == row["provider_job_id"]
        assert len(responses_api.jobs) == 1


async def test_refused_checks_lose_no_provider_job(harness: DaemonHarness, responses_api: ResponsesAPI) -> None:
    responses_api.stages = [IN_PROGRESS]
    run = await harness.insert_run()
    await wait_for_polls(responses_api)
    wrong = Response.json(401, {"error": error("Incorrect API key provided.", "invalid_api_key")})
    rejected = Response.json(400, {"error": error("Unknown parameter.", "unknown_parameter")})
    routeless = Response(404, b"<html>No route</html>")
    responses_api.next(wrong, rejected, routeless, Response(500), Response(cut=30))
    await wait_for_polls(responses_api, len(responses_api.questions) + 6)
    responses_api.stages = [responses_api.completed()]
    row = await harness.wait_for_status(run, "completed")

    assert row["attempt"] == 1
    assert len(responses_api.jobs) == 1
    assert await harness.db.fetchval("select array_agg(state) from image_jobs.calls where run_id = $1", run) == [
        "charged"
    ]


async def test_polling_timeout_reports_the_last_error(database: str, responses_api: ResponsesAPI) -> None:
    responses_api.stages = [IN_PROGRESS]
    async with background_harness(database, responses_api, IMAGE_JOBS_POLL_TIMEOUT="2") as harness:
        run = await harness.insert_run()
        await wait_for_polls(responses_api)
        responses_api.next(
            *[Response.json(401, {"error": error("Incorrect API key provided.", "invalid_api_key")})] * 50
        )
        row = await harness.wait_for_status(run, "failed")

    assert row["payload"]["error"] == "Polling timeout exceeded"
    assert row["payload"]["hint"].startswith("OpenAI does not accept our key. Requeue the run")


async def test_failed_response_is_resubmitted_as_the_next_attempt(
    harness: DaemonHarness, responses_api: ResponsesAPI
) -> None:
    responses_api.stages = [failed("server_error", "It broke down.")]
    run = await harness.insert_run()
    await harness.wait_for_retry(run)
    responses_api.stages = [responses_api.completed()]
    await harness.make_due(run)
    row = await harness.wait_for_status(run, "completed")

    assert row["attempt"] == 2
    (retry,) = await harness.events(run, "retry")
    assert retry["message"] == "OpenAI had a problem: It broke down."
    assert len(responses_api.jobs) == 2


async def test_deleted_response_is_resubmitted_with_possible_cost(
    harness: DaemonHarness, responses_api: ResponsesAPI
) -> None:
    responses_api.stages = [IN_PROGRESS]
    run = await harness.insert_run()
    await wait_for_polls(responses_api)
    responses_api.responses.clear()
    await harness.wait_for_retry(run)
    responses_api.stages = [responses_api.completed()]
    await harness.make_due(run)
    await harness.wait_for_status(run, "completed")

    assert len(await harness.events(run, "unknown_outcome")) == 1
    assert len(responses_api.jobs) == 2


async def test_refusal_in_a_completed_response_keeps_its_cost(
    harness: DaemonHarness, responses_api: ResponsesAPI
) -> None:
    responses_api.stages = [responses_api.completed(not_drawn(moderation("output", "violence")))]
    run = await harness.insert_run()
    row = await harness.wait_for_status(run, "failed")

    assert row["payload"]["code"] == "content_policy"
    assert row["payload"]["error"] == "OpenAI refused the picture it had made (violence)."
    (charged,) = await harness.events(run, "charged")
    assert charged["data"]["cost"] == pytest.approx(COST)
    assert (await harness.node_data(run))["status"] == "error"
    assert len(responses_api.jobs) == 1


async def test_missing_responses_api_fails_the_run(harness: DaemonHarness, responses_api: ResponsesAPI) -> None:
    responses_api.compatible = True
    row = await harness.wait_for_status(await harness.insert_run(), "failed")

    assert row["payload"]["error"] == "There is no Responses API at this address."
    assert "metadata.mode" in row["payload"]["hint"]
    assert len(responses_api.jobs) == 1


async def test_webhook_url_of_a_run_is_a_warning_and_not_sent(
    harness: DaemonHarness, responses_api: ResponsesAPI
) -> None:
    run = await harness.insert_run(webhookUrl="https://example.com/hook")
    await harness.wait_for_status(run, "completed")

    warnings = {event["data"]["field"]: event["message"] for event in await harness.events(run, "warning")}
    assert set(warnings) == {"mode", "webhookUrl"}
    assert "per project" in warnings["webhookUrl"]
    assert "example.com" not in json.dumps(responses_api.jobs[0].fields)
