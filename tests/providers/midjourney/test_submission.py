"""A job is submitted to a midjourney-proxy once, whatever happens to its response."""

from datetime import timedelta

import pytest

from daemon.errors import OutcomeUnknown, Refused, Retryable, RunError
from daemon.providers.errors import MAX_JOB_ID
from tests.fakes.midjourney_api import code
from tests.fakes.server import Response
from tests.support.midjourney_provider_harness import STATE, Harness
from tests.support.postgres import free_port


@pytest.mark.parametrize("number", [1, 21, 22, "1", " 22 "])
async def test_accepted_queued_and_existing_jobs_are_submitted(number: int | str, harness: Harness) -> None:
    harness.api.next(code(number, "排队中", result="42"))

    assert await harness.submit_id() == "42"


@pytest.mark.parametrize(
    ("response", "kind", "name"),
    [
        (code(24, "可能包含敏感词", properties={"bannedWord": "gore"}), Refused, "content_policy"),
        (code(4, "校验错误"), Refused, "invalid_request"),
        (code(3, "无可用的账号实例"), Retryable, "provider_unavailable"),
        (code(9, "系统异常"), Retryable, "provider_unavailable"),
        (code("4", "校验错误"), Refused, "invalid_request"),
        (code(23, "队列已满"), Retryable, "rate_limited"),
        (code(1, "no id"), OutcomeUnknown, "outcome_unknown"),
        (code(1, "endless id", result="1" * (MAX_JOB_ID + 1)), OutcomeUnknown, "outcome_unknown"),
        (code(1, "id with NUL", result="1\0"), OutcomeUnknown, "outcome_unknown"),
        (code(77, "new"), OutcomeUnknown, "outcome_unknown"),
        (Response(200), OutcomeUnknown, "outcome_unknown"),
        (Response(200, b"<html>"), OutcomeUnknown, "outcome_unknown"),
        (Response.json(200, [1]), OutcomeUnknown, "outcome_unknown"),
        (Response(404), Refused, "not_found"),
        (Response(502), OutcomeUnknown, "outcome_unknown"),
        (Response.json(502, {"code": 9, "description": "系统异常"}), Retryable, "provider_unavailable"),
    ],
)
async def test_every_response_to_a_submission_has_an_error_of_ours(
    response: Response, kind: type[RunError], name: str, harness: Harness
) -> None:
    harness.api.next(response)
    error = await harness.fail()

    assert (type(error), error.code) == (kind, name)
    assert len(harness.api.jobs) == 1


async def test_full_queue_blocks_the_proxy_without_an_attempt(harness: Harness) -> None:
    harness.api.next(code(23, "队列已满"))
    error = await harness.fail()

    assert isinstance(error, Retryable)
    assert (error.accepted, error.blocks, error.retry_in) == (False, "provider", timedelta(seconds=15))


async def test_a_banned_word_is_named(harness: Harness) -> None:
    harness.api.next(code(24, "可能包含敏感词", properties={"bannedWord": "gore"}))
    error = await harness.fail()

    assert "gore" in error.message
    assert error.data["categories"] == ["gore"]


async def test_a_wrong_secret_is_final(harness: Harness) -> None:
    await harness.set_up(key="another secret")
    error = await harness.fail()

    assert (error.code, isinstance(error, Refused)) == ("authentication", True)
    assert "MIDJOURNEY_API_KEY" in error.data["cure"]


async def test_where_nothing_listens_nothing_was_ordered(harness: Harness) -> None:
    await harness.set_up(f"http://127.0.0.1:{free_port()}")
    error = await harness.fail()

    assert isinstance(error, Retryable)
    assert not error.accepted
    assert "MIDJOURNEY_API_URL" in error.hint


async def test_timeout_after_submission_is_unknown_and_found_again(harness: Harness) -> None:
    harness.api.mute = True
    await harness.set_up(IMAGE_JOBS_RUN_TIMEOUT="0.3")
    error = await harness.fail()

    assert isinstance(error, OutcomeUnknown)
    assert "in time" in error.message
    assert await harness.submit_id(attempt=2) == "1000"
    assert len(harness.api.jobs) == 1


async def test_the_address_may_end_with_the_prefix_of_all_paths(harness: Harness) -> None:
    await harness.set_up(f"{harness.api.url}/mj/")

    assert await harness.submit_id() == "1000"


async def test_job_of_a_lost_response_is_found_and_not_made_twice(harness: Harness) -> None:
    harness.api.known("999", status="SUCCESS", imageUrl="https://example.com/a.png", state="run_1:6")
    harness.api.cut_off = True
    assert isinstance(await harness.fail(), OutcomeUnknown)

    assert await harness.submit_id(attempt=2) == "1001"
    assert len(harness.api.jobs) == 1
    assert len(harness.recorder.requests) == 1


@pytest.mark.parametrize("status", ["FAILURE", "CANCEL"])
async def test_a_job_that_leads_to_no_picture_is_submitted_anew(status: str, harness: Harness) -> None:
    harness.api.known("999", status=status, state=STATE)

    assert await harness.submit_id(attempt=2) == "1001"


async def test_successful_job_is_used_before_its_image_is_named(harness: Harness) -> None:
    harness.api.known("999", status="SUCCESS", state=STATE)
    harness.api.next(Response.json(200, {"code": 1, "result": list(harness.api.tasks.values())}))

    assert await harness.submit_id(attempt=2) == "999"
    assert harness.api.jobs == []


@pytest.mark.parametrize(
    "response", [Response(502), Response(200, b"<html>"), Response(headers={"content-length": "9"}, cut=0)]
)
async def test_failed_look_up_of_earlier_jobs_submits_nothing(response: Response, harness: Harness) -> None:
    harness.api.next(response)
    error = await harness.fail(attempt=2)

    assert isinstance(error, Retryable)
    assert not error.accepted
    assert harness.api.jobs == []
