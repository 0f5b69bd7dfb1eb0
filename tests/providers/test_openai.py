import os
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from daemon.errors import OutcomeUnknown, Refused, Retryable, RunError
from daemon.prompt import PromptSpec
from daemon.providers import Generated, Provider, Request, create
from daemon.settings import Settings
from tests.fakes.openai_api import (
    KEY,
    OpenAIAPI,
    cut,
    document,
    error_event,
    hang,
    moderation,
    previews,
    silent_end,
    status,
)
from tests.fakes.reporter import Recorder

FLARE = "gpt-image-2.5-flare"


def provider(url: str, *, key: str = KEY, **settings: Any) -> Provider:
    made = create("openai", Settings(_env_file=None, OPENAI_API_KEY=key, OPENAI_BASE_URL=url, **settings))
    assert made is not None
    return made


@dataclass
class Studio:
    """The provider, the API it talks to, and what it reports."""

    api: OpenAIAPI
    provider: Provider
    folder: Path
    recorder: Recorder = field(default_factory=Recorder)

    async def make(self, model: str = FLARE, *, previous: bytes | None = None, **spec: Any) -> Generated:
        """Draws a red fox; whatever is named belongs to the promptSpec."""
        image = None
        if previous is not None:
            image = self.folder / "previous"
            image.write_bytes(previous)
        prompt = PromptSpec.parse({"promptSpec": {"basePrompt": "a red fox", **spec}})
        request = Request("run_1", model, prompt, self.folder, previous_image=image)
        made = await self.provider.generate(request, self.recorder)
        assert isinstance(made, Generated)
        return made

    async def set_up(self, url: str | None = None, **settings: Any) -> None:
        """Goes on with a provider that is set up in another way."""
        await self.provider.aclose()
        self.provider = provider(url or self.api.url, **settings)

    async def fail(self, model: str = FLARE, **spec: Any) -> RunError:
        """Gives the error."""
        with pytest.raises(RunError) as caught:
            await self.make(model, **spec)
        assert KEY not in str(vars(caught.value))
        return caught.value


@pytest.fixture(scope="module")
async def api() -> AsyncIterator[OpenAIAPI]:
    async with OpenAIAPI() as api:
        yield api


@pytest.fixture
async def studio(api: OpenAIAPI, tmp_path: Path) -> AsyncIterator[Studio]:
    api.reset()
    studio = Studio(api, provider(api.url), tmp_path)
    yield studio
    await studio.provider.aclose()


def picture(kind: str, size: tuple[int, int] = (64, 64)) -> bytes:
    file = BytesIO()
    Image.new("RGB", size, "coral").save(file, kind)
    return file.getvalue()


def size_of(image: bytes) -> tuple[int, int]:
    with Image.open(BytesIO(image)) as opened:
        return opened.size


def test_without_a_key_there_is_no_provider() -> None:
    assert create("openai", Settings(_env_file=None, OPENAI_API_KEY="")) is None


async def test_a_prompt_becomes_a_picture_on_disk_with_two_previews_and_its_cost(studio: Studio) -> None:
    made = await studio.make(styleModifiers=["watercolour", "soft light"])

    assert size_of(made.path.read_bytes()) == (1024, 1024)
    assert len(studio.recorder.previews) == 2
    assert all(size_of(preview) == (1024, 1024) for preview in studio.recorder.previews)
    assert studio.recorder.percents == sorted(studio.recorder.percents)
    assert made.cost == pytest.approx((13 * 5 + 396 * 30) / 1e6)
    assert made.data["request_id"] == "req_1"
    assert studio.recorder.warnings == []
    assert [call.fields for call in studio.api.requests] == [
        {
            "model": FLARE,
            "prompt": "a red fox, watercolour, soft light",
            "size": "1024x1024",
            "quality": "medium",
            "stream": True,
            "partial_images": 2,
        }
    ]


async def test_fewer_previews_than_were_asked_for_are_no_trouble(studio: Studio) -> None:
    studio.api.next(previews(1))

    made = await studio.make()

    assert size_of(made.path.read_bytes()) == (1024, 1024)
    assert len(studio.recorder.previews) == 1


