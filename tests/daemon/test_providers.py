"""Google and Stability AI from the row to the picture: a real daemon, database and storage, and fakes of their APIs."""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.fakes import google_api, stability_api
from tests.fakes.google_api import GoogleAPI, answered, blocked, quota
from tests.fakes.openai_api import OpenAIAPI
from tests.fakes.server import Answer, picture, size_of
from tests.fakes.stability_api import StabilityAPI, drawn
from tests.openai_studio import Studio, open_studio
from tests.postgres import Cluster, wait_until
from tests.runs import insert_run

NEWEST = "gemini-nano-banana-2.1"
STORY = ["created", "claimed", "submitted", "generated", "stored", "completed"]


@dataclass
class Town:
    """One daemon that works for both."""

    studio: Studio
    google: GoogleAPI
    stability: StabilityAPI

    async def order(self, processor: str, **prompt: Any) -> str:
        """Inserts a run; answers its id."""
        return await insert_run(self.studio.db, processor=processor, workflow=uuid4(), prompt=prompt)


@pytest.fixture(scope="module")
async def shared(postgres: Cluster) -> AsyncIterator[Town]:
    async with AsyncExitStack() as opened:
        google, stability = GoogleAPI(), StabilityAPI()
        for api in (google, stability, other := OpenAIAPI()):
            await opened.enter_async_context(api)
        environment = {
            "GOOGLE_API_KEY": google_api.KEY,
            "GOOGLE_BASE_URL": google.url,
            "STABILITY_API_KEY": stability_api.KEY,
            "STABILITY_BASE_URL": stability.url,
        }
        dsn = await opened.enter_async_context(postgres.database())
        studio = await opened.enter_async_context(open_studio(dsn, other, **environment))
        yield Town(studio, google, stability)


@pytest.fixture
async def town(shared: Town) -> AsyncIterator[Town]:
    """The APIs are as new, and nothing is blocked; in the end no key is anywhere."""
    shared.google.reset()
    shared.stability.reset()
    await shared.studio.db.execute("delete from provider_limits where model is not null")
    await shared.studio.db.execute("update provider_limits set blocked_until = null, per_minute = null")
    yield shared
    rows = await shared.studio.db.fetch(
        "select to_jsonb(r) as row from runs r union all select to_jsonb(e) from run_events e"
    )
    written = json.dumps([row["row"] for row in rows]) + "\n".join(shared.studio.daemon.raw)
    assert google_api.KEY not in written
    assert stability_api.KEY not in written
    assert google_api.SIGNATURE[:40] not in written


async def fetched(url: str) -> bytes:
    async with httpx.AsyncClient() as client:
        return (await client.get(url)).content


@pytest.mark.parametrize(
    ("processor", "model", "cost", "request_of"),
    [
        (f"google:{NEWEST}", NEWEST, 0.0336, lambda town: {"model": NEWEST, **town.google.requests[0].fields}),
        (
            "stability:ultra",
            "ultra",
            0.08,
            lambda town: {"endpoint": "v2beta/stable-image/generate/ultra", **town.stability.requests[0].fields},
        ),
    ],
)
async def test_a_run_becomes_a_picture_with_its_cost_and_the_exact_request(
    processor: str, model: str, cost: float, request_of: Any, town: Town
) -> None:
    run = await town.order(processor, styleModifiers=["watercolour"])
    payload = (await town.studio.until(run, "completed"))["payload"]

    assert (payload["cost"], payload["model"]) == (pytest.approx(cost), model)
    assert (payload["width"], payload["height"], payload["contentType"]) == (1024, 1024, "image/png")
    assert size_of(await fetched(payload["imageUrl"])) == (1024, 1024)
    assert await town.studio.story(run) == STORY
    (submitted,) = await town.studio.events(run, "submitted")
    assert submitted["data"]["request"] == request_of(town)
    assert submitted["data"]["estimate"] == pytest.approx(cost)


@pytest.mark.parametrize("processor", [f"google:{NEWEST}", "stability:sd3.5-large"])
async def test_a_picture_of_our_own_is_refined(processor: str, town: Town) -> None:
    first = await town.studio.until(await town.order(processor), "completed")
    url = first["payload"]["imageUrl"]
    run = await town.order(processor, previousImage=url)
    row = await town.studio.until(run, "completed")

    assert row["payload"]["imageUrl"] != url
    (submitted,) = await town.studio.events(run, "submitted")
    assert f"image/png, {len(await fetched(url))} bytes" in json.dumps(submitted["data"]["request"])
    assert len(town.google.requests + town.stability.requests) == 2


async def test_what_a_model_cannot_do_is_a_warning_that_names_the_field(town: Town) -> None:
    run = await town.order(f"google:{NEWEST}", size="1792x1024", seed=7, negativePrompt="text")
    await town.studio.until(run, "completed")

    warnings = await town.studio.events(run, "warning")
    assert [warning["data"]["field"] for warning in warnings] == ["negativePrompt", "size", "seed"]


async def test_where_the_image_comes_with_the_answer_a_webhook_has_no_use_and_that_is_said_once(town: Town) -> None:
    town.stability.next(stability_api.error(500, "internal_error", "Once more."))
    run = await insert_run(
        town.studio.db, processor="stability:core", workflow=uuid4(), webhookUrl="https://example.com/hook"
    )
    await town.studio.put_off(run)
    await town.studio.hurry(run)
    await town.studio.until(run, "completed")

    (warning,) = await town.studio.events(run, "warning")
    assert warning["data"]["field"] == "webhookUrl"


