"""OpenAI in the background, from the row to the picture: real daemons, database and storage, and a fake of the Responses
API with a ledger of what was ordered."""

import json
import signal
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.daemons import daemon
from tests.fakes.openai_api import KEY, OpenAIAPI, error, moderation
from tests.fakes.openai_responses import COST, IN_PROGRESS, QUEUED, ResponsesAPI, failed, not_drawn, picture_of
from tests.fakes.server import Answer, size_of
from tests.openai_studio import FLARE, Studio, open_studio
from tests.postgres import wait_until
from tests.runs import insert_run

STORY = ["created", "claimed", "warning", "submitted", "parked", "generated", "stored", "completed"]


@pytest.fixture
async def api() -> AsyncIterator[ResponsesAPI]:
    async with ResponsesAPI() as api:
        yield api


@pytest.fixture
def environment(api: ResponsesAPI) -> dict[str, str]:
    return {
        "OPENAI_API_KEY": KEY,
        "OPENAI_BASE_URL": api.base_url,
        "IMAGE_JOBS_LEASE": "2",
        "IMAGE_JOBS_POLL_INTERVAL": "0.2",
    }


@pytest.fixture
async def studio(database: str, environment: dict[str, str]) -> AsyncIterator[Studio]:
    async with open_studio(database, OpenAIAPI(), **environment) as studio:
        yield studio


async def order(studio: Studio, model: str = FLARE, *, prompt: dict[str, Any] | None = None, **metadata: Any) -> str:
    """Inserts a run with a node; answers its id."""
    node, workflow = f"node-{uuid4()}", uuid4()
    await studio.db.execute(
        "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ($1, $2, 'image_generation', '{}')",
        node,
        workflow,
    )
    metadata = {"mode": "background", "nodeId": node, **metadata}
    return await insert_run(studio.db, processor=f"openai:{model}", workflow=workflow, prompt=prompt, **metadata)


async def asked(api: ResponsesAPI, times: int = 1) -> None:
    """Waits until somebody has asked that often."""
    await wait_until(lambda: len(api.questions) >= times)


async def test_a_run_is_ordered_waited_for_and_becomes_a_picture(studio: Studio, api: ResponsesAPI) -> None:
    api.stages = [QUEUED, IN_PROGRESS, api.completed()]
    run = await order(studio, prompt={"size": "1536x1024"})
    row = await studio.until(run, "completed")

    payload = row["payload"]
    assert payload["cost"] == pytest.approx(COST)
    assert payload["revisedPrompt"] == "A red fox, as it was drawn"
    assert (payload["model"], row["attempt"]) == (FLARE, 1)
    async with httpx.AsyncClient() as client:
        assert size_of((await client.get(payload["imageUrl"])).content) == (64, 48)
    assert await studio.story(run) == STORY
    (call,) = api.orders
    assert row["provider_job_id"] in api.responses
    (ordered,) = await studio.events(run, "submitted")
    assert ordered["data"]["request"] == {"endpoint": "responses", **call.fields}
    assert call.fields["metadata"] == {"run_id": run, "ticket": str(row["ticket"])}
    (generated,) = await studio.events(run, "generated")
    assert generated["data"]["response_id"] == row["provider_job_id"]
    assert (await studio.node(run))["status"] == "completed"


async def test_a_picture_of_our_own_is_edited(studio: Studio, api: ResponsesAPI) -> None:
    first = await studio.until(await order(studio), "completed")
    url = first["payload"]["imageUrl"]
    await studio.until(await order(studio, prompt={"previousImage": url}), "completed")

    _, edit = api.orders
    assert edit.fields["tools"][0]["action"] == "edit"
    async with httpx.AsyncClient() as client:
        sent = picture_of(edit.fields["input"][0]["content"][1]["image_url"])
        assert sent == (await client.get(url)).content


async def test_a_daemon_is_killed_after_it_ordered_and_another_fetches_the_same_order(
    studio: Studio, api: ResponsesAPI, environment: dict[str, str]
) -> None:
    api.stages = [IN_PROGRESS]
    run = await order(studio)
    await asked(api)
    async with daemon(studio.project, **environment) as other:
        await other.started()
        studio.daemon.signal(signal.SIGKILL)
        await studio.daemon.ended()
        api.stages = [api.completed()]
        row = await studio.until(run, "completed")

    assert row["attempt"] == 1
    assert row["provider_job_id"] in api.responses
    assert len(api.orders) == 1
    assert len(await studio.events(run, "submitted")) == 1


async def test_an_order_that_is_lost_with_its_daemon_has_an_unknown_outcome_and_a_possible_cost(
    studio: Studio, api: ResponsesAPI, environment: dict[str, str]
) -> None:
    api.mute = True
    run = await order(studio)
    await wait_until(lambda: api.orders)
    await wait_until(lambda: studio.events(run, "submitted"))
    async with daemon(studio.project, **environment) as other:
        await other.started()
        studio.daemon.signal(signal.SIGKILL)
        (taken,) = await wait_until(lambda: studio.events(run, "taken_over"), timeout=20)
        api.mute = False
        await studio.hurry(run)
        row = await studio.until(run, "completed")

    assert taken["data"]["possibleCost"] == pytest.approx(0.0132, abs=1e-4)
    assert row["attempt"] == 2
    assert len(api.orders) == 2