async def test_the_exact_request_is_reported_without_secrets_and_with_an_estimate(studio: Studio) -> None:
    await studio.make()

    assert studio.recorder.requests == [{"endpoint": "images/generations", **studio.api.requests[0].fields}]
    assert studio.recorder.estimates == [pytest.approx(0.0132 + 200 * 30 / 1e6, abs=5e-5)]


@pytest.mark.parametrize(
    ("kind", "content_type"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")]
)
async def test_a_previous_image_is_edited(kind: str, content_type: str, studio: Studio) -> None:
    previous = picture(kind)

    await studio.make(previous=previous)

    (call,) = studio.api.requests
    assert call.path == "/v1/images/edits"
    assert (call.image, call.image_type) == (previous, content_type)
    assert len(studio.recorder.previews) == 2
    assert studio.recorder.requests[0]["image"] == f"{content_type}, {len(previous)} bytes"


async def test_a_previous_image_of_another_type_is_refused_before_anything_is_sent(studio: Studio) -> None:
    error = await studio.fail(previous=picture("GIF"))

    assert isinstance(error, Refused)
    assert error.code == "input_image_invalid"
    assert studio.api.requests == []


@pytest.mark.parametrize(
    ("model", "spec", "size", "warned"),
    [
        (FLARE, {"size": "1792x1024"}, "1792x1024", set()),
        (FLARE, {"size": "3840x2160"}, "3840x2160", set()),
        (FLARE, {"size": "512x512"}, "816x816", {"size"}),
        (FLARE, {"size": "1000x1000"}, "992x992", {"size"}),
        (FLARE, {"size": "9000x1000"}, "3840x1280", {"size"}),
        (FLARE, {"size": "99999x99999"}, "2880x2880", {"size"}),
        (FLARE, {"size": "16x4000"}, "480x1408", {"size"}),
        (FLARE, {"aspectRatio": "16:9"}, "1536x864", set()),
        (FLARE, {"aspectRatio": "9:16"}, "864x1536", set()),
        (FLARE, {"aspectRatio": "21:9"}, "1568x672", set()),
        (FLARE, {"aspectRatio": "1:1"}, "1024x1024", set()),
        (FLARE, {"aspectRatio": "3:2"}, "1536x1024", set()),
        (FLARE, {"aspectRatio": "2:3"}, "1024x1536", set()),
        (FLARE, {"aspectRatio": "4:3"}, "1152x864", set()),
        (FLARE, {"aspectRatio": "3:4"}, "864x1152", set()),
        (FLARE, {"aspectRatio": "5:4"}, "1120x896", set()),
        (FLARE, {"aspectRatio": "4:5"}, "896x1120", set()),
        (FLARE, {"aspectRatio": "2:1"}, "1456x720", set()),
        (FLARE, {"aspectRatio": "8:1"}, "1776x592", {"aspectRatio"}),
        (FLARE, {"size": "1024x1024", "aspectRatio": "16:9"}, "1024x1024", {"aspectRatio"}),
        (FLARE, {"size": "1792x1024", "aspectRatio": "16:9"}, "1792x1024", set()),
        ("gpt-image-1.5", {"aspectRatio": "16:9"}, "1536x1024", {"aspectRatio"}),
        ("gpt-image-1.5", {"size": "1024x1792"}, "1024x1536", {"size"}),
        ("gpt-image-1-mini", {"aspectRatio": "3:2"}, "1536x1024", set()),
    ],
)
async def test_sizes_and_ratios_become_what_the_model_draws(
    model: str, spec: dict[str, Any], size: str, warned: set[str], studio: Studio
) -> None:
    await studio.make(model, **spec)

    assert studio.api.requests[0].fields["size"] == size
    assert studio.recorder.warned == warned


@pytest.mark.parametrize(
    ("model", "quality", "sent", "warned"),
    [
        (FLARE, "standard", "medium", set()),
        (FLARE, "hd", "high", set()),
        (FLARE, "max", "max", set()),
        (FLARE, "auto", "auto", set()),
        ("gpt-image-2", "max", "high", {"quality"}),
        ("gpt-image-1.5", "xhigh", "high", {"quality"}),
    ],
)
async def test_qualities_become_those_the_model_knows(
    model: str, quality: str, sent: str, warned: set[str], studio: Studio
) -> None:
    await studio.make(model, quality=quality)

    assert studio.api.requests[0].fields["quality"] == sent
    assert studio.recorder.warned == warned


async def test_a_negative_prompt_is_folded_in_and_a_seed_is_dropped_and_both_are_said(studio: Studio) -> None:
    await studio.make(negativePrompt="text, frames", seed=7)

    assert studio.api.requests[0].fields["prompt"] == "a red fox\n\nAvoid: text, frames"
    assert "seed" not in studio.api.requests[0].fields
    assert studio.recorder.warned == {"negativePrompt", "seed"}


async def test_a_prompt_that_is_too_long_is_cut_but_keeps_what_to_avoid(studio: Studio) -> None:
    await studio.make(basePrompt="x" * 32_000, styleModifiers=["soft"], negativePrompt="text")

    sent = studio.api.requests[0].fields["prompt"]
    assert len(sent) == 32_000
    assert sent.endswith("x\n\nAvoid: text")
    assert studio.recorder.warned == {"negativePrompt", "basePrompt"}


@pytest.mark.parametrize("model", ["gpt-image-2", "gpt-image-2.6-sunburst"])
async def test_cost_is_unknown_rather_than_nothing_when_no_usage_comes(model: str, studio: Studio) -> None:
    studio.api.usage = False

    made = await studio.make(model)

    assert made.cost is None


async def test_the_price_of_a_model_without_published_tokens_is_settled_from_usage_but_not_estimated(
    studio: Studio,
) -> None:
    made = await studio.make("gpt-image-2.6-flare")

    assert studio.recorder.estimates == [None]
    assert made.cost == pytest.approx((13 * 5 + 396 * 30) / 1e6)


@pytest.mark.parametrize("param", ["stream", "partial_images"])
async def test_an_account_that_may_not_stream_gets_its_picture_without_previews(param: str, studio: Studio) -> None:
    studio.api.next(status(400, "unsupported_value", param=param))

    made = await studio.make()

    assert studio.recorder.warned == {"stream"}
    assert ["stream" in call.fields for call in studio.api.requests] == [True, False]
    assert made.cost == pytest.approx((13 * 5 + 196 * 30) / 1e6)


@pytest.mark.parametrize("stage", ["input", "output"])
async def test_moderation_is_final_and_names_stage_and_categories(stage: str, studio: Studio) -> None:
    studio.api.next(status(400, **moderation(stage, "sexual", "violence")))

    error = await studio.fail()

    assert isinstance(error, Refused)
    assert error.code == "content_policy"
    assert "sexual, violence" in error.message
    assert error.data["stage"] == stage
    assert error.data["categories"] == ["sexual", "violence"]
    assert error.data["request_id"] == "req_1"
    assert len(studio.api.requests) == 1


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("content_policy_violation", "OpenAI refused the request."),
        ("invalid_prompt", "OpenAI refused the prompt."),
        ("image_content_policy_violation", "OpenAI refused the previous image."),
    ],
)
async def test_a_refusal_without_a_stage_names_what_its_code_is_about(code: str, message: str, studio: Studio) -> None:
    studio.api.next(status(400, code))

    error = await studio.fail()

    assert isinstance(error, Refused)
    assert (error.code, error.message) == ("content_policy", message)


