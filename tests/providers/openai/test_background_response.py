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
from daemon.providers.openai_models import MAINLINE
from tests.background_studio import ORDER, Studio
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
from tests.fakes.server import Answer, picture, size_of
from tests.postgres import free_port


@pytest.fixture(scope="module")
async def api() -> AsyncIterator[ResponsesAPI]:
    async with ResponsesAPI() as api:
        yield api


@pytest.fixture
async def studio(api: ResponsesAPI, tmp_path: Path) -> AsyncIterator[Studio]:
    api.reset()
    studio = Studio(api, tmp_path)
    yield studio
    await studio.provider.aclose()


# What has become of it.


async def test_a_response_is_waited_for_and_then_is_a_picture_with_its_cost(studio: Studio) -> None:
    studio.api.stages = [QUEUED, IN_PROGRESS, studio.api.completed()]
    order = (await studio.order()).job_id

    queued, drawing, made = [await studio.check(order) for _ in range(3)]

    assert queued == Waiting(message="The order waits at OpenAI")
    assert drawing == Waiting(message="OpenAI is drawing")
    assert isinstance(made, Generated)
    assert size_of(made.path.read_bytes()) == (64, 48)
    assert made.cost == pytest.approx(COST)
    assert made.revised_prompt == "A red fox, as it was drawn"
    assert made.data == {"response_id": order, "request_id": "req_1", "usage": USAGE, "image_usage": IMAGE_USAGE}
    assert len(studio.api.orders) == 1


async def test_a_status_that_nobody_knows_yet_is_waited_for(studio: Studio) -> None:
    assert await studio.found(status="thinking") == Waiting(message="OpenAI is at work")


async def test_a_large_picture_arrives_byte_for_byte_and_is_never_in_memory_as_a_whole(studio: Studio) -> None:
    large = os.urandom(8_000_001)
    await studio.found(**studio.api.completed())  # whatever is imported late is there
    answer = Answer.json(200, {"id": ORDER, "model": MAINLINE, **studio.api.completed(drawn(large))})
    studio.api.next(answer)
    tracemalloc.start()
    made = await studio.check()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert isinstance(made, Generated)
    assert made.path.read_bytes() == large
    assert peak < len(large) + len(answer.body)  # the fake sends it from this process


async def test_of_several_calls_the_last_picture_counts(studio: Studio) -> None:
    second = picture((32, 32))

    made = await studio.found(**studio.api.completed(drawn(), drawn(second), not_drawn()))

    assert isinstance(made, Generated)
    assert made.path.read_bytes() == second


@pytest.mark.parametrize("stage", [incomplete("content_filter"), failed("server_error"), CANCELLED])
async def test_a_picture_that_is_there_is_used_however_the_response_ended(
    stage: dict[str, Any], studio: Studio
) -> None:
    assert isinstance(await studio.found(**{**studio.api.completed(), **stage}), Generated)


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
async def test_cost_is_unknown_rather_than_too_low_where_a_part_of_it_is_not_known(
    without: dict[str, Any], studio: Studio
) -> None:
    made = await studio.found(**{**studio.api.completed(), **without})

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
async def test_a_response_that_failed_is_final_or_made_anew_by_its_code(
    code: str, ours: str, final: bool, studio: Studio
) -> None:
    error = await studio.fail(**failed(code))

    assert error.code == ours
    assert isinstance(error, Refused) if final else isinstance(error, Retryable)
    if isinstance(error, Retryable):
        assert error.accepted  # asking about it again would answer the same
    assert error.data["code"] == code
    assert error.data["response_id"] == ORDER


async def test_a_response_that_failed_without_a_reason_is_made_anew(studio: Studio) -> None:
    error = await studio.fail(status="failed", error=None)

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
    reason: str | None, code: str, final: bool, studio: Studio
) -> None:
    error = await studio.fail(status="incomplete", incomplete_details={"reason": reason} if reason else None)

    assert (error.code, isinstance(error, Refused)) == (code, final)
    assert isinstance(error, Refused | Retryable)


async def test_a_response_that_was_cancelled_at_openai_is_final(studio: Studio) -> None:
    error = await studio.fail(**CANCELLED)

    assert isinstance(error, Refused)
    assert error.code == "cancelled_there"
    assert "Requeue" in error.hint


