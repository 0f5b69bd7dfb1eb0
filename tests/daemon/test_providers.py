"""Google and Stability AI from the row to the image: a real daemon, database and storage, and fakes of their APIs."""

import json
from typing import Any

import pytest

from tests.fakes import google_api, stability_api
from tests.fakes.google_api import answered, blocked, quota
from tests.fakes.server import Response, picture, size_of
from tests.fakes.stability_api import drawn
from tests.support.daemon_harness import fetch
from tests.support.multi_provider_harness import GOOGLE, NANO, STABILITY, MultiProviderHarness
from tests.support.postgres import wait_until

STORY = ["created", "claimed", "submitted", "generated", "stored", "completed"]


@pytest.mark.parametrize(
    ("processor", "model", "cost", "request_of"),
    [
        (GOOGLE, NANO, 0.0336, lambda it: {"model": NANO, **it.google.requests[0].fields}),
        (
            "stability:ultra",
            "ultra",
            0.08,
            lambda it: {"endpoint": "v2beta/stable-image/generate/ultra", **it.stability.requests[0].fields},
        ),
    ],
)
async def test_run_becomes_an_image_with_cost_and_exact_request(
    processor: str, model: str, cost: float, request_of: Any, providers: MultiProviderHarness
) -> None:
    run = await providers.insert_run(processor, prompt={"styleModifiers": ["watercolour"]})
    payload = (await providers.wait_for_status(run, "completed"))["payload"]

    assert (payload["cost"], payload["model"]) == (pytest.approx(cost), model)
    assert (payload["width"], payload["height"], payload["contentType"]) == (1024, 1024, "image/png")
    assert size_of((await fetch(payload["imageUrl"])).content) == (1024, 1024)
    assert await providers.event_names(run) == STORY
    (submitted,) = await providers.events(run, "submitted")
    assert submitted["data"]["request"] == request_of(providers)
    assert submitted["data"]["estimate"] == pytest.approx(cost)


@pytest.mark.parametrize("processor", [GOOGLE, "stability:sd3.5-large"])
async def test_own_image_is_refined(processor: str, providers: MultiProviderHarness) -> None:
    first = await providers.wait_for_status(await providers.insert_run(processor), "completed")
    url = first["payload"]["imageUrl"]
    run = await providers.insert_run(processor, prompt={"previousImage": url})
    row = await providers.wait_for_status(run, "completed")

    assert row["payload"]["imageUrl"] != url
    (submitted,) = await providers.events(run, "submitted")
    assert f"image/png, {len((await fetch(url)).content)} bytes" in json.dumps(submitted["data"]["request"])
    assert len(providers.google.requests + providers.stability.requests) == 2


async def test_unsupported_fields_are_warnings(providers: MultiProviderHarness) -> None:
    run = await providers.insert_run(GOOGLE, prompt={"size": "1792x1024", "seed": 7, "negativePrompt": "text"})
    await providers.wait_for_status(run, "completed")

    warnings = await providers.events(run, "warning")
    assert [warning["data"]["field"] for warning in warnings] == ["negativePrompt", "size", "seed"]


async def test_useless_webhook_url_is_one_warning(providers: MultiProviderHarness) -> None:
    providers.stability.next(stability_api.error(500, "internal_error", "Once more."))
    run = await providers.insert_run(STABILITY, webhookUrl="https://example.com/hook")
    await providers.wait_for_retry(run)
    await providers.make_due(run)
    await providers.wait_for_status(run, "completed")

    (warning,) = await providers.events(run, "warning")
    assert warning["data"]["field"] == "webhookUrl"


@pytest.mark.parametrize(
    ("response", "stage"), [(blocked("PROHIBITED_CONTENT"), "input"), (answered(finish="IMAGE_SAFETY"), "output")]
)
async def test_google_refusal_with_status_200_is_final(
    response: Response, stage: str, providers: MultiProviderHarness
) -> None:
    providers.google.next(response)
    run = await providers.insert_run(GOOGLE)
    row = await providers.wait_for_status(run, "failed")

    assert (row["payload"]["code"], row["payload"]["details"]["stage"]) == ("content_policy", stage)
    assert row["attempt"] == 1
    assert await providers.event_names(run) == ["created", "claimed", "submitted", "failed"]
    assert len(providers.google.requests) == 1


async def test_filtered_stability_image_is_a_charged_refusal(providers: MultiProviderHarness) -> None:
    providers.stability.next(drawn(picture(), finish_reason="CONTENT_FILTERED"))
    run = await providers.insert_run("stability:ultra")
    row = await providers.wait_for_status(run, "failed")

    assert row["payload"]["code"] == "content_policy"
    (charged,) = await providers.events(run, "charged")
    assert charged["data"]["cost"] == pytest.approx(0.08)
    assert len(providers.stability.requests) == 1


