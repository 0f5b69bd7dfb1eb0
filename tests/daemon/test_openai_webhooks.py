"""OpenAI sends webhooks of a response: to the database, signed as OpenAI signs. Whole daemons, and a fake of the Responses API."""

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from uuid import uuid4

import httpx
import pytest
from openai import OpenAI

from tests.fakes.openai_api import KEY, OpenAIAPI
from tests.fakes.openai_responses import COST, IN_PROGRESS, ResponsesAPI, failed
from tests.fakes.server import Answer
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


async def send_webhook(studio: Studio, response: str, kind: str = "response.completed", *, secret: str = SECRET) -> int:
    """Posts what OpenAI posts; answers the status."""
    event = {"id": "evt_1", "object": "event", "type": kind, "created_at": int(time.time()), "data": {"id": response}}
    body = json.dumps(event)
    headers = signed(body, secret=secret, message=f"wh_{uuid4().hex}")
    assert OpenAI(api_key="none").webhooks.unwrap(body, headers, secret=secret).type == kind
    url = f"{studio.project.url}/rest/v1/rpc/webhook_openai?apikey={studio.project.keys.anon_key}"
    async with httpx.AsyncClient() as client:
        answer = await client.post(url, content=body, headers={"content-type": "application/json", **headers})
    return answer.status_code


async def test_a_webhook_of_a_completed_response_makes_the_check_due_at_once(studio: Studio, api: ResponsesAPI) -> None:
    run = await order(studio)
    row = await studio.parked(run)
    assert row["webhook"] == "awaited"
    assert api.questions == []
    api.stages = [api.completed()]
    assert await send_webhook(studio, row["provider_job_id"]) == 200
    row = await studio.until(run, "completed")

    assert row["payload"]["cost"] == pytest.approx(COST)
    assert len(api.questions) == 1
    assert len(api.orders) == 1
    assert await studio.events(run, "incident") == []
    (webhook,) = await studio.events(run, "webhook")
    assert (webhook["kind"], webhook["data"]["type"]) == ("webhook", "response.completed")


async def test_a_webhook_of_a_failed_response_is_believed_only_after_asking(studio: Studio, api: ResponsesAPI) -> None:
    run = await order(studio)
    row = await studio.parked(run)
    api.stages = [failed("invalid_prompt", "Flagged.")]
    assert await send_webhook(studio, row["provider_job_id"], "response.failed") == 200
    row = await studio.until(run, "failed")

    assert row["payload"]["code"] == "content_policy"
    assert len(api.questions) == 1


async def test_a_webhook_that_somebody_else_signed_is_refused_and_asks_nobody(
    studio: Studio, api: ResponsesAPI
) -> None:
    run = await order(studio)
    row = await studio.parked(run)
    other = "whsec_" + "b" * 44

    assert await send_webhook(studio, row["provider_job_id"], secret=other) == 401
    assert api.questions == []
    assert (await run_row(studio.db, run))["due_at"] == row["due_at"]


@pytest.mark.parametrize("environment", [{"IMAGE_JOBS_WEBHOOK_WAIT": "1"}], indirect=True, ids=[""])
async def test_without_a_webhook_it_is_polled_and_an_incident_says_so(studio: Studio, api: ResponsesAPI) -> None:
    run = await order(studio)
    await wait_until(lambda: len(api.questions) >= 2, timeout=20)
    api.stages = [api.completed()]
    await studio.until(run, "completed")

    (incident,) = await studio.events(run, "incident")
    assert incident["message"] == "No webhook came within 1 s; it is polled from now on."
    assert len(api.orders) == 1


@pytest.mark.parametrize("environment", [{"IMAGE_JOBS_DRAIN_TIMEOUT": "0"}], indirect=True, ids=[""])
async def test_an_order_of_a_daemon_that_had_to_leave_is_not_made_again_before_a_webhook_could_come(
    studio: Studio, api: ResponsesAPI
) -> None:
    breaks_off = asyncio.Event()
    api.next(Answer(after=breaks_off, cut=0))
    run = await order(studio)
    await wait_until(lambda: api.orders, timeout=20)
    studio.daemon.signal(signal.SIGTERM)
    await wait_until(lambda: studio.daemon.logged("daemon.out_of_time"))
    breaks_off.set()
    await studio.daemon.ended()

    (unknown,) = await studio.events(run, "unknown_outcome")
    assert "broken off" in unknown["message"]
    assert 40 < await studio.due_in(run) <= 60


async def test_an_order_that_openai_has_forgotten_is_made_again_without_waiting_for_a_webhook(
    studio: Studio, api: ResponsesAPI
) -> None:
    run = await order(studio)
    row = await studio.parked(run)
    api.responses.clear()
    assert await send_webhook(studio, row["provider_job_id"]) == 200
    await studio.put_off(run)

    assert await studio.due_in(run) < 10


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