@pytest.mark.parametrize("stage", ["input", "output"])
async def test_a_call_that_was_refused_within_a_completed_response_is_final_and_has_its_cost(
    stage: str, studio: Studio
) -> None:
    error = await studio.fail(**studio.api.completed(not_drawn(moderation(stage, "violence"))))

    assert isinstance(error, Refused)
    assert (error.code, error.data["stage"], error.data["categories"]) == ("content_policy", stage, ["violence"])
    assert error.cost == pytest.approx(COST)


async def test_a_call_knows_more_than_the_failed_response_around_it(studio: Studio) -> None:
    call = not_drawn(moderation("output", "sexual"))

    error = await studio.fail(**failed("server_error", output=[call]))

    assert error.code == "content_policy"


async def test_a_call_that_failed_without_a_reason_is_made_anew(studio: Studio) -> None:
    error = await studio.fail(**studio.api.completed(not_drawn()))

    assert isinstance(error, Retryable)
    assert (error.code, error.accepted) == ("empty_result", True)


@pytest.mark.parametrize("call", [drawn(result=None), drawn(result="")])
async def test_a_call_without_a_picture_is_made_anew(call: dict[str, Any], studio: Studio) -> None:
    error = await studio.fail(**studio.api.completed(call))

    assert isinstance(error, Retryable)
    assert error.code == "empty_result"


async def test_words_instead_of_a_picture_are_shown(studio: Studio) -> None:
    error = await studio.fail(**studio.api.completed(said("I would rather not draw foxes.")))

    assert isinstance(error, Retryable)
    assert error.message == "OpenAI answered without a picture. It said: I would rather not draw foxes."


@pytest.mark.parametrize("output", [None, "x", [None, 7, {"type": "image_generation_call"}]])
async def test_an_output_of_another_shape_has_no_picture(output: object, studio: Studio) -> None:
    error = await studio.fail(status="completed", output=output)

    assert error.code == "empty_result"


async def test_base64_of_the_picture_is_nowhere_but_on_disk(studio: Studio) -> None:
    image = picture((300, 300))
    made = await studio.found(**studio.api.completed(drawn(image)))

    assert isinstance(made, Generated)
    assert base64.b64encode(image).decode()[:200] not in str(made.data)


# Trouble with asking.


async def test_a_response_that_is_gone_is_made_anew_and_may_have_been_paid_for(studio: Studio) -> None:
    with pytest.raises(OutcomeUnknown) as caught:
        await studio.check("resp_deleted")

    assert caught.value.data == {"response_id": "resp_deleted"}


@pytest.mark.parametrize(
    "answer",
    [
        Answer.json(401, {"error": error("Wrong.", "invalid_api_key")}),
        Answer.json(403, {"error": error("No.", None)}),
        Answer.json(429, {"error": error("Slow down.", "rate_limit_exceeded")}),
        Answer.json(429, {"error": error("Pay.", "insufficient_quota")}),
        Answer.json(400, {"error": error("Pay.", "billing_hard_limit_reached")}),
        Answer.json(500, {"error": error("Oh.", "server_error")}),
        Answer(502, b"<html>"),
        Answer(200, b"<html>"),
        Answer(200, b'{"status": "completed", "output": [{"result": "iVBO'),
        Answer(200, b'{"status": "completed", "output": [{"result": "***"}]}'),
        Answer(cut=60),
    ],
)
async def test_trouble_with_asking_is_no_answer_and_orders_nothing(answer: Answer, studio: Studio) -> None:
    studio.api.known(ORDER)
    studio.api.next(answer)

    with pytest.raises(Retryable) as caught:
        await studio.check()

    assert not caught.value.accepted
    assert isinstance(await studio.check(), Generated)
    assert studio.api.orders == []


async def test_a_server_that_cannot_be_reached_is_asked_again(studio: Studio) -> None:
    await studio.set_up(f"http://127.0.0.1:{free_port()}/v1")

    with pytest.raises(Retryable) as caught:
        await studio.check()

    assert (caught.value.code, caught.value.accepted) == ("unreachable", False)


async def test_a_picture_that_is_too_large_is_not_fetched_again_and_again(studio: Studio) -> None:
    await studio.set_up(IMAGE_JOBS_MAX_IMAGE_BYTES=50_000)

    error = await studio.fail(**studio.api.completed(drawn(os.urandom(100_000))))

    assert isinstance(error, Refused)
    assert error.code == "image_too_large"


async def test_a_wait_that_was_asked_for_is_kept_to(studio: Studio) -> None:
    studio.api.known(ORDER)
    studio.api.next(Answer(429, headers={"retry-after": "7"}))

    with pytest.raises(Retryable) as caught:
        await studio.check()

    assert caught.value.retry_in == timedelta(seconds=7)
