"""The Responses API in the background: what each answer to a question means."""

import base64
import os
import tracemalloc
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from daemon.errors import OutcomeUnknown, Refused, Retryable
from daemon.providers import Generated, Waiting
from daemon.providers.openai.models import MAINLINE
from tests.fakes.openai_api import error, moderation
from tests.fakes.openai_responses import (
    CANCELLED,
    COST,
    IMAGE_USAGE,
    IN_PROGRESS,
    QUEUED,
    USAGE,
    ResponsesAPI,
    drawn,
    failed,
    incomplete,
    not_drawn,
    said,
)
from tests.fakes.server import Response, picture, size_of
from tests.support.openai_background_harness import JOB, Harness
from tests.support.postgres import free_port


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


# What has become of it.


async def test_response_becomes_a_picture_with_its_cost(harness: Harness) -> None:
    harness.api.stages = [QUEUED, IN_PROGRESS, harness.api.completed()]
    job = (await harness.submit()).job_id

    queued, drawing, made = [await harness.check(job) for _ in range(3)]

    assert queued == Waiting(message="The order waits at OpenAI")
    assert drawing == Waiting(message="OpenAI is drawing")
    assert isinstance(made, Generated)
    assert size_of(made.path.read_bytes()) == (64, 48)
    assert made.cost == pytest.approx(COST)
    assert made.revised_prompt == "A red fox, as it was drawn"
    assert made.data == {"response_id": job, "request_id": "req_1", "usage": USAGE, "image_usage": IMAGE_USAGE}
    assert len(harness.api.jobs) == 1


async def test_a_status_that_nobody_knows_yet_is_waited_for(harness: Harness) -> None:
    assert await harness.found(status="thinking") == Waiting(message="OpenAI is at work")


async def test_large_picture_arrives_without_filling_memory(harness: Harness) -> None:
    large = picture() + os.urandom(8_000_001)
    await harness.found(**harness.api.completed())  # whatever is imported late is there
    response = Response.json(200, {"id": JOB, "model": MAINLINE, **harness.api.completed(drawn(large))})
    harness.api.next(response)
    tracemalloc.start()
    made = await harness.check()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert isinstance(made, Generated)
    assert made.path.read_bytes() == large
    assert peak < len(large) + len(response.body)  # the fake sends it from this process


async def test_of_several_calls_the_last_picture_counts(harness: Harness) -> None:
    second = picture((32, 32))

    made = await harness.found(**harness.api.completed(drawn(), drawn(second), not_drawn()))

    assert isinstance(made, Generated)
    assert made.path.read_bytes() == second


@pytest.mark.parametrize("stage", [incomplete("content_filter"), failed("server_error"), CANCELLED])
async def test_picture_of_a_failed_response_is_used(stage: dict[str, Any], harness: Harness) -> None:
    assert isinstance(await harness.found(**{**harness.api.completed(), **stage}), Generated)


@pytest.mark.parametrize(
    "without",
    [
        {"tool_usage": None},
        {"usage": None},
        {"usage": {"input_tokens": 1, "input_tokens_details": [], "output_tokens": 1}},
        {"tool_usage": {"image_gen": {**IMAGE_USAGE, "output_tokens": 0}}},
        {"model": "gpt-9"},
        {"service_tier": "flex"},
    ],
)
async def test_cost_with_an_unknown_part_is_unknown(without: dict[str, Any], harness: Harness) -> None:
    made = await harness.found(**{**harness.api.completed(), **without})

    assert isinstance(made, Generated)
    assert made.cost is None


@pytest.mark.parametrize(
    ("code", "ours", "final"),
    [
        ("server_error", "provider_unavailable", False),
        ("vector_store_timeout", "provider_unavailable", False),
        ("a_code_of_tomorrow", "provider_unavailable", False),
        ("rate_limit_exceeded", "rate_limited", False),
        ("insufficient_quota", "billing", False),
        ("invalid_prompt", "content_policy", True),
        ("bio_policy", "content_policy", True),
        ("misalignment_policy_violation", "content_policy", True),
        ("image_content_policy_violation", "content_policy", True),
        ("data_residency_mismatch", "permission", True),
        ("model_not_found", "unknown_model", True),
        ("invalid_image", "input_image_invalid", True),
        ("invalid_image_format", "input_image_invalid", True),
        ("invalid_base64_image", "input_image_invalid", True),
        ("invalid_image_url", "input_image_invalid", True),
        ("image_too_large", "input_image_invalid", True),
        ("image_too_small", "input_image_invalid", True),
        ("image_parse_error", "input_image_invalid", True),
        ("invalid_image_mode", "input_image_invalid", True),
        ("image_file_too_large", "input_image_invalid", True),
        ("unsupported_image_media_type", "input_image_invalid", True),
        ("empty_image_file", "input_image_invalid", True),
        ("failed_to_download_image", "input_image_invalid", True),
        ("image_file_not_found", "input_image_invalid", True),
    ],
)
async def test_failed_response_is_retried_or_not_by_its_code(
    code: str, ours: str, final: bool, harness: Harness
) -> None:
    error = await harness.fail(**failed(code))

    assert error.code == ours
    assert isinstance(error, Refused) if final else isinstance(error, Retryable)
    if isinstance(error, Retryable):
        assert error.accepted  # asking about it again would answer the same
    assert error.data["code"] == code
    assert error.data["response_id"] == JOB


async def test_a_response_that_failed_without_a_reason_is_made_anew(harness: Harness) -> None:
    error = await harness.fail(status="failed", error=None)

    assert isinstance(error, Retryable)
    assert (error.code, error.accepted) == ("provider_unavailable", True)


