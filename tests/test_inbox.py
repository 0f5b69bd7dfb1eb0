"""Orders that nobody wrote down are found by their webhooks: whole daemons, and a fake of OpenAI that sends webhooks."""

import json
import signal
from collections.abc import AsyncIterator
from uuid import uuid4

import httpx
import pytest

from tests.daemons import daemon
from tests.fakes.openai_api import KEY, OpenAIAPI
from tests.fakes.openai_responses import IN_PROGRESS, ResponsesAPI
from tests.fakes.server import Answer
from tests.openai_studio import FLARE, Studio, open_studio
from tests.postgres import wait_until
from tests.runs import insert_run, run_row
from tests.webhooks import SECRET, signed


@pytest.fixture
async def api() -> AsyncIterator[ResponsesAPI]:
    async with ResponsesAPI() as api:
        yield api


@pytest.fixture
def environment(api: ResponsesAPI) -> dict[str, str]:
    return {
        "OPENAI_API_KEY": KEY,
        "OPENAI_BASE_URL": api.base_url,
        "WEBHOOK_SECRET_OPENAI": SECRET,
        "IMAGE_JOBS_LEASE": "2",
        "IMAGE_JOBS_POLL_INTERVAL": "0.2",
    }


@pytest.fixture
async def studio(database: str, environment: dict[str, str]) -> AsyncIterator[Studio]:
    async with open_studio(database, OpenAIAPI(), **environment) as studio:
        yield studio
        assert SECRET not in "\n".join(studio.daemon.raw)


async def order(studio: Studio, **metadata: object) -> str:
    """Inserts a run; answers its id."""
    return await insert_run(studio.db, processor=f"openai:{FLARE}", workflow=uuid4(), mode="background", **metadata)


async def send_webhook(studio: Studio, response: str, *, message: str = "msg_1") -> None:
    """OpenAI says that a response is complete."""
    body = json.dumps({"object": "event", "type": "response.completed", "data": {"id": response}})
    url = f"{studio.project.url}/rest/v1/rpc/webhook_openai?apikey={studio.project.keys.anon_key}"
    headers = {"content-type": "application/json", **signed(body, message=message)}
    async with httpx.AsyncClient() as client:
        answer = await client.post(url, content=body, headers=headers)
    assert answer.json() == {"received": True, "duplicate": False}


async def test_a_webhook_of_an_order_that_died_with_its_daemon_brings_it_to_its_run_without_a_second_one(
    studio: Studio, api: ResponsesAPI, environment: dict[str, str]
) -> None:
    api.mute = True
    run = await order(studio)
    await wait_until(lambda: api.orders)
    await wait_until(lambda: studio.events(run, "submitted"))
    async with daemon(studio.project, **environment) as other:
        await other.started()
        studio.daemon.signal(signal.SIGKILL)
        await wait_until(lambda: studio.events(run, "taken_over"), timeout=20)
        assert 40 < await studio.due_in(run) <= 60
        (response,) = api.responses
        await send_webhook(studio, response)
        row = await studio.until(run, "completed")

    assert (row["provider_job_id"], row["attempt"]) == (response, 1)
    assert len(api.orders) == 1
    assert len(await studio.events(run, "submitted")) == 1
    assert (await studio.events(run, "parked"))[0]["data"]["providerJobId"] == response


async def test_a_webhook_that_comes_while_its_run_is_held_by_a_dead_daemon_is_not_lost(
    studio: Studio, api: ResponsesAPI, environment: dict[str, str]
) -> None:
    api.mute = True
    run = await order(studio)
    await wait_until(lambda: api.orders)
    await wait_until(lambda: studio.events(run, "submitted"))
    (response,) = api.responses
    await studio.db.execute("update runs set max_attempts = 1")  # there will be no other
    studio.daemon.signal(signal.SIGSTOP)
    await send_webhook(studio, response)
    # Old enough to be asked about, so that this comes before the run is taken over.
    await studio.db.execute("update private.webhook_deliveries set received_at = received_at - interval '3 s'")
    async with daemon(studio.project, **environment) as other:
        await other.started()
        row = await studio.until(run, "completed")
        studio.daemon.signal(signal.SIGKILL)

    assert (row["provider_job_id"], row["attempt"]) == (response, 1)
    assert len(api.orders) == 1


async def test_an_order_whose_answer_breaks_off_is_not_made_again_before_a_webhook_could_come(
    studio: Studio, api: ResponsesAPI
) -> None:
    api.next(Answer(cut=0))
    run = await order(studio)
    await studio.put_off(run)
    assert 40 < await studio.due_in(run) <= 60
    assert len(await studio.events(run, "unknown_outcome")) == 1
    (response,) = api.responses
    await send_webhook(studio, response)
    row = await studio.until(run, "completed")

    assert row["provider_job_id"] == response
    assert len(api.orders) == 1


async def test_an_order_of_somebody_else_is_asked_about_once_and_left_alone(studio: Studio, api: ResponsesAPI) -> None:
    api.known("resp_foreign", metadata={"purpose": "homework"})
    await send_webhook(studio, "resp_foreign")
    await send_webhook(studio, "resp_nowhere", message="msg_2")
    await wait_until(lambda: len(studio.daemon.logged("order.traced")) == 2, timeout=20)
    assert [line["result"] for line in studio.daemon.logged("order.traced")] == ["unknown", "unknown"]
    assert len(api.questions) == 2
    waiting = await studio.db.fetch("select ask_at = 'infinity' as asked, closed_at from private.webhook_deliveries")
    assert [tuple(row) for row in waiting] == [(True, None), (True, None)]
    run = await order(studio)
    await send_webhook(studio, (await studio.parked(run))["provider_job_id"], message="msg_3")
    await studio.until(run, "completed")


async def test_a_provider_that_cannot_say_whose_an_order_is_is_asked_again(studio: Studio, api: ResponsesAPI) -> None:
    api.next(Answer(cut=0), Answer(503))
    run = await order(studio)
    await studio.put_off(run)
    (response,) = api.responses
    await send_webhook(studio, response)
    await wait_until(lambda: studio.daemon.logged("order.owner_unknown"), timeout=20)
    await studio.db.execute("update private.webhook_deliveries set ask_at = now()")  # the lease is over
    await studio.until(run, "completed")
    assert len(api.orders) == 1


async def test_a_run_in_the_background_that_is_cancelled_is_cancelled_at_openai(
    studio: Studio, api: ResponsesAPI
) -> None:
    api.stages = [IN_PROGRESS]
    run = await order(studio)
    response = (await studio.parked(run))["provider_job_id"]
    await studio.db.execute("update runs set status = 'cancelled' where id = $1", run)
    await wait_until(lambda: studio.events(run, "order_cancelled"))
    assert api.cancelled == [response]
    assert api.responses[response]["status"] == "cancelled"


async def test_an_order_that_comes_to_light_after_its_run_was_cancelled_is_cancelled(
    studio: Studio, api: ResponsesAPI
) -> None:
    api.stages = [IN_PROGRESS]
    api.next(Answer(cut=0))
    run = await order(studio)
    await studio.put_off(run)
    await studio.db.execute("update runs set status = 'cancelled' where id = $1", run)
    (response,) = api.responses
    await send_webhook(studio, response)
    await wait_until(lambda: studio.events(run, "order_cancelled"), timeout=20)
    assert api.cancelled == [response]
    assert (await run_row(studio.db, run))["status"] == "cancelled"
