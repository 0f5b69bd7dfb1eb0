"""The books of whole daemons that die, are cancelled, and draw with another model than was asked for."""

import asyncio
import signal
from typing import Any

import asyncpg
import pytest

from tests.fakes.openai_api import OpenAIAPI, hang
from tests.fakes.openai_responses import COST as BACKGROUND_COST
from tests.fakes.openai_responses import ResponsesAPI
from tests.support.daemon_harness import DaemonHarness
from tests.support.openai_harness import COST, FLARE, POSSIBLE_COST, OpenAIHarness, background_harness, openai_harness
from tests.support.postgres import wait_until
from tests.support.storage_gate import StorageGate


async def costs(harness: DaemonHarness) -> list[dict[str, Any]]:
    """The rows of `run_costs`, without the day."""
    rows = await harness.db.fetch(
        """select provider, model, calls, images, cost::float8, possible_cost::float8, unpriced
        from image_jobs.run_costs"""
    )
    return [dict(row) for row in rows]


async def calls(harness: DaemonHarness, run: str) -> list[asyncpg.Record]:
    """The calls of a run, in sequence."""
    return await harness.db.fetch(
        "select state, model, requested_model, cost::float8, image from image_jobs.calls where run_id = $1 order by id",
        run,
    )


def booked(**fields: Any) -> dict[str, Any]:
    """The row of `run_costs` for one call of Flare."""
    row = {"provider": "openai", "model": FLARE, "calls": 1, "images": 1, "possible_cost": None, "unpriced": 0}
    return row | {name: value if value is None else pytest.approx(value) for name, value in fields.items()}


async def test_job_fetched_by_a_second_daemon_is_charged_once(database: str, responses_api: ResponsesAPI) -> None:
    gate = StorageGate()
    async with background_harness(database, responses_api, gate=gate) as harness:
        await wait_until(lambda: gate.looked_at)
        gate.held["POST"] = asyncio.Event()  # the picture has come, and is not stored
        run = await harness.insert_run()
        await harness.wait_for_event(run, "generated")
        harness.daemon.signal(signal.SIGKILL)
        await harness.daemon.ended()
        gate.held.pop("POST").set()
        async with harness.run_daemon():
            row = await harness.wait_for_status(run, "completed")

        assert len(responses_api.jobs) == 1
        assert len(await harness.events(run, "generated")) == 2
        assert [(call["state"], call["image"]) for call in await calls(harness, run)] == [("charged", True)]
        assert await costs(harness) == [booked(cost=BACKGROUND_COST)]
        assert row["payload"]["cost"] == pytest.approx(BACKGROUND_COST)


async def test_cancel_after_its_holder_died_keeps_the_possible_cost(database: str) -> None:
    async with OpenAIAPI() as api, openai_harness(database, api, IMAGE_JOBS_LEASE="30") as harness:
        api.next(hang())
        run = await harness.insert_run()
        await harness.wait_for_event(run, "submitted")
        await wait_until(lambda: api.requests)
        harness.daemon.signal(signal.SIGKILL)
        await harness.daemon.ended()
        await harness.cancel(run)

        assert [call["state"] for call in await calls(harness, run)] == ["unknown"]
        assert await costs(harness) == [booked(images=0, cost=None, possible_cost=POSSIBLE_COST)]
        assert not await harness.events(run, "taken_over")


async def test_costs_of_a_retired_model_stand_under_its_successor(openai: OpenAIHarness) -> None:
    run = await openai.insert_run("openai:dall-e-3")
    await openai.wait_for_status(run, "completed")

    (call,) = await calls(openai, run)
    assert (call["state"], call["model"], call["requested_model"]) == ("charged", FLARE, "dall-e-3")
    assert await costs(openai) == [booked(cost=COST)]