async def test_daily_quota_blocks_that_model_only(providers: MultiProviderHarness) -> None:
    providers.google.next(google_api.error(429, "RESOURCE_EXHAUSTED", "Enough.", quota("RequestsPerDayPerModel")))
    run = await providers.insert_run(GOOGLE)
    row = await providers.wait_for_retry(run)

    assert row["attempt"] == 0
    (retry,) = await providers.events(run, "retry")
    assert retry["data"]["code"] == "quota_daily"
    assert list(await providers.blocked()) == [("google", NANO)]
    await providers.wait_for_status(await providers.insert_run("google:gemini-3-pro-image"), "completed")

    await providers.make_due(run)
    assert (await providers.wait_for_status(run, "completed"))["attempt"] == 1
    assert len(providers.google.requests) == 3


async def test_stability_rate_limit_blocks_it_alone_for_a_minute(providers: MultiProviderHarness) -> None:
    providers.stability.next(stability_api.error(429, "rate_limit_exceeded", "Too many."))
    run = await providers.insert_run(STABILITY)
    row = await providers.wait_for_retry(run)

    assert row["attempt"] == 0
    assert await providers.blocked() == {("stability", None): pytest.approx(60, abs=5)}
    await providers.wait_for_status(await providers.insert_run(GOOGLE), "completed")

    await providers.make_due(run)
    assert (await providers.wait_for_status(run, "completed"))["attempt"] == 1
    assert len(providers.stability.requests) == 2


@pytest.mark.parametrize(("processor", "cost"), [(GOOGLE, 0.0336), (STABILITY, 0.03)])
async def test_broken_response_is_retried_with_a_possible_cost(
    processor: str, cost: float, providers: MultiProviderHarness
) -> None:
    api = providers.api(processor)
    api.next(Response(headers={"content-type": "image/png"}, cut=100))
    run = await providers.insert_run(processor)
    await providers.wait_for_retry(run)
    await providers.make_due(run)
    row = await providers.wait_for_status(run, "completed")

    assert row["attempt"] == 2
    (unknown,) = await providers.events(run, "unknown_outcome")
    assert unknown["data"]["possibleCost"] == pytest.approx(cost)
    assert len(api.requests) == 2


@pytest.mark.parametrize(("processor", "cost"), [(GOOGLE, 0.0336), (STABILITY, 0.03)])
async def test_cancelling_during_the_call_keeps_the_possible_cost(
    processor: str, cost: float, providers: MultiProviderHarness
) -> None:
    api = providers.api(processor)
    api.hold()
    run = await providers.insert_run(processor)
    await wait_until(lambda: api.requests)
    await providers.cancel(run)
    await providers.wait_for_event(run, "unknown_outcome")

    assert (await providers.wait_for_status(run, "cancelled"))["payload"] is None
    (unknown,) = await providers.events(run, "unknown_outcome")
    assert unknown["data"]["possibleCost"] == pytest.approx(cost)
    assert len(api.requests) == 1


@pytest.mark.parametrize(
    ("processor", "effective"),
    [
        ("google:imagen-3.0", NANO),
        ("google:imagen-4.0-generate-001", NANO),
        ("google:gemini-2.5-flash-image-preview", "gemini-2.5-flash-image"),
        ("google:gemini-3-pro-image-preview", "gemini-3-pro-image"),
        ("stability:stable-diffusion-3", "sd3.5-large"),
        ("stability:stable-diffusion-xl", "core"),
    ],
)
async def test_retired_model_is_replaced_and_both_are_named(
    processor: str, effective: str, providers: MultiProviderHarness
) -> None:
    run = await providers.insert_run(processor)
    payload = (await providers.wait_for_status(run, "completed"))["payload"]

    assert (payload["requestedModel"], payload["model"]) == (processor.partition(":")[2], effective)
    (warning,) = await providers.events(run, "warning")
    assert warning["data"]["effective"] == effective


async def test_models_are_offered_with_prices_and_sources(providers: MultiProviderHarness) -> None:
    rows = await providers.db.fetch("select provider, model, price, as_of, source from image_models")
    assert all(row["source"] and row["as_of"] for row in rows)
    prices = {(row["provider"], row["model"]): row["price"] for row in rows}

    assert float(prices["google", NANO]) == pytest.approx(0.0336)
    assert float(prices["stability", "ultra"]) == pytest.approx(0.08)
    assert prices["google", "imagen-4.0-generate-001"] is None
