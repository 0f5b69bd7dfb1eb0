"""The Responses API in the background: what is ordered, and what each answer to a question means."""

import asyncio
import base64
import os
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from daemon.errors import OutcomeUnknown, Refused, Retryable, RunError
from daemon.prompt import PromptSpec
from daemon.providers import Generated, Request, Submitted, Traceable, Waiting, create
from daemon.providers.openai_models import MAINLINE, estimate
from daemon.providers.openai_order import INSTRUCTIONS
from daemon.settings import Settings
from tests.fakes.openai_api import KEY, error, moderation
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
    picture_of,
    said,
)
from tests.fakes.reporter import Recorder
from tests.fakes.server import Answer, picture, size_of
from tests.postgres import free_port

FLARE = "gpt-image-2.5-flare"
ORDER = "resp_known"


@dataclass
class Studio:
    """The provider, the API it talks to, and what it reports."""

    api: ResponsesAPI
    folder: Path
    recorder: Recorder = field(default_factory=Recorder)

    def __post_init__(self) -> None:
        self.provider = self._create(self.api.base_url)

    def _create(self, url: str, *, key: str = KEY, **settings: Any) -> Traceable:
        made = create("openai", Settings(_env_file=None, OPENAI_API_KEY=key, OPENAI_BASE_URL=url, **settings))
        assert isinstance(made, Traceable)
        return made

    async def set_up(self, url: str | None = None, **settings: Any) -> None:
        """Goes on with a provider that is set up in another way."""
        await self.provider.aclose()
        self.provider = self._create(url or self.api.base_url, **settings)

    def request(self, model: str = FLARE, *, previous: bytes | None = None, **spec: Any) -> Request:
        """Asks for red foxes; `metadata` goes beside the promptSpec, whatever else is named belongs to it."""
        image = None
        if previous is not None:
            image = self.folder / "previous"
            image.write_bytes(previous)
        metadata = {"mode": "background", **spec.pop("metadata", {})}
        prompt = PromptSpec.parse({"promptSpec": {"basePrompt": "a red fox", **spec}})
        return Request("run_1", model, prompt, self.folder, previous_image=image, metadata=metadata, ticket=7)

    async def order(self, model: str = FLARE, **options: Any) -> Submitted:
        """Orders a picture."""
        made = await self.provider.generate(self.request(model, **options), self.recorder)
        assert isinstance(made, Submitted)
        return made

    async def check(self, job_id: str = ORDER, model: str = FLARE) -> Generated | Waiting:
        """Asks once."""
        return await self.provider.check(job_id, self.request(model), self.recorder)

    async def found(self, **response: Any) -> Generated | Waiting:
        """Asks about a response that is like this."""
        self.api.known(ORDER, model=MAINLINE)
        self.api.stages = [response]
        return await self.check()

    async def fail(self, **response: Any) -> RunError:
        """Asks about a response that is like this, and gives the error."""
        with pytest.raises(RunError) as caught:
            await self.found(**response)
        assert KEY not in str(vars(caught.value))
        return caught.value

    async def fail_to_order(self, **options: Any) -> RunError:
        """Orders in vain; gives the error."""
        with pytest.raises(RunError) as caught:
            await self.order(**options)
        assert KEY not in str(vars(caught.value))
        return caught.value


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
async def test_word_is_expected_where_a_secret_for_it_is_set(
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


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"status": "queued"}', b'{"id": "resp_1", "sta'])
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
    [None, {}, {"run_id": "run_1"}, {"run_id": "run_1", "ticket": "seven"}, {"run_id": "", "ticket": "7"}, {"a": "b"}],
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


async def test_a_wait_that_was_asked_for_is_kept_to(studio: Studio) -> None:
    studio.api.known(ORDER)
    studio.api.next(Answer(429, headers={"retry-after": "7"}))

    with pytest.raises(Retryable) as caught:
        await studio.check()

    assert caught.value.retry_in == timedelta(seconds=7)


async def test_base64_of_the_picture_is_nowhere_but_on_disk(studio: Studio) -> None:
    image = picture((300, 300))
    made = await studio.found(**studio.api.completed(drawn(image)))

    assert isinstance(made, Generated)
    assert base64.b64encode(image).decode()[:200] not in str(made.data)
