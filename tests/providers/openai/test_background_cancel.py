"""Jobs of the Responses API are cancelled, and what counts of them then."""

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pytest import approx

from daemon.errors import Retryable
from daemon.providers import Charge
from daemon.providers.openai.models import MAINLINE
from tests.fakes.openai_responses import COST, IMAGE_USAGE, USAGE, ResponsesAPI, drawn
from tests.fakes.server import Response
from tests.support.openai_background_harness import FLARE, JOB, Harness


@pytest.fixture(scope="module")
async def api() -> AsyncIterator[ResponsesAPI]:
    async with ResponsesAPI() as api:
        yield api


@pytest.fixture
async def harness(api: ResponsesAPI, tmp_path: Path) -> AsyncIterator[Harness]:
    api.reset()
    harness = Harness(api, tmp_path)
    yield harness
    await harness.provider.aclose()


async def test_a_job_is_cancelled(harness: Harness) -> None:
    job = (await harness.submit()).job_id

    await harness.provider.cancel(job)

    assert harness.api.responses[job]["status"] == "cancelled"


@pytest.mark.parametrize("status", ["completed", "failed", "incomplete", "cancelled"])
async def test_cancelling_what_has_ended_changes_nothing(status: str, harness: Harness) -> None:
    harness.api.known(JOB, status=status)

    await harness.provider.cancel(JOB)

    assert harness.api.responses[JOB]["status"] == status
    assert harness.api.cancelled == [JOB]


async def test_cancelling_what_is_not_there_changes_nothing(harness: Harness) -> None:
    await harness.provider.cancel("resp_deleted")

    harness.api.known(JOB)
    harness.api.next(Response(409))
    await harness.provider.cancel(JOB)
    assert harness.api.cancelled == ["resp_deleted", JOB]


NOTHING = {"input_tokens": 0, "input_tokens_details": {"cached_tokens": 0}, "output_tokens": 0, "total_tokens": 0}
DRAWN = {"usage": USAGE, "tool_usage": {"image_gen": IMAGE_USAGE}}
PICTURE = {"output": [drawn()]}


@pytest.mark.parametrize(
    ("response", "charge"),
    [
        ({"status": "queued"}, Charge(charged=False)),
        ({"status": "in_progress", "usage": NOTHING}, Charge(charged=False)),
        ({"status": "in_progress", **DRAWN}, Charge(charged=True, cost=COST)),
        ({"status": "in_progress", "usage": USAGE}, Charge(charged=True)),
        ({"status": "in_progress", "tool_usage": {"image_gen": IMAGE_USAGE}}, Charge(charged=True)),
        ({"status": "completed", **DRAWN}, Charge(charged=True, cost=COST)),
        ({"status": "completed", **PICTURE}, Charge(charged=True)),
        ({"status": "completed"}, None),
        ({"status": "failed"}, Charge(charged=False)),
        ({"status": "failed", **DRAWN}, Charge(charged=True, cost=COST)),
        ({"status": "incomplete"}, Charge(charged=False)),
    ],
    ids=[
        "queued",
        "nothing counted",
        "all counted",
        "text counted",
        "image counted",
        "done",
        "done, uncounted",
        "done, empty",
        "failed",
        "failed, counted",
        "incomplete",
    ],
)
async def test_usage_of_a_cancelled_response_is_its_charge(
    response: dict[str, Any], charge: Charge | None, harness: Harness
) -> None:
    harness.api.known(JOB, model=MAINLINE, tools=[{"type": "image_generation", "model": FLARE}], **response)
    harness.api.stages = [{}]

    assert await harness.provider.cancel(JOB) == (charge and replace(charge, cost=charge.cost and approx(charge.cost)))


@pytest.mark.parametrize("lost", [Response(200, b"<html>"), Response(409), Response(404)])
async def test_cancelling_that_says_nothing_has_no_charge(lost: Response, harness: Harness) -> None:
    harness.api.known(JOB, status="in_progress", model=MAINLINE)
    harness.api.stages = [{}]
    harness.api.next(lost)

    assert await harness.provider.cancel(JOB) is None


@pytest.mark.parametrize("response", [Response(503), Response(429)])
async def test_cancelling_that_did_not_work_can_be_tried_again(response: Response, harness: Harness) -> None:
    harness.api.known(JOB)
    harness.api.next(response)

    with pytest.raises(Retryable):
        await harness.provider.cancel(JOB)

    await harness.provider.cancel(JOB)
    assert harness.api.responses[JOB]["status"] == "cancelled"
