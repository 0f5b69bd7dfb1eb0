"""Failures of the Images API with a whole daemon: refusals, limits, server errors, streams that break.

Each test checks how the run ends, its events and its node, its cost, and the number of requests.
"""

import pytest

from tests.fakes.openai_api import KEY, cut, error_event, moderation, status
from tests.support.openai_harness import COST, FLARE, POSSIBLE_COST, OpenAIHarness


async def test_refused_prompt_is_final_with_its_reason(openai: OpenAIHarness) -> None:
    openai.api.next(status(400, **moderation("input", "violence", "self-harm")))
    run = await openai.insert_run()
    row = await openai.wait_for_status(run, "failed")

    payload = row["payload"]
    assert payload["code"] == "content_policy"
    assert payload["error"] == "OpenAI refused the prompt (violence, self-harm)."
    assert payload["hint"] == "Rephrase the prompt."
    assert payload["details"]["categories"] == ["violence", "self-harm"]
    assert row["attempt"] == 1
    assert await openai.event_names(run) == ["created", "claimed", "submitted", "failed"]
    node = await openai.node_data(run)
    assert (node["status"], node["error"]) == ("error", payload["error"])
    assert len(openai.api.requests) == 1


async def test_refused_image_is_final_despite_previews(openai: OpenAIHarness) -> None:
    openai.api.next(error_event(moderation("output", "sexual"), after=2))
    run = await openai.insert_run()
    row = await openai.wait_for_status(run, "failed")

    assert row["payload"]["code"] == "content_policy"
    assert row["payload"]["details"]["stage"] == "output"
    node = await openai.node_data(run)
    assert node["status"] == "error"
    assert "previewUrl" not in node
    assert len(openai.api.requests) == 1


async def test_missing_credit_blocks_the_provider_without_attempts(openai: OpenAIHarness) -> None:
    openai.api.next(status(429, "insufficient_quota", type="insufficient_quota"))
    run = await openai.insert_run()
    row = await openai.wait_for_retry(run)

    assert row["attempt"] == 0
    (retry,) = await openai.events(run, "retry")
    assert retry["data"]["code"] == "billing"
    assert "Add credit" in retry["data"]["hint"]
    assert await openai.blocked() == {("openai", None): pytest.approx(600, abs=30)}
    node = await openai.node_data(run)
    assert node["status"] == "pending"
    assert "out of credit" in node["message"]

    waiting = await openai.insert_run("openai:gpt-image-2")
    demo = await openai.insert_run("demo:painter", demo={"noop": True})
    await openai.wait_for_status(demo, "completed")
    assert await openai.event_names(waiting) == ["created"]
    assert len(openai.api.requests) == 1

    await openai.make_due(run)
    assert (await openai.wait_for_status(run, "completed"))["attempt"] == 1
    await openai.wait_for_status(waiting, "completed")
    assert len(openai.api.requests) == 3


async def test_retry_after_blocks_the_model_for_all_runs(openai: OpenAIHarness) -> None:
    openai.api.next(status(429, "rate_limit_exceeded", headers={"retry-after": "90"}))
    run = await openai.insert_run()
    row = await openai.wait_for_retry(run)

    assert row["attempt"] == 0
    assert (row["due_at"] - row["updated_at"]).total_seconds() == pytest.approx(90, abs=5)
    assert await openai.blocked() == {("openai", FLARE): pytest.approx(90, abs=5)}
    (retry,) = await openai.events(run, "retry")
    assert retry["data"]["code"] == "rate_limited"

    same = await openai.insert_run()
    other = await openai.insert_run("openai:gpt-image-2")
    await openai.wait_for_status(other, "completed")
    assert await openai.event_names(same) == ["created"]
    assert [request.fields["model"] for request in openai.api.requests] == [FLARE, "gpt-image-2"]

    await openai.make_due(run)
    assert (await openai.wait_for_status(run, "completed"))["attempt"] == 1
    await openai.wait_for_status(same, "completed")
    assert len(openai.api.requests) == 4


