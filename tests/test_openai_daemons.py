"""OpenAI through daemons that are set up in other ways, or killed."""

import json
import signal
from collections.abc import AsyncIterator

import pytest

from daemon.providers.openai_models import estimate
from tests.daemons import daemon
from tests.fakes.openai_api import KEY, OpenAIAPI, hang
from tests.openai_studio import FLARE, open_studio
from tests.postgres import free_port, wait_until


@pytest.fixture
async def api() -> AsyncIterator[OpenAIAPI]:
    async with OpenAIAPI() as api:
        yield api


async def test_a_retired_model_fails_where_models_are_strict(database: str, api: OpenAIAPI) -> None:
    async with open_studio(database, api, IMAGE_JOBS_STRICT_MODELS="1") as studio:
        run = await studio.order("dall-e-3")
        row = await studio.until(run, "failed")

        assert row["payload"]["code"] == "model_retired"
        assert row["payload"]["hint"] == f"Use openai:{FLARE}."
        assert await studio.story(run) == ["created", "claimed", "failed"]
    assert api.requests == []


async def test_another_server_has_models_and_prices_of_its_own(database: str, api: OpenAIAPI) -> None:
    api.compatible = True
    elsewhere = api.url.replace("127.0.0.1", "0.0.0.0")  # reaches the fake, and is not known to be this machine
    async with open_studio(database, api, OPENAI_BASE_URL=elsewhere, IMAGE_JOBS_STRICT_MODELS="1") as studio:
        run = await studio.order("dall-e-3")
        row = await studio.until(run, "completed")

        assert (row["payload"]["requestedModel"], row["payload"]["model"]) == ("dall-e-3", "dall-e-3")
        assert row["payload"]["cost"] is None
        assert await studio.events(run, "warning") == []
        offered = await studio.db.fetch("select distinct provider from image_models")
        assert [model["provider"] for model in offered] == ["demo"]
    assert [request.fields["model"] for request in api.requests] == ["dall-e-3"]


async def test_a_wrong_key_is_final_and_the_key_is_nowhere(database: str, api: OpenAIAPI) -> None:
    wrong = "a wrong key that nobody may see"
    async with open_studio(database, api, OPENAI_API_KEY=wrong) as studio:
        run = await studio.order()
        row = await studio.until(run, "failed")

        assert row["payload"]["code"] == "authentication"
        assert "OPENAI_API_KEY" in row["payload"]["hint"]
        assert row["attempt"] == 1
        written = await studio.db.fetch("select to_jsonb(e) as event from run_events e")
        assert wrong not in json.dumps([event["event"] for event in written]) + "\n".join(studio.daemon.raw)
    assert len(api.requests) == 1


async def test_where_nothing_listens_nothing_can_have_been_paid(database: str, api: OpenAIAPI) -> None:
    async with open_studio(database, api, OPENAI_BASE_URL=f"http://127.0.0.1:{free_port()}/v1") as studio:
        run = await studio.order()
        row = await studio.put_off(run)

        assert row["attempt"] == 0
        (retry,) = await studio.events(run, "retry")
        assert retry["data"]["code"] == "unreachable"
        assert "OPENAI_BASE_URL" in retry["data"]["hint"]
        assert await studio.story(run) == ["created", "claimed", "submitted", "retry"]
    assert api.requests == []


async def test_no_answer_in_time_is_an_unknown_outcome(database: str, api: OpenAIAPI) -> None:
    api.next(hang())
    async with open_studio(database, api, IMAGE_JOBS_RUN_TIMEOUT="2") as studio:
        run = await studio.order()
        await studio.put_off(run)
        (retry,) = await studio.events(run, "retry")
        assert retry["data"]["code"] == "timeout"
        (unknown,) = await studio.events(run, "unknown_outcome")
        assert unknown["data"]["possibleCost"] == pytest.approx(estimate(FLARE, (1024, 1024), "medium", previews=2))

        await studio.hurry(run)
        row = await studio.until(run, "completed")
        assert row["attempt"] == 2
        assert (await studio.story(run)).count("unknown_outcome") == 1
    assert len(api.requests) == 2


async def test_a_daemon_killed_in_mid_call_is_taken_over_and_the_next_attempt_succeeds(
    database: str, api: OpenAIAPI
) -> None:
    api.next(hang())
    environment = {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": api.url, "IMAGE_JOBS_LEASE": "2"}
    async with open_studio(database, api, IMAGE_JOBS_LEASE="2") as studio:
        run = await studio.order(size="1536x1024", quality="hd")
        await wait_until(lambda: studio.events(run, "submitted"))
        await wait_until(lambda: len(api.requests) == 1)
        async with daemon(studio.project, **environment) as other:
            await other.started()
            studio.daemon.signal(signal.SIGKILL)
            await wait_until(lambda: studio.events(run, "taken_over"), timeout=20)
            await studio.hurry(run)
            row = await studio.until(run, "completed")

        assert row["attempt"] == 2
        (taken,) = await studio.events(run, "taken_over")
        assert taken["data"]["possibleCost"] == pytest.approx(estimate(FLARE, (1536, 1024), "high", previews=2))
        assert await studio.story(run) == [
            *("created", "claimed", "submitted", "taken_over"),
            *("claimed", "submitted", "generated", "stored", "completed"),
        ]
        assert len({event["data"]["daemon"] for event in await studio.events(run, "claimed")}) == 2
        assert await studio.pictures(run) == 1
    assert len(api.requests) == 2
