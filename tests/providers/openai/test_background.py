"""The Responses API in the background: what is ordered, cancelled, and whose it is."""

import asyncio
import os
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from daemon.errors import OutcomeUnknown, Refused, Retryable
from daemon.providers import Generated
from daemon.providers.openai_models import MAINLINE, estimate
from daemon.providers.openai_order import INSTRUCTIONS
from daemon.providers.vendor import LONGEST_ID
from tests.background_studio import FLARE, ORDER, Studio
from tests.fakes.openai_api import error, moderation
from tests.fakes.openai_responses import (
    QUEUED,
    ResponsesAPI,
    picture_of,
)
from tests.fakes.server import Answer, picture, size_of


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


# What is ordered.


async def test_an_order_names_its_run_and_draws_once_with_the_model_that_was_asked_for(studio: Studio) -> None:
    made = await studio.order(size="1536x1024", quality="hd", styleModifiers=["watercolour"])

    assert made.job_id in studio.api.responses
    (call,) = studio.api.orders
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
    assert studio.recorder.requests == [{"endpoint": "responses", **call.fields}]
    assert studio.recorder.estimates == [estimate(FLARE, (1536, 1024), "high")]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
async def test_a_previous_image_goes_with_the_order_as_it_is(kind: str, studio: Studio) -> None:
    previous = picture((64, 64), kind)

    await studio.order(previous=previous)

    (call,) = studio.api.orders
    _, image = call.fields["input"][0]["content"]
    assert picture_of(image["image_url"]) == previous
    assert call.fields["tools"][0]["action"] == "edit"
    described = studio.recorder.requests[0]["input"][0]["content"][1]
    assert described["image_url"] == f"image/{kind.lower()}, {len(previous)} bytes"


async def test_a_large_previous_image_is_sent_whole_and_is_never_in_memory_as_a_whole(studio: Studio) -> None:
    request = studio.request(previous=picture() + os.urandom(20_000_000))
    received = 0

    async def swallow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal received
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        while received < length:
            received += len(await reader.read(65_536))
        writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(swallow, "127.0.0.1", 0) as server:
        await studio.set_up(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
        tracemalloc.start()
        with pytest.raises(Retryable):
            await studio.provider.generate(request, studio.recorder)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()

    assert received > 26_600_000
    assert peak < 5_000_000


async def test_a_previous_image_of_another_type_is_refused_before_anything_is_sent(studio: Studio) -> None:
    error = await studio.fail_to_order(previous=picture((8, 8), "GIF"))

    assert isinstance(error, Refused)
    assert error.code == "input_image_invalid"
    assert studio.api.requests == []


async def test_what_the_model_cannot_do_is_warned_of_as_in_the_images_api(studio: Studio) -> None:
    await studio.order("gpt-image-2", size="512x512", quality="max", seed=7, negativePrompt="text")

    (call,) = studio.api.orders
    assert call.fields["input"][0]["content"][0]["text"] == "a red fox\n\nAvoid: text"
    assert (call.fields["tools"][0]["size"], call.fields["tools"][0]["quality"]) == ("816x816", "high")
    assert studio.recorder.warned == {"size", "quality", "seed", "negativePrompt", "mode"}


async def test_it_is_said_that_the_prompt_is_worded_anew_and_that_no_webhook_of_the_run_is_called(
    studio: Studio,
) -> None:
    await studio.order(metadata={"webhookUrl": "https://example.com/hook"})

    warnings = dict(studio.recorder.warnings)
    assert "words the prompt anew" in warnings["mode"]
    assert "per project" in warnings["webhookUrl"]
    assert "example.com" not in str(studio.api.orders[0].fields)


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
    settings: dict[str, str], webhook: bool, studio: Studio
) -> None:
    await studio.set_up(**settings)

    assert (await studio.order()).webhook is webhook


async def test_an_order_that_is_not_answered_is_an_unknown_outcome_and_is_not_repeated(studio: Studio) -> None:
    studio.api.mute = True
    await studio.set_up(IMAGE_JOBS_RUN_TIMEOUT="0.3")

    error = await studio.fail_to_order()

    assert isinstance(error, OutcomeUnknown)
    assert len(studio.api.orders) == 1


@pytest.mark.parametrize(
    "body",
    [
        *(b"<html>", b"[]", b'{"status": "queued"}', b'{"id": "resp_1", "sta'),
        b'{"id": "resp_%s", "status": "queued"}' % (b"1" * LONGEST_ID),
        b'{"id": "resp_\\u0000", "status": "queued"}',
    ],
    ids=["html", "list", "no id", "broken off", "endless id", "id with NUL"],
)
async def test_an_answer_that_names_no_order_is_an_unknown_outcome(body: bytes, studio: Studio) -> None:
    studio.api.next(Answer(200, body, {"content-type": "application/json"}))

    assert isinstance(await studio.fail_to_order(), OutcomeUnknown)


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
async def test_an_order_that_is_not_taken_now_is_tried_again(
    status: int, told: dict[str, Any], policy: tuple[str, bool, str | None], studio: Studio
) -> None:
    studio.api.next(Answer.json(status, {"error": told}, retry_after="7"))

    error = await studio.fail_to_order()

    assert isinstance(error, Retryable)
    assert (error.code, error.accepted, error.blocks) == policy
    assert len(studio.api.orders) == 1


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
async def test_an_order_that_is_refused_is_final(status: int, told: dict[str, Any], code: str, studio: Studio) -> None:
    studio.api.next(Answer.json(status, {"error": told}))

    error = await studio.fail_to_order()

    assert isinstance(error, Refused)
    assert error.code == code
    assert error.hint


