"""Errors of OpenAI's Images API are refused, retried or of unknown outcome."""

import socket
from datetime import timedelta

import pytest

from daemon.errors import OutcomeUnknown, Refused, Retryable
from tests.fakes.openai_api import (
    error_event,
    hang,
    moderation,
    redirect,
    status,
)
from tests.support.openai_images_harness import Harness


@pytest.mark.parametrize("number", [301, 302, 303, 307, 308])
async def test_redirect_is_not_followed_anywhere(number: int, harness: Harness) -> None:
    await harness.set_up(OPENAI_ORG_ID="org-1", OPENAI_PROJECT_ID="proj-1")
    to = harness.api.url.replace("127.0.0.1", "localhost")
    harness.api.next(redirect(number, f"{to}/images/generations"))

    error = await harness.fail()

    assert (type(error), error.code, error.charged, error.status) == (Refused, "not_found", False, number)
    assert "OPENAI_BASE_URL" in error.hint
    assert len(harness.api.requests) == 1


@pytest.mark.parametrize("stage", ["input", "output"])
async def test_moderation_is_final_and_names_stage_and_categories(stage: str, harness: Harness) -> None:
    harness.api.next(status(400, **moderation(stage, "sexual", "violence")))

    error = await harness.fail()

    assert isinstance(error, Refused)
    assert error.code == "content_policy"
    assert "sexual, violence" in error.message
    assert error.data["stage"] == stage
    assert error.data["categories"] == ["sexual", "violence"]
    assert error.data["request_id"] == "req_1"
    assert len(harness.api.requests) == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("content_policy_violation", "OpenAI refused the request."),
        ("invalid_prompt", "OpenAI refused the prompt."),
        ("image_content_policy_violation", "OpenAI refused the previous image."),
    ],
)
async def test_a_refusal_without_a_stage_names_what_its_code_is_about(
    code: str, message: str, harness: Harness
) -> None:
    harness.api.next(status(400, code))

    error = await harness.fail()

    assert isinstance(error, Refused)
    assert (error.code, error.message) == ("content_policy", message)


async def test_moderation_in_mid_stream_is_final_too(harness: Harness) -> None:
    harness.api.next(error_event(moderation("output", "violence")))

    error = await harness.fail()

    assert isinstance(error, Refused)
    assert (error.code, error.data["stage"]) == ("content_policy", "output")
    assert len(harness.recorder.previews) == 1


@pytest.mark.parametrize(
    ("response", "code"), [(429, "insufficient_quota"), (400, "billing_hard_limit_reached"), (402, None)]
)
async def test_missing_credit_blocks_the_provider_without_an_attempt(
    response: int, code: str | None, harness: Harness
) -> None:
    harness.api.next(status(response, code))

    error = await harness.fail()

    assert isinstance(error, Retryable)
    assert (error.code, error.accepted, error.blocks) == ("billing", False, "provider")
    assert error.retry_in == timedelta(minutes=10)
    assert len(harness.api.requests) == 1


@pytest.mark.parametrize(
    ("headers", "wait", "blocks"),
    [
        ({"retry-after": "7"}, timedelta(seconds=7), "model"),
        ({"retry-after-ms": "1500", "retry-after": "7"}, timedelta(seconds=1.5), "model"),
        ({"retry-after": "99999"}, timedelta(hours=1), "model"),
        ({"retry-after": "Fri, 01 Jan 2100 00:00:00 GMT"}, timedelta(hours=1), "model"),
        ({"retry-after": "soon"}, None, None),
        ({}, None, None),
    ],
)
async def test_rate_limit_costs_no_attempt_and_waits_as_asked(
    headers: dict[str, str], wait: timedelta | None, blocks: str | None, harness: Harness
) -> None:
    harness.api.next(status(429, "rate_limit_exceeded", headers=headers))

    error = await harness.fail()

    assert isinstance(error, Retryable)
    assert (error.code, error.accepted) == ("rate_limited", False)
    assert (error.retry_in, error.blocks) == (wait, blocks)
    assert len(harness.api.requests) == 1


