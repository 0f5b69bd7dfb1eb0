"""The Responses API in the background: what is ordered, and whose it is."""

import asyncio
import os
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from daemon.errors import OutcomeUnknown, Refused, Retryable
from daemon.providers import Generated
from daemon.providers.errors import MAX_JOB_ID
from daemon.providers.openai.background_request import INSTRUCTIONS
from daemon.providers.openai.models import MAINLINE, estimate
from tests.fakes.openai_api import error, moderation
from tests.fakes.openai_responses import QUEUED, ResponsesAPI, picture_of
from tests.fakes.server import Response, picture, size_of
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


# What is ordered.


async def test_job_names_its_run_and_draws_once_with_its_model(harness: Harness) -> None:
    made = await harness.submit(size="1536x1024", quality="hd", styleModifiers=["watercolour"])

    assert made.job_id in harness.api.responses
    (call,) = harness.api.jobs
    assert call.fields == {
        "model": MAINLINE,
        "instructions": INSTRUCTIONS,
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "a red fox, watercolour"}]}],
        "tools": [
            {
                "type": "image_generation",
                "model": FLARE,
                "action": "generate",
                "size": "1536x1024",
                "quality": "high",
            }
        ],
        "tool_choice": {"type": "image_generation"},
        "max_tool_calls": 1,
        "background": True,
        "store": True,
        "metadata": {"run_id": "run_1", "ticket": "7"},
    }
    assert harness.recorder.requests == [{"endpoint": "responses", **call.fields}]
    assert harness.recorder.estimates == [estimate(FLARE, (1536, 1024), "high")]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
async def test_a_previous_image_goes_with_the_request_as_it_is(kind: str, harness: Harness) -> None:
    previous = picture((64, 64), kind)

    await harness.submit(previous=previous)

    (call,) = harness.api.jobs
    _, image = call.fields["input"][0]["content"]
    assert picture_of(image["image_url"]) == previous
    assert call.fields["tools"][0]["action"] == "edit"
    described = harness.recorder.requests[0]["input"][0]["content"][1]
    assert described["image_url"] == f"image/{kind.lower()}, {len(previous)} bytes"