async def test_moderation_in_mid_stream_is_final_too(studio: Studio) -> None:
    studio.api.next(error_event(moderation("output", "violence")))

    error = await studio.fail()

    assert isinstance(error, Refused)
    assert (error.code, error.data["stage"]) == ("content_policy", "output")
    assert len(studio.recorder.previews) == 1


@pytest.mark.parametrize(
    ("answer", "code"), [(429, "insufficient_quota"), (400, "billing_hard_limit_reached"), (402, None)]
)
async def test_an_empty_account_closes_the_provider_and_costs_no_attempt(
    answer: int, code: str | None, studio: Studio
) -> None:
    studio.api.next(status(answer, code))

    error = await studio.fail()

    assert isinstance(error, Retryable)
    assert (error.code, error.accepted, error.blocks) == ("billing", False, "provider")
    assert error.retry_in == timedelta(minutes=10)
    assert len(studio.api.requests) == 1


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
async def test_a_rate_limit_gives_the_attempt_back_and_waits_as_long_as_asked(
    headers: dict[str, str], wait: timedelta | None, blocks: str | None, studio: Studio
) -> None:
    studio.api.next(status(429, "rate_limit_exceeded", headers=headers))

    error = await studio.fail()

    assert isinstance(error, Retryable)
    assert (error.code, error.accepted) == ("rate_limited", False)
    assert (error.retry_in, error.blocks) == (wait, blocks)
    assert len(studio.api.requests) == 1