@pytest.mark.parametrize(
    ("answer", "stage"), [(blocked("PROHIBITED_CONTENT"), "input"), (answered(finish="IMAGE_SAFETY"), "output")]
)
async def test_googles_refusal_is_final_although_its_status_is_200(answer: Answer, stage: str, town: Town) -> None:
    town.google.next(answer)
    run = await town.order(f"google:{NEWEST}")
    row = await town.studio.until(run, "failed")

    assert (row["payload"]["code"], row["payload"]["details"]["stage"]) == ("content_policy", stage)
    assert row["attempt"] == 1
    assert await town.studio.story(run) == ["created", "claimed", "submitted", "failed"]
    assert len(town.google.requests) == 1


async def test_a_filtered_picture_of_stability_is_a_refusal_that_was_charged(town: Town) -> None:
    town.stability.next(drawn(picture(), finish_reason="CONTENT_FILTERED"))
    run = await town.order("stability:ultra")
    row = await town.studio.until(run, "failed")

    assert row["payload"]["code"] == "content_policy"
    (charged,) = await town.studio.events(run, "charged")
    assert charged["data"]["cost"] == pytest.approx(0.08)
    assert len(town.stability.requests) == 1


async def test_a_used_up_quota_of_the_day_closes_that_model_and_no_other(town: Town) -> None:
    town.google.next(google_api.error(429, "RESOURCE_EXHAUSTED", "Enough.", quota("RequestsPerDayPerModel")))
    run = await town.order(f"google:{NEWEST}")
    row = await town.studio.put_off(run)

    assert row["attempt"] == 0
    (retry,) = await town.studio.events(run, "retry")
    assert retry["data"]["code"] == "quota_daily"
    assert list(await town.studio.blocked()) == [("google", NEWEST)]
    await town.studio.until(await town.order("google:gemini-3-pro-image"), "completed")

    await town.studio.hurry(run)
    assert (await town.studio.until(run, "completed"))["attempt"] == 1
    assert len(town.google.requests) == 3


async def test_stabilitys_rate_limit_closes_it_for_a_minute_and_nobody_else(town: Town) -> None:
    town.stability.next(stability_api.error(429, "rate_limit_exceeded", "Too many."))
    run = await town.order("stability:core")
    row = await town.studio.put_off(run)

    assert row["attempt"] == 0
    assert await town.studio.blocked() == {("stability", None): pytest.approx(60, abs=5)}
    await town.studio.until(await town.order(f"google:{NEWEST}"), "completed")

    await town.studio.hurry(run)
    assert (await town.studio.until(run, "completed"))["attempt"] == 1
    assert len(town.stability.requests) == 2


@pytest.mark.parametrize(("processor", "cost"), [(f"google:{NEWEST}", 0.0336), ("stability:core", 0.03)])
async def test_an_answer_that_breaks_off_has_a_possible_cost_and_is_tried_again_as_the_next_attempt(
    processor: str, cost: float, town: Town
) -> None:
    api = town.google if processor.startswith("google") else town.stability
    api.next(Answer(headers={"content-type": "image/png"}, cut=100))
    run = await town.order(processor)
    await town.studio.put_off(run)
    await town.studio.hurry(run)
    row = await town.studio.until(run, "completed")

    assert row["attempt"] == 2
    (unknown,) = await town.studio.events(run, "unknown_outcome")
    assert unknown["data"]["possibleCost"] == pytest.approx(cost)
    assert len(api.requests) == 2


@pytest.mark.parametrize(("processor", "cost"), [(f"google:{NEWEST}", 0.0336), ("stability:core", 0.03)])
async def test_a_run_that_is_cancelled_in_mid_call_stays_cancelled_and_its_possible_cost_is_kept(
    processor: str, cost: float, town: Town
) -> None:
    api = town.google if processor.startswith("google") else town.stability
    api.hold()
    run = await town.order(processor)
    await wait_until(lambda: api.requests)
    await town.studio.db.execute("update runs set status = 'cancelled' where id = $1", run)
    await wait_until(lambda: town.studio.events(run, "unknown_outcome"))

    assert (await town.studio.until(run, "cancelled"))["payload"] is None
    (unknown,) = await town.studio.events(run, "unknown_outcome")
    assert unknown["data"]["possibleCost"] == pytest.approx(cost)
    assert len(api.requests) == 1


@pytest.mark.parametrize(
    ("processor", "effective"),
    [
        ("google:imagen-3.0", NEWEST),
        ("google:imagen-4.0-generate-001", NEWEST),
        ("google:gemini-2.5-flash-image-preview", "gemini-2.5-flash-image"),
        ("google:gemini-3-pro-image-preview", "gemini-3-pro-image"),
        ("stability:stable-diffusion-3", "sd3.5-large"),
        ("stability:stable-diffusion-xl", "core"),
    ],
)
async def test_a_retired_model_is_replaced_by_its_successor_and_both_are_named(
    processor: str, effective: str, town: Town
) -> None:
    run = await town.order(processor)
    payload = (await town.studio.until(run, "completed"))["payload"]

    assert (payload["requestedModel"], payload["model"]) == (processor.partition(":")[2], effective)
    (warning,) = await town.studio.events(run, "warning")
    assert warning["data"]["effective"] == effective


async def test_the_models_are_on_offer_with_their_prices_and_where_these_are_from(town: Town) -> None:
    rows = await town.studio.db.fetch("select provider, model, price, as_of, source from image_models")
    assert all(row["source"] and row["as_of"] for row in rows)
    prices = {(row["provider"], row["model"]): row["price"] for row in rows}

    assert float(prices["google", NEWEST]) == pytest.approx(0.0336)
    assert float(prices["stability", "ultra"]) == pytest.approx(0.08)
    assert prices["google", "imagen-4.0-generate-001"] is None
