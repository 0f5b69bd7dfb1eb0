"""OpenAI sends word of a response: to the database, signed as OpenAI signs. Whole daemons, and a fake of the Responses API."""

import json
import signal
import time
from collections.abc import AsyncIterator
from uuid import uuid4

import asyncpg
import httpx
import pytest
from openai import OpenAI

from tests.daemons import daemon
from tests.fakes.openai_api import KEY, OpenAIAPI
from tests.fakes.openai_responses import COST, IN_PROGRESS, ResponsesAPI, failed
from tests.openai_studio import FLARE, Studio, open_studio
from tests.postgres import wait_until
from tests.runs import insert_run, run_row
from tests.webhooks import SECRET, signed


@pytest.fixture
async def api() -> AsyncIterator[ResponsesAPI]:
    async with ResponsesAPI() as api:
        api.stages = [IN_PROGRESS]
        yield api


@pytest.fixture
def environment(api: ResponsesAPI, request: pytest.FixtureRequest) -> dict[str, str]:
    return {
        "OPENAI_API_KEY": KEY,
        "OPENAI_BASE_URL": api.base_url,
        "WEBHOOK_SECRET_OPENAI": SECRET,
        "IMAGE_JOBS_LEASE": "2",
        "IMAGE_JOBS_POLL_INTERVAL": "0.2",
        **getattr(request, "param", {}),
    }


@pytest.fixture
async def studio(database: str, environment: dict[str, str]) -> AsyncIterator[Studio]:
    async with open_studio(database, OpenAIAPI(), **environment) as studio:
        yield studio


async def order(studio: Studio) -> str:
    """Inserts a run; answers its id."""
    return await insert_run(studio.db, processor=f"openai:{FLARE}", workflow=uuid4(), mode="background")


async def parked(studio: Studio, run: str) -> asyncpg.Record:
    """Waits until the run's order is written down and nobody holds it; answers the row."""

    async def waits() -> asyncpg.Record | None:
        row = await run_row(studio.db, run)
        return row if row["provider_job_id"] is not None and row["claimed_by"] is None else None

    return await wait_until(waits, timeout=20)


async def send_word(studio: Studio, response: str, kind: str = "response.completed", *, secret: str = SECRET) -> int:
    """Posts what OpenAI posts; answers the status."""
    event = {"id": "evt_1", "object": "event", "type": kind, "created_at": int(time.time()), "data": {"id": response}}
    body = json.dumps(event)
    headers = signed(body, secret=secret, message=f"wh_{uuid4().hex}")
    assert OpenAI(api_key="none").webhooks.unwrap(body, headers, secret=secret).type == kind
    url = f"{studio.project.url}/rest/v1/rpc/webhook_openai?apikey={studio.project.keys.anon_key}"
    async with httpx.AsyncClient() as client:
        answer = await client.post(url, content=body, headers={"content-type": "application/json", **headers})
    return answer.status_code


async def test_word_of_a_completed_response_makes_the_check_due_at_once(studio: Studio, api: ResponsesAPI) -> None:
    run = await order(studio)
    row = await parked(studio, run)
    assert row["webhook"] == "awaited"
    assert api.questions == []
    api.stages = [api.completed()]
    assert await send_word(studio, row["provider_job_id"]) == 200
    row = await studio.until(run, "completed")

    assert row["payload"]["cost"] == pytest.approx(COST)
    assert len(api.questions) == 1
    assert len(api.orders) == 1
    assert await studio.events(run, "incident") == []
    (word,) = await studio.events(run, "webhook")
    assert (word["kind"], word["data"]["type"]) == ("webhook", "response.completed")


async def test_word_of_a_failed_response_is_believed_only_after_asking(studio: Studio, api: ResponsesAPI) -> None:
    run = await order(studio)
    row = await parked(studio, run)
    api.stages = [failed("invalid_prompt", "Flagged.")]
    assert await send_word(studio, row["provider_job_id"], "response.failed") == 200
    row = await studio.until(run, "failed")

    assert row["payload"]["code"] == "content_policy"
    assert len(api.questions) == 1


async def test_word_that_somebody_else_signed_is_refused_and_asks_nobody(studio: Studio, api: ResponsesAPI) -> None:
    run = await order(studio)
    row = await parked(studio, run)
    other = "whsec_" + "b" * 44

    assert await send_word(studio, row["provider_job_id"], secret=other) == 401
    assert api.questions == []
    assert (await run_row(studio.db, run))["due_at"] == row["due_at"]


@pytest.mark.parametrize("environment", [{"IMAGE_JOBS_WEBHOOK_WAIT": "1"}], indirect=True, ids=[""])
async def test_without_word_it_is_polled_and_an_incident_says_so(studio: Studio, api: ResponsesAPI) -> None:
    run = await order(studio)
    await wait_until(lambda: len(api.questions) >= 2, timeout=20)
    api.stages = [api.completed()]
    await studio.until(run, "completed")

    (incident,) = await studio.events(run, "incident")
    assert incident["message"] == "No webhook came within 1 s; it is polled from now on."
    assert len(api.orders) == 1


async def test_an_order_that_was_lost_with_its_daemon_is_found_by_its_word_and_not_made_again(
    studio: Studio, api: ResponsesAPI, environment: dict[str, str]
) -> None:
    api.mute = True  # it takes the order, and the daemon never hears of it
    run = await order(studio)
    await wait_until(lambda: api.responses, timeout=20)
    await wait_until(lambda: studio.events(run, "submitted"))
    studio.daemon.signal(signal.SIGKILL)
    await studio.daemon.ended()
    api.stages = [api.completed()]
    (lost,) = api.responses
    assert await send_word(studio, lost) == 200
    async with daemon(studio.project, **environment) as other:
        await other.started()
        row = await studio.until(run, "completed")

    assert row["provider_job_id"] == lost
    assert row["payload"]["revisedPrompt"]
    assert len(api.orders) == 1
    assert len(await studio.events(run, "submitted")) == 1


async def test_a_run_that_is_cancelled_has_its_response_cancelled_at_openai(studio: Studio, api: ResponsesAPI) -> None:
    run = await order(studio)
    row = await parked(studio, run)
    await studio.db.execute("update runs set status = 'cancelled' where id = $1", run)
    await wait_until(lambda: api.cancelled == [row["provider_job_id"]], timeout=20)
    await wait_until(lambda: studio.events(run, "order_cancelled"), timeout=20)

    assert api.responses[row["provider_job_id"]]["status"] == "cancelled"
    assert await studio.events(run, "unknown_outcome") == []


async def test_a_run_that_is_cancelled_while_it_is_ordered_has_its_response_cancelled_once_it_is_known(
    studio: Studio, api: ResponsesAPI
) -> None:
    go = api.hold()
    run = await order(studio)
    await wait_until(lambda: api.orders, timeout=20)
    await studio.db.execute("update runs set status = 'cancelled' where id = $1", run)
    await wait_until(lambda: studio.events(run, "cancelled"))
    go.set()
    await wait_until(lambda: api.cancelled == list(api.responses), timeout=20)
    await wait_until(lambda: studio.events(run, "order_cancelled"), timeout=20)