async def test_rate_limit_blocks_every_name_of_the_drawing_model(openai: OpenAIHarness) -> None:
    openai.api.next(status(429, "rate_limit_exceeded", headers={"retry-after": "90"}))
    throttled = await openai.insert_run("openai:dall-e-3")
    await openai.wait_for_retry(throttled)

    assert await openai.blocked() == {("openai", FLARE): pytest.approx(90, abs=5)}
    waiting = [await openai.insert_run(f"openai:{name}") for name in ("dall-e-3", FLARE)]
    await openai.wait_for_status(await openai.insert_run("openai:gpt-image-2"), "completed")
    assert [await openai.event_names(run) for run in waiting] == [["created"]] * 2
    assert [request.fields["model"] for request in openai.api.requests] == [FLARE, "gpt-image-2"]
    for run in (throttled, *waiting):
        await openai.cancel(run)


async def test_rate_limit_without_retry_after_delays_one_run(openai: OpenAIHarness) -> None:
    openai.api.next(status(429, "rate_limit_exceeded"))
    run = await openai.insert_run()
    row = await openai.wait_for_retry(run)

    assert row["attempt"] == 0
    assert await openai.blocked() == {}
    await openai.wait_for_status(await openai.insert_run(), "completed")

    await openai.make_due(run)
    row = await openai.wait_for_status(run, "completed")
    assert row["attempt"] == 1
    assert "unknown_outcome" not in await openai.event_names(run)
    assert len(openai.api.requests) == 3


async def test_server_error_is_retried(openai: OpenAIHarness) -> None:
    openai.api.next(status(503, "server_error", message=f"Overloaded while serving {KEY}."))
    run = await openai.insert_run()
    await openai.wait_for_retry(run)
    await openai.make_due(run)
    row = await openai.wait_for_status(run, "completed")

    assert row["attempt"] == 1, "the API's own error costs none"
    assert row["payload"]["cost"] == pytest.approx(COST)
    (retry,) = await openai.events(run, "retry")
    assert retry["message"] == "OpenAI had a problem (503): Overloaded while serving ***."
    assert retry["data"]["code"] == "provider_unavailable"
    assert await openai.event_names(run) == [
        *("created", "claimed", "submitted", "retry"),
        *("claimed", "submitted", "generated", "stored", "completed"),
    ]
    assert len(openai.api.requests) == 2


async def test_broken_stream_is_an_unknown_outcome_with_possible_cost(openai: OpenAIHarness) -> None:
    openai.api.next(cut(after=1))
    run = await openai.insert_run()
    await openai.wait_for_retry(run)
    await openai.make_due(run)
    row = await openai.wait_for_status(run, "completed")

    assert row["attempt"] == 2
    (unknown,) = await openai.events(run, "unknown_outcome")
    assert unknown["kind"] == "error"
    assert unknown["data"]["possibleCost"] == pytest.approx(POSSIBLE_COST)
    story = await openai.event_names(run)
    assert story[:5] == ["created", "claimed", "submitted", "unknown_outcome", "retry"]
    assert story.count("generated") == 1
    assert "previewUrl" not in await openai.node_data(run)
    assert len(openai.api.requests) == 2


async def test_run_fails_as_unknown_after_three_broken_streams(openai: OpenAIHarness) -> None:
    openai.api.next(cut(after=0), cut(after=0), cut(after=0))
    run = await openai.insert_run()
    for times in (1, 2):
        await openai.wait_for_retry(run, times)
        await openai.make_due(run)
    row = await openai.wait_for_status(run, "failed")

    assert row["payload"]["code"] == "outcome_unknown"
    assert row["payload"]["attempts"] == 3
    assert row["payload"]["hint"]
    assert len(await openai.events(run, "unknown_outcome")) == 3
    assert await openai.stored_images(run) == 0
    assert len(openai.api.requests) == 3
