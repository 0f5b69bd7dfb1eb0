"""OpenAI with daemons that have other settings, or are killed."""

import json
import signal
from collections.abc import AsyncIterator

import pytest

from daemon.providers.openai.models import estimate
from tests.fakes.openai_api import OpenAIAPI, hang
from tests.support.openai_harness import FLARE, POSSIBLE_COST, openai_harness
from tests.support.postgres import free_port, wait_until


@pytest.fixture
async def api() -> AsyncIterator[OpenAIAPI]:
    async with OpenAIAPI() as api:
        yield api


async def test_retired_model_fails_with_strict_models(database: str, api: OpenAIAPI) -> None:
    async with openai_harness(database, api, IMAGE_JOBS_STRICT_MODELS="1") as harness:
        run = await harness.insert_run("openai:dall-e-3")
        row = await harness.wait_for_status(run, "failed")

        assert row["payload"]["code"] == "model_retired"
        assert row["payload"]["hint"] == f"Use openai:{FLARE}."
        assert await harness.event_names(run) == ["created", "claimed", "failed"]
    assert api.requests == []


async def test_compatible_server_has_its_own_models_and_prices(database: str, api: OpenAIAPI) -> None:
    api.compatible = True
    other_address = api.url.replace("127.0.0.1", "0.0.0.0")  # reaches the fake, and is not known to be this machine
    async with openai_harness(database, api, OPENAI_BASE_URL=other_address, IMAGE_JOBS_STRICT_MODELS="1") as harness:
        run = await harness.insert_run("openai:dall-e-3")
        row = await harness.wait_for_status(run, "completed")

        assert (row["payload"]["requestedModel"], row["payload"]["model"]) == ("dall-e-3", "dall-e-3")
        assert row["payload"]["cost"] is None
        assert await harness.events(run, "warning") == []
        offered = await harness.db.fetch("select distinct provider from image_models")
        assert [model["provider"] for model in offered] == ["demo"]
    assert [request.fields["model"] for request in api.requests] == ["dall-e-3"]


async def test_wrong_key_is_final_and_written_nowhere(database: str, api: OpenAIAPI) -> None:
    wrong = "a wrong key that must not be shown"
    async with openai_harness(database, api, OPENAI_API_KEY=wrong) as harness:
        run = await harness.insert_run()
        row = await harness.wait_for_status(run, "failed")

        assert row["payload"]["code"] == "authentication"
        assert "OPENAI_API_KEY" in row["payload"]["details"]["cure"]
        assert row["attempt"] == 1
        written = await harness.db.fetch("select to_jsonb(e) as event from run_events e")
        assert wrong not in json.dumps([event["event"] for event in written]) + "\n".join(harness.daemon.raw)
    assert len(api.requests) == 1


async def test_refused_connection_costs_no_attempt(database: str, api: OpenAIAPI) -> None:
    async with openai_harness(database, api, OPENAI_BASE_URL=f"http://127.0.0.1:{free_port()}/v1") as harness:
        run = await harness.insert_run()
        row = await harness.wait_for_retry(run)

        assert row["attempt"] == 0
        (retry,) = await harness.events(run, "retry")
        assert retry["data"]["code"] == "unreachable"
        assert "OPENAI_BASE_URL" in retry["data"]["hint"]
        assert await harness.event_names(run) == ["created", "claimed", "retry"]
    assert api.requests == []


async def test_call_timeout_is_an_unknown_outcome(database: str, api: OpenAIAPI) -> None:
    api.next(hang())
    async with openai_harness(database, api, IMAGE_JOBS_RUN_TIMEOUT="2") as harness:
        run = await harness.insert_run()
        await harness.wait_for_retry(run)
        (retry,) = await harness.events(run, "retry")
        assert retry["data"]["code"] == "timeout"
        (unknown,) = await harness.events(run, "unknown_outcome")
        assert unknown["data"]["possibleCost"] == pytest.approx(POSSIBLE_COST)

        await harness.make_due(run)
        row = await harness.wait_for_status(run, "completed")
        assert row["attempt"] == 2
        assert (await harness.event_names(run)).count("unknown_outcome") == 1
    assert len(api.requests) == 2


async def test_kill_during_the_call_is_taken_over_and_retried(database: str, api: OpenAIAPI) -> None:
    api.next(hang())
    async with openai_harness(database, api, IMAGE_JOBS_LEASE="2") as harness:
        run = await harness.insert_run(prompt={"size": "1536x1024", "quality": "hd"})
        await harness.wait_for_event(run, "submitted")
        await wait_until(lambda: len(api.requests) == 1)
        async with harness.run_daemon() as other:
            await other.started()
            harness.daemon.signal(signal.SIGKILL)
            await harness.wait_for_event(run, "taken_over")
            await harness.make_due(run)
            row = await harness.wait_for_status(run, "completed")

        assert row["attempt"] == 2
        (taken,) = await harness.events(run, "taken_over")
        assert taken["data"]["possibleCost"] == pytest.approx(estimate(FLARE, (1536, 1024), "high", previews=2))
        assert await harness.event_names(run) == [
            *("created", "claimed", "submitted", "taken_over"),
            *("claimed", "submitted", "generated", "stored", "completed"),
        ]
        assert len({event["data"]["daemon"] for event in await harness.events(run, "claimed")}) == 2
        assert await harness.stored_images(run) == 1
    assert len(api.requests) == 2