@pytest.mark.parametrize(
    ("answer", "reported", "code"),
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
async def test_what_asking_again_cannot_change_is_final(
    answer: int, reported: str | None, code: str, studio: Studio
) -> None:
    studio.api.next(status(answer, reported))

    error = await studio.fail()

    assert isinstance(error, Refused)
    assert error.code == code
    assert "OPENAI_BASE_URL" in error.hint if code == "not_found" else error.hint
    assert error.data["status"] == answer
    assert len(studio.api.requests) == 1


async def test_a_wrong_key_is_refused_with_a_cure(studio: Studio) -> None:
    await studio.set_up(key="sk-other")

    error = await studio.fail()

    assert isinstance(error, Refused)

    assert error.code == "authentication"
    assert "OPENAI_API_KEY" in error.hint


@pytest.mark.parametrize("answer", [500, 502, 503, 529, 408, 409])
async def test_an_outage_is_tried_again_as_the_next_attempt_and_then_succeeds(answer: int, studio: Studio) -> None:
    studio.api.next(status(answer, "server_error"))

    error = await studio.fail()
    await studio.make()

    assert isinstance(error, Retryable)
    assert (error.code, error.accepted, error.blocks) == ("provider_unavailable", True, None)
    assert len(studio.api.requests) == 2


@pytest.mark.parametrize(
    ("model", "code", "hint"),
    [
        ("dall-e-3", "model_retired", "openai:gpt-image-2.5-flare"),
        ("gpt-image-2.5-flair", "unknown_model", "openai:gpt-image-2.5-flare"),
    ],
)
async def test_a_model_that_is_not_there_is_refused_with_what_to_use_instead(
    model: str, code: str, hint: str, studio: Studio
) -> None:
    studio.api.next(status(404, "model_not_found"))

    error = await studio.fail(model=model)

    assert isinstance(error, Refused)
    assert error.code == code
    assert hint in error.hint


async def test_an_error_event_that_is_no_refusal_is_tried_again(studio: Studio) -> None:
    studio.api.next(error_event({"message": "The server had an error", "type": "server_error", "code": None}, after=0))

    error = await studio.fail()

    assert isinstance(error, Retryable)
    assert (error.code, error.accepted) == ("provider_unavailable", True)


async def test_an_error_event_about_what_was_asked_is_final(studio: Studio) -> None:
    studio.api.next(error_event({"message": "Too long.", "type": "image_generation_user_error", "code": None}))

    error = await studio.fail()

    assert isinstance(error, Refused)
    assert (error.code, error.message) == ("invalid_request", "OpenAI rejected the request: Too long.")


async def test_an_error_event_about_the_rate_has_cost_an_attempt(studio: Studio) -> None:
    studio.api.next(error_event({"message": "Slow down.", "type": "requests", "code": "rate_limit_exceeded"}))

    error = await studio.fail()

    assert isinstance(error, Retryable)
    assert (error.code, error.accepted) == ("rate_limited", True)


async def test_a_server_that_cannot_be_reached_never_got_the_request(studio: Studio) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    await studio.set_up(f"http://127.0.0.1:{port}/v1")

    error = await studio.fail()

    assert isinstance(error, Retryable)

    assert (error.code, error.accepted) == ("unreachable", False)


async def test_silence_after_the_request_was_sent_is_an_unknown_outcome_and_is_not_repeated(studio: Studio) -> None:
    studio.api.next(hang())
    await studio.set_up(IMAGE_JOBS_RUN_TIMEOUT="0.3")

    error = await studio.fail()

    assert isinstance(error, OutcomeUnknown)
    assert "in time" in error.message

    assert len(studio.api.requests) == 1


@pytest.mark.parametrize("fault", [cut(after=0), cut(after=1), silent_end()])
async def test_a_stream_that_breaks_off_is_an_unknown_outcome(fault: Any, studio: Studio) -> None:
    studio.api.next(fault)

    error = await studio.fail()

    assert isinstance(error, OutcomeUnknown)
    assert error.code == "outcome_unknown"
    assert len(studio.api.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"created": 1, "data": [{"b64_json": "iVBORw0KGg',
        b'{"created": 1, "data": [{"b64_json": "iVBORw0KGg"}]}',
        b'{"created": 1, "data": [{"b64_json": "***not base64***"}]}',
        b"<html>Bad gateway</html>",
        b"[]",
        b'{"x": "' + b"x" * 1_100_000 + b'"}',
    ],
)
async def test_an_answer_that_is_damaged_is_an_unknown_outcome(body: bytes, studio: Studio) -> None:
    studio.api.next(document(body))

    error = await studio.fail()

    assert isinstance(error, OutcomeUnknown)


async def test_an_answer_without_a_picture_is_tried_again_and_its_cost_is_kept(studio: Studio) -> None:
    usage = b'{"input_tokens_details": {"text_tokens": 10, "image_tokens": 0}, "output_tokens": 100}'
    studio.api.next(document(b'{"created": 1, "data": [], "usage": ' + usage + b"}"))

    error = await studio.fail()

    assert isinstance(error, Retryable)
    assert error.code == "empty_result"
    assert error.cost == pytest.approx((10 * 5 + 100 * 30) / 1e6)


async def test_a_picture_that_is_too_large_is_not_kept(studio: Studio) -> None:
    studio.api.picture = bytes(100_000)
    await studio.set_up(IMAGE_JOBS_MAX_IMAGE_BYTES=50_000)

    error = await studio.fail()

    assert isinstance(error, OutcomeUnknown)
    assert "larger than 50,000 bytes" in error.message


async def test_a_large_picture_arrives_byte_for_byte(studio: Studio) -> None:
    studio.api.picture = os.urandom(5_000_001)

    made = await studio.make()

    assert made.path.read_bytes() == studio.api.picture
    assert studio.recorder.previews == [studio.api.picture, studio.api.picture]


async def test_a_compatible_server_is_asked_for_base64_and_for_no_stream(studio: Studio) -> None:
    studio.api.compatible = True

    made = await studio.make("flux-dev", size="512x512")

    assert made.cost is None
    assert studio.api.requests[0].fields == {
        "model": "flux-dev",
        "prompt": "a red fox",
        "size": "512x512",
        "response_format": "b64_json",
    }


async def test_a_compatible_server_that_ignores_the_stream_is_understood(studio: Studio) -> None:
    studio.api.compatible = True

    made = await studio.make("gpt-image-2")

    assert size_of(made.path.read_bytes()) == (1024, 1024)


async def test_a_picture_that_lies_at_a_url_of_the_same_server_is_fetched_without_our_key(studio: Studio) -> None:
    studio.api.compatible = studio.api.answer_with_url = True

    made = await studio.make("flux-dev")

    assert size_of(made.path.read_bytes()) == (64, 64)
    assert made.original_url == f"{studio.api.url}/files/picture.png?secret=1"
    assert made.revised_prompt == "As it was drawn"
    assert studio.api.downloads == 1


async def test_a_picture_at_an_address_that_is_not_allowed_is_not_fetched(studio: Studio) -> None:
    studio.api.compatible = True
    studio.api.next(document(b'{"data": [{"url": "http://169.254.169.254/latest?token=1"}]}'))

    error = await studio.fail(model="flux-dev")

    assert isinstance(error, Refused)
    assert error.code == "download"
    assert error.data["url"] == "http://169.254.169.254/latest"