@pytest.mark.parametrize(
    ("response", "reported", "code"),
    [
        (401, "invalid_api_key", "authentication"),
        (403, "unsupported_country", "permission"),
        (400, "invalid_value", "invalid_request"),
        (400, "invalid_image", "input_image_invalid"),
        (400, "unsupported_image_media_type", "input_image_invalid"),
        (403, "data_residency_mismatch", "permission"),
        (404, None, "not_found"),
        (413, None, "too_large"),
        (422, None, "invalid_request"),
    ],
)
async def test_client_errors_are_not_retried(response: int, reported: str | None, code: str, harness: Harness) -> None:
    harness.api.next(status(response, reported))

    error = await harness.fail()

    assert isinstance(error, Refused)
    assert error.code == code
    assert "OPENAI_BASE_URL" in error.hint if code == "not_found" else error.hint
    assert error.data["status"] == response
    assert len(harness.api.requests) == 1


async def test_a_wrong_key_is_refused_with_a_cure(harness: Harness) -> None:
    await harness.set_up(key="sk-other")

    error = await harness.fail()

    assert isinstance(error, Refused)

    assert error.code == "authentication"
    assert "OPENAI_API_KEY" in error.data["cure"]


@pytest.mark.parametrize("response", [500, 502, 503, 409])
async def test_outage_is_retried_as_the_next_attempt(response: int, harness: Harness) -> None:
    harness.api.next(status(response, "server_error"))

    error = await harness.fail()
    await harness.make()

    assert isinstance(error, Retryable)
    assert (error.code, error.accepted, error.blocks) == ("provider_unavailable", True, None)
    assert (error.own_error, error.charged, error.status) == (response >= 500, False, response)
    assert len(harness.api.requests) == 2


@pytest.mark.parametrize(
    ("model", "code", "hint"),
    [
        ("dall-e-3", "model_retired", "openai:gpt-image-2.5-flare"),
        ("gpt-image-2.5-flair", "unknown_model", "openai:gpt-image-2.5-flare"),
    ],
)
async def test_unknown_model_is_refused_with_a_suggestion(model: str, code: str, hint: str, harness: Harness) -> None:
    harness.api.next(status(404, "model_not_found"))

    error = await harness.fail(model=model)

    assert isinstance(error, Refused)
    assert error.code == code
    assert hint in error.hint


async def test_an_error_event_that_is_no_refusal_is_tried_again(harness: Harness) -> None:
    harness.api.next(error_event({"message": "The server had an error", "type": "server_error", "code": None}, after=0))

    error = await harness.fail()

    assert isinstance(error, Retryable)
    assert (error.code, error.accepted) == ("provider_unavailable", True)


async def test_an_error_event_about_what_was_asked_is_final(harness: Harness) -> None:
    harness.api.next(error_event({"message": "Too long.", "type": "image_generation_user_error", "code": None}))

    error = await harness.fail()

    assert isinstance(error, Refused)
    assert (error.code, error.message) == ("invalid_request", "OpenAI rejected the request: Too long.")


async def test_an_error_event_about_the_rate_has_cost_an_attempt(harness: Harness) -> None:
    harness.api.next(error_event({"message": "Slow down.", "type": "requests", "code": "rate_limit_exceeded"}))

    error = await harness.fail()

    assert isinstance(error, Retryable)
    assert (error.code, error.accepted) == ("rate_limited", True)


async def test_a_server_that_cannot_be_reached_never_got_the_request(harness: Harness) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    await harness.set_up(f"http://127.0.0.1:{port}/v1")

    error = await harness.fail()

    assert isinstance(error, Retryable)

    assert (error.code, error.accepted) == ("unreachable", False)


async def test_timeout_after_sending_is_an_unknown_outcome(harness: Harness) -> None:
    harness.api.next(hang())
    await harness.set_up(IMAGE_JOBS_RUN_TIMEOUT="0.3")

    error = await harness.fail()

    assert isinstance(error, OutcomeUnknown)
    assert "in time" in error.message

    assert len(harness.api.requests) == 1