async def test_without_the_model_in_between_the_images_api_is_recommended(studio: Studio) -> None:
    studio.api.next(Answer.json(404, {"error": error(f"The model '{MAINLINE}' does not exist.", "model_not_found")}))

    told = await studio.fail_to_order()

    assert isinstance(told, Refused)
    assert MAINLINE in told.message
    assert "metadata.mode" in told.hint


async def test_a_server_without_the_responses_api_is_told_in_one_sentence(studio: Studio) -> None:
    studio.api.compatible = True

    error = await studio.fail_to_order(model="flux-dev")

    assert isinstance(error, Refused)
    assert (error.code, error.message) == ("not_found", "There is no Responses API at this address.")
    assert "metadata.mode" in error.hint
    assert "OPENAI_BASE_URL" in error.hint


async def test_a_server_that_knows_no_background_may_have_the_picture_ready_at_once(studio: Studio) -> None:
    studio.api.immediate = True

    made = await studio.provider.generate(studio.request(), studio.recorder)

    assert isinstance(made, Generated)
    assert size_of(made.path.read_bytes()) == (64, 48)
    assert studio.api.questions == []


# Cancelling.


async def test_an_order_is_cancelled(studio: Studio) -> None:
    order = (await studio.order()).job_id

    await studio.provider.cancel(order)

    assert studio.api.responses[order]["status"] == "cancelled"


@pytest.mark.parametrize("status", ["completed", "failed", "incomplete", "cancelled"])
async def test_cancelling_what_has_ended_changes_nothing(status: str, studio: Studio) -> None:
    studio.api.known(ORDER, status=status)

    await studio.provider.cancel(ORDER)

    assert studio.api.responses[ORDER]["status"] == status
    assert studio.api.cancelled == [ORDER]


async def test_cancelling_what_is_not_there_changes_nothing(studio: Studio) -> None:
    await studio.provider.cancel("resp_deleted")

    studio.api.known(ORDER)
    studio.api.next(Answer(409))
    await studio.provider.cancel(ORDER)
    assert studio.api.cancelled == ["resp_deleted", ORDER]


@pytest.mark.parametrize("answer", [Answer(503), Answer(429)])
async def test_cancelling_that_did_not_work_can_be_tried_again(answer: Answer, studio: Studio) -> None:
    studio.api.known(ORDER)
    studio.api.next(answer)

    with pytest.raises(Retryable):
        await studio.provider.cancel(ORDER)

    await studio.provider.cancel(ORDER)
    assert studio.api.responses[ORDER]["status"] == "cancelled"


# Whose it is.


@pytest.mark.parametrize("ended", [False, True])
async def test_an_order_tells_its_run_and_ticket(ended: bool, studio: Studio) -> None:
    studio.api.stages = [studio.api.completed() if ended else QUEUED]
    order = (await studio.order()).job_id

    assert await studio.provider.owner(order) == ("run_1", 7)
    assert list(studio.folder.iterdir()) == []


@pytest.mark.parametrize(
    "metadata",
    [
        *(None, {}, {"run_id": "run_1"}, {"run_id": "run_1", "ticket": "seven"}, {"run_id": "", "ticket": "7"}),
        *({"a": "b"}, {"run_id": "run_1", "ticket": "9" * 19}, {"run_id": "run\0", "ticket": "7"}),
        {"run_id": "run\ud800", "ticket": "7"},
    ],
    ids=repr,
)
async def test_an_order_of_somebody_else_is_none_of_ours(metadata: object, studio: Studio) -> None:
    studio.api.known(ORDER, metadata=metadata)

    assert await studio.provider.owner(ORDER) is None


@pytest.mark.parametrize("name", ["resp_deleted", "batch_1", "../models", "?"])
async def test_what_is_not_there_belongs_to_nobody(name: str, studio: Studio) -> None:
    assert await studio.provider.owner(name) is None
    assert all(call.path.startswith("/v1/responses/") for call in studio.api.requests)


@pytest.mark.parametrize("answer", [Answer(500), Answer(401), Answer(429), Answer(cut=60), Answer(200, b"<html>")])
async def test_an_owner_that_cannot_be_found_out_now_is_asked_for_again(answer: Answer, studio: Studio) -> None:
    order = (await studio.order()).job_id
    studio.api.next(answer)

    with pytest.raises(Retryable) as caught:
        await studio.provider.owner(order)

    assert not caught.value.accepted
    assert await studio.provider.owner(order) == ("run_1", 7)