async def test_large_previous_image_is_sent_without_filling_memory(harness: Harness) -> None:
    request = harness.request(previous=picture() + os.urandom(20_000_000))
    received = 0

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while received < length:
            received += len(await reader.read(65_536))
        writer.write(b"HTTP/1.1 429 Busy\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(swallow, "127.0.0.1", 0) as server:
        await harness.set_up(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        tracemalloc.start()
        with pytest.raises(Retryable):
            await harness.provider.generate(request, harness.recorder)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    assert received > 26_600_000
    assert peak < 5_000_000


async def test_unusable_previous_image_is_refused_before_sending(harness: Harness) -> None:
    error = await harness.fail_to_submit(previous=picture((8, 8), "GIF"))

    assert isinstance(error, Refused)
    assert error.code == "input_image_invalid"
    assert harness.api.requests == []


async def test_unsupported_options_have_the_warnings_of_images(harness: Harness) -> None:
    await harness.submit("gpt-image-2", size="512x512", quality="max", seed=7, negativePrompt="text")

    (call,) = harness.api.jobs
    assert call.fields["input"][0]["content"][0]["text"] == "a red fox\n\nAvoid: text"
    assert (call.fields["tools"][0]["size"], call.fields["tools"][0]["quality"]) == ("816x816", "high")
    assert harness.recorder.warned == {"size", "quality", "seed", "negativePrompt", "mode"}


async def test_rewritten_prompt_and_unused_webhook_have_warnings(
    harness: Harness,
) -> None:
    await harness.submit(metadata={"webhookUrl": "https://example.com/hook"})

    warnings = dict(harness.recorder.warnings)
    assert "words the prompt anew" in warnings["mode"]
    assert "per project" in warnings["webhookUrl"]
    assert "example.com" not in str(harness.api.jobs[0].fields)


@pytest.mark.parametrize(
    ("settings", "webhook"),
    [
        ({}, False),
        ({"WEBHOOK_SECRET_HMAC": "h" * 16}, False),
        ({"WEBHOOK_SECRET_OPENAI": "whsec_" + "s" * 32}, True),
        ({"WEBHOOK_SECRET": "s" * 32}, True),
    ],
)
async def test_a_webhook_is_expected_where_a_secret_for_it_is_set(
    settings: dict[str, str], webhook: bool, harness: Harness
) -> None:
    await harness.set_up(**settings)

    assert (await harness.submit()).webhook is webhook


async def test_submission_without_a_response_is_unknown_outcome(harness: Harness) -> None:
    harness.api.mute = True
    await harness.set_up(IMAGE_JOBS_RUN_TIMEOUT="0.3")

    error = await harness.fail_to_submit()

    assert isinstance(error, OutcomeUnknown)
    assert len(harness.api.jobs) == 1


@pytest.mark.parametrize(
    "body",
    [
        *(b"<html>", b"[]", b'{"status": "queued"}', b'{"id": "resp_1", "sta'),
        b'{"id": "resp_%s", "status": "queued"}' % (b"1" * MAX_JOB_ID),
        b'{"id": "resp_\\u0000", "status": "queued"}',
    ],
    ids=["html", "list", "no id", "broken off", "endless id", "id with NUL"],
)
async def test_a_response_that_names_no_job_is_an_unknown_outcome(body: bytes, harness: Harness) -> None:
    harness.api.next(Response(200, body, {"content-type": "application/json"}))

    assert isinstance(await harness.fail_to_submit(), OutcomeUnknown)


@pytest.mark.parametrize(
    ("status", "told", "policy"),
    [
        (429, error("Slow down.", "rate_limit_exceeded"), ("rate_limited", False, "model")),
        (429, error("Pay.", "insufficient_quota"), ("billing", False, "provider")),
        (400, error("Pay.", "billing_hard_limit_reached"), ("billing", False, "provider")),
        (500, error("Oh.", "server_error"), ("provider_unavailable", True, None)),
        (503, error("Oh.", None), ("provider_unavailable", True, None)),
    ],
)
async def test_a_job_that_is_not_taken_now_is_tried_again(
    status: int, told: dict[str, Any], policy: tuple[str, bool, str | None], harness: Harness
) -> None:
    harness.api.next(Response.json(status, {"error": told}, retry_after="7"))

    error = await harness.fail_to_submit()

    assert isinstance(error, Retryable)
    assert (error.code, error.accepted, error.blocks) == policy
    assert len(harness.api.jobs) == 1


@pytest.mark.parametrize(
    ("status", "told", "code"),
    [
        (400, moderation("input", "violence"), "content_policy"),
        (400, error("Flagged.", "invalid_prompt"), "content_policy"),
        (400, error("What?", "invalid_value"), "invalid_request"),
        (400, error("No image.", "invalid_base64_image"), "input_image_invalid"),
        (403, error("Verify.", None), "permission"),
        (404, error(f"The model '{FLARE}' does not exist.", "model_not_found"), "unknown_model"),
    ],
)
async def test_a_job_that_is_refused_is_final(status: int, told: dict[str, Any], code: str, harness: Harness) -> None:
    harness.api.next(Response.json(status, {"error": told}))

    error = await harness.fail_to_submit()

    assert isinstance(error, Refused)
    assert error.code == code
    assert error.hint


async def test_missing_text_model_has_a_hint_for_the_images_api(harness: Harness) -> None:
    harness.api.next(Response.json(404, {"error": error(f"The model '{MAINLINE}' does not exist.", "model_not_found")}))

    told = await harness.fail_to_submit()

    assert isinstance(told, Refused)
    assert MAINLINE in told.message
    assert "metadata.mode" in told.hint


async def test_server_without_responses_api_is_one_sentence(harness: Harness) -> None:
    harness.api.compatible = True

    error = await harness.fail_to_submit(model="flux-dev")

    assert isinstance(error, Refused)
    assert (error.code, error.message) == ("not_found", "There is no Responses API at this address.")
    assert "metadata.mode" in error.hint
    assert "OPENAI_BASE_URL" in error.hint


async def test_server_without_background_returns_the_picture(harness: Harness) -> None:
    harness.api.immediate = True

    made = await harness.provider.generate(harness.request(), harness.recorder)

    assert isinstance(made, Generated)
    assert size_of(made.path.read_bytes()) == (64, 48)
    assert harness.api.questions == []


# Whose it is.


@pytest.mark.parametrize("ended", [False, True])
async def test_a_job_names_its_run_and_ticket(ended: bool, harness: Harness) -> None:
    harness.api.stages = [harness.api.completed() if ended else QUEUED]
    job = (await harness.submit()).job_id

    assert await harness.provider.owner(job) == ("run_1", 7)
    assert list(harness.folder.iterdir()) == []


@pytest.mark.parametrize(
    "metadata",
    [
        *(None, {}, {"run_id": "run_1"}, {"run_id": "run_1", "ticket": "seven"}, {"run_id": "", "ticket": "7"}),
        *({"a": "b"}, {"run_id": "run_1", "ticket": "9" * 19}, {"run_id": "run\0", "ticket": "7"}),
        {"run_id": "run\ud800", "ticket": "7"},
    ],
    ids=repr,
)
async def test_a_job_of_somebody_else_is_none_of_ours(metadata: object, harness: Harness) -> None:
    harness.api.known(JOB, metadata=metadata)

    assert await harness.provider.owner(JOB) is None


@pytest.mark.parametrize("name", ["resp_deleted", "batch_1", "../models", "?"])
async def test_missing_response_has_no_owner(name: str, harness: Harness) -> None:
    assert await harness.provider.owner(name) is None
    assert all(call.path.startswith("/v1/responses/") for call in harness.api.requests)


@pytest.mark.parametrize(
    "response", [Response(500), Response(401), Response(429), Response(cut=60), Response(200, b"<html>")]
)
async def test_failed_look_up_of_an_owner_is_retried(response: Response, harness: Harness) -> None:
    job = (await harness.submit()).job_id
    harness.api.next(response)

    with pytest.raises(Retryable) as caught:
        await harness.provider.owner(job)

    assert not caught.value.accepted
    assert await harness.provider.owner(job) == ("run_1", 7)