async def test_a_response_that_takes_too_long_is_given_up_and_found_again_by_a_requeue(
    database: str, api: ResponsesAPI, environment: dict[str, str]
) -> None:
    api.stages = [IN_PROGRESS]
    async with open_studio(database, OpenAIAPI(), **environment, IMAGE_JOBS_POLL_TIMEOUT="1") as studio:
        run = await order(studio)
        row = await studio.until(run, "failed")

        assert (row["payload"]["error"], row["payload"]["code"]) == ("Polling timeout exceeded", "polling_timeout")
        assert await studio.events(run, "incident")
        api.stages = [api.completed()]
        await studio.db.execute("update runs set status = 'pending' where id = $1", run)
        again = await studio.until(run, "completed")

        assert again["provider_job_id"] == row["provider_job_id"]
        assert len(api.orders) == 1


async def test_a_key_that_is_wrong_for_a_while_loses_no_order(studio: Studio, api: ResponsesAPI) -> None:
    api.stages = [IN_PROGRESS]
    run = await order(studio)
    await asked(api)
    wrong = Answer.json(401, {"error": error("Incorrect API key provided.", "invalid_api_key")})
    api.next(wrong, wrong, Answer(500), Answer(cut=30))
    await asked(api, len(api.questions) + 5)
    api.stages = [api.completed()]
    row = await studio.until(run, "completed")

    assert row["attempt"] == 1
    assert len(api.orders) == 1


async def test_who_gives_up_because_nobody_could_be_asked_says_what_was_in_the_way(
    database: str, api: ResponsesAPI, environment: dict[str, str]
) -> None:
    api.stages = [IN_PROGRESS]
    async with open_studio(database, OpenAIAPI(), **environment, IMAGE_JOBS_POLL_TIMEOUT="2") as studio:
        run = await order(studio)
        await asked(api)
        api.next(*[Answer.json(401, {"error": error("Incorrect API key provided.", "invalid_api_key")})] * 50)
        row = await studio.until(run, "failed")

    assert row["payload"]["error"] == "Polling timeout exceeded"
    assert row["payload"]["hint"].startswith("OpenAI does not accept our key. Requeue the run")


async def test_a_response_that_failed_at_openai_is_ordered_anew_as_the_next_attempt(
    studio: Studio, api: ResponsesAPI
) -> None:
    api.stages = [failed("server_error", "It broke down.")]
    run = await order(studio)
    await studio.put_off(run)
    api.stages = [api.completed()]
    await studio.hurry(run)
    row = await studio.until(run, "completed")

    assert row["attempt"] == 2
    (retry,) = await studio.events(run, "retry")
    assert retry["message"] == "OpenAI had a problem: It broke down."
    assert len(api.orders) == 2


async def test_a_response_that_is_gone_is_ordered_anew_and_both_may_have_cost(
    studio: Studio, api: ResponsesAPI
) -> None:
    api.stages = [IN_PROGRESS]
    run = await order(studio)
    await asked(api)
    api.responses.clear()
    await studio.put_off(run)
    api.stages = [api.completed()]
    await studio.hurry(run)
    await studio.until(run, "completed")

    assert len(await studio.events(run, "unknown_outcome")) == 1
    assert len(api.orders) == 2


async def test_a_picture_that_was_refused_within_a_completed_response_is_final_and_its_cost_is_kept(
    studio: Studio, api: ResponsesAPI
) -> None:
    api.stages = [api.completed(not_drawn(moderation("output", "violence")))]
    run = await order(studio)
    row = await studio.until(run, "failed")

    assert row["payload"]["code"] == "content_policy"
    assert row["payload"]["error"] == "OpenAI refused the picture it had made (violence)."
    (charged,) = await studio.events(run, "charged")
    assert charged["data"]["cost"] == pytest.approx(COST)
    assert (await studio.node(run))["status"] == "error"
    assert len(api.orders) == 1


async def test_without_the_responses_api_the_run_says_so(studio: Studio, api: ResponsesAPI) -> None:
    api.compatible = True
    row = await studio.until(await order(studio), "failed")

    assert row["payload"]["error"] == "There is no Responses API at this address."
    assert "metadata.mode" in row["payload"]["hint"]
    assert len(api.orders) == 1


async def test_the_webhook_url_of_a_run_is_warned_of_and_not_sent(studio: Studio, api: ResponsesAPI) -> None:
    run = await order(studio, webhookUrl="https://example.com/hook")
    await studio.until(run, "completed")

    warnings = {event["data"]["field"]: event["message"] for event in await studio.events(run, "warning")}
    assert set(warnings) == {"mode", "webhookUrl"}
    assert "per project" in warnings["webhookUrl"]
    assert "example.com" not in json.dumps(api.orders[0].fields)