@pytest.mark.parametrize(
    ("reason", "code", "final"),
    [
        ("content_filter", "content_policy", True),
        ("max_output_tokens", "provider_unavailable", False),
        (None, "provider_unavailable", False),
    ],
)
async def test_a_response_that_stopped_early_says_why(
    reason: str | None, code: str, final: bool, harness: Harness
) -> None:
    error = await harness.fail(status="incomplete", incomplete_details={"reason": reason} if reason else None)

    assert (error.code, isinstance(error, Refused)) == (code, final)
    assert isinstance(error, Refused | Retryable)


async def test_a_response_that_was_cancelled_at_openai_is_final(harness: Harness) -> None:
    error = await harness.fail(**CANCELLED)

    assert isinstance(error, Refused)
    assert error.code == "cancelled_there"
    assert "Requeue" in error.hint


@pytest.mark.parametrize("stage", ["input", "output"])
async def test_refused_call_of_a_completed_response_has_its_cost(stage: str, harness: Harness) -> None:
    error = await harness.fail(**harness.api.completed(not_drawn(moderation(stage, "violence"))))

    assert isinstance(error, Refused)
    assert (error.code, error.data["stage"], error.data["categories"]) == ("content_policy", stage, ["violence"])
    assert error.cost == pytest.approx(COST)


async def test_a_call_knows_more_than_the_failed_response_around_it(harness: Harness) -> None:
    call = not_drawn(moderation("output", "sexual"))

    error = await harness.fail(**failed("server_error", output=[call]))

    assert error.code == "content_policy"


async def test_a_call_that_failed_without_a_reason_is_made_anew(harness: Harness) -> None:
    error = await harness.fail(**harness.api.completed(not_drawn()))

    assert isinstance(error, Retryable)
    assert (error.code, error.accepted) == ("empty_result", True)


@pytest.mark.parametrize("call", [drawn(result=None), drawn(result="")])
async def test_a_call_without_a_picture_is_made_anew(call: dict[str, Any], harness: Harness) -> None:
    error = await harness.fail(**harness.api.completed(call))

    assert isinstance(error, Retryable)
    assert error.code == "empty_result"


async def test_words_instead_of_a_picture_are_shown(harness: Harness) -> None:
    error = await harness.fail(**harness.api.completed(said("I would rather not draw foxes.")))

    assert isinstance(error, Retryable)
    assert error.message == "OpenAI answered without a picture. It said: I would rather not draw foxes."


@pytest.mark.parametrize("output", [None, "x", [None, 7, {"type": "image_generation_call"}]])
async def test_an_output_of_another_shape_has_no_picture(output: object, harness: Harness) -> None:
    error = await harness.fail(status="completed", output=output)

    assert error.code == "empty_result"


async def test_base64_of_the_picture_is_nowhere_but_on_disk(harness: Harness) -> None:
    image = picture((300, 300))
    made = await harness.found(**harness.api.completed(drawn(image)))

    assert isinstance(made, Generated)
    assert base64.b64encode(image).decode()[:200] not in str(made.data)


# Trouble with asking.


async def test_missing_response_is_an_unknown_outcome(harness: Harness) -> None:
    with pytest.raises(OutcomeUnknown) as caught:
        await harness.check("resp_deleted")

    assert caught.value.data == {"response_id": "resp_deleted"}


@pytest.mark.parametrize(
    "response",
    [
        Response.json(401, {"error": error("Wrong.", "invalid_api_key")}),
        Response.json(403, {"error": error("No.", None)}),
        Response.json(429, {"error": error("Slow down.", "rate_limit_exceeded")}),
        Response.json(429, {"error": error("Pay.", "insufficient_quota")}),
        Response.json(400, {"error": error("Pay.", "billing_hard_limit_reached")}),
        Response.json(400, {"error": error("No.", None)}),
        Response.json(400, {"error": error("No.", "moderation_blocked")}),
        Response.json(422, {"detail": "No."}),
        Response(404),
        Response(404, b"<html>Not found</html>"),
        Response(410, b"<html>Gone</html>"),
        Response.json(500, {"error": error("Oh.", "server_error")}),
        Response(502, b"<html>"),
        Response(200, b"<html>"),
        Response(200, b'{"status": "completed", "output": [{"result": "iVBO'),
        Response(cut=60),
    ],
)
async def test_a_failed_check_is_no_result_and_submits_nothing(response: Response, harness: Harness) -> None:
    harness.api.known(JOB)
    harness.api.next(response)

    with pytest.raises(Retryable) as caught:
        await harness.check()

    assert not caught.value.accepted
    assert isinstance(await harness.check(), Generated)
    assert harness.api.jobs == []


async def test_a_server_that_cannot_be_reached_is_asked_again(harness: Harness) -> None:
    await harness.set_up(f"http://127.0.0.1:{free_port()}/v1")

    with pytest.raises(Retryable) as caught:
        await harness.check()

    assert (caught.value.code, caught.value.accepted) == ("unreachable", False)


async def test_too_large_picture_is_not_fetched_again(harness: Harness) -> None:
    await harness.set_up(IMAGE_JOBS_MAX_IMAGE_BYTES=50_000)

    error = await harness.fail(**harness.api.completed(drawn(picture() + os.urandom(100_000))))

    assert isinstance(error, Refused)
    assert error.code == "image_too_large"


async def test_a_wait_that_was_asked_for_is_kept_to(harness: Harness) -> None:
    harness.api.known(JOB)
    harness.api.next(Response(429, headers={"retry-after": "7"}))

    with pytest.raises(Retryable) as caught:
        await harness.check()

    assert caught.value.retry_in == timedelta(seconds=7)
