"""A response of OpenAI's Images API becomes an image with its cost."""

import os
from collections.abc import Mapping
from typing import Any

import pytest

from daemon.errors import OutcomeUnknown, Refused, Retryable
from tests.fakes.openai_api import (
    cut,
    document,
    previews,
    silent_end,
    status,
)
from tests.support.openai_images_harness import FLARE, Harness, picture, size_of
from tests.support.reporter import Recorder


async def test_prompt_becomes_a_picture_with_previews_and_cost(harness: Harness) -> None:
    made = await harness.make(styleModifiers=["watercolour", "soft light"])

    assert size_of(made.path.read_bytes()) == (1024, 1024)
    assert len(harness.recorder.previews) == 2
    assert all(size_of(preview) == (1024, 1024) for preview in harness.recorder.previews)
    assert harness.recorder.percents == sorted(harness.recorder.percents)
    assert made.cost == pytest.approx((13 * 5 + 396 * 30) / 1e6)
    assert made.data["request_id"] == "req_1"
    assert harness.recorder.warnings == []
    assert [call.fields for call in harness.api.requests] == [
        {
            "model": FLARE,
            "prompt": "a red fox, watercolour, soft light",
            "size": "1024x1024",
            "quality": "medium",
            "stream": True,
            "partial_images": 2,
        }
    ]


async def test_fewer_previews_than_were_asked_for_are_no_trouble(harness: Harness) -> None:
    harness.api.next(previews(1))

    made = await harness.make()

    assert size_of(made.path.read_bytes()) == (1024, 1024)
    assert len(harness.recorder.previews) == 1


@pytest.mark.parametrize("model", ["gpt-image-2", "gpt-image-2.6-sunburst"])
async def test_cost_is_unknown_rather_than_nothing_when_no_usage_comes(model: str, harness: Harness) -> None:
    harness.api.usage = False

    made = await harness.make(model)

    assert made.cost is None


async def test_unpublished_tokens_have_a_cost_and_no_estimate(
    harness: Harness,
) -> None:
    made = await harness.make("gpt-image-2.6-flare")

    assert harness.recorder.estimates == [None]
    assert made.cost == pytest.approx((13 * 5 + 396 * 30) / 1e6)


@pytest.mark.parametrize("param", ["stream", "partial_images"])
async def test_account_without_streaming_gets_no_previews(param: str, harness: Harness) -> None:
    harness.api.next(status(400, "unsupported_value", param=param))

    made = await harness.make()

    assert harness.recorder.warned == {"stream"}
    assert ["stream" in call.fields for call in harness.api.requests] == [True, False]
    assert made.cost == pytest.approx((13 * 5 + 196 * 30) / 1e6)


async def test_a_second_request_is_kept_from_leaving_as_the_first(harness: Harness) -> None:
    """The lease may lapse between the two."""
    lapsed = Retryable("The lease lapsed.", code="lease_lapsed", hint="Wait.", accepted=False)

    class Lapsing(Recorder):
        def submitted(self, request: Mapping[str, Any], **more: Any) -> None:
            if self.requests:
                raise lapsed
            super().submitted(request, **more)

    harness.recorder = Lapsing()
    harness.api.next(status(400, "unsupported_value", param="stream"))
    assert await harness.fail() is lapsed
    assert len(harness.api.requests) == 1


@pytest.mark.parametrize("fault", [cut(after=0), cut(after=1), silent_end()])
async def test_a_stream_that_breaks_off_is_an_unknown_outcome(fault: Any, harness: Harness) -> None:
    harness.api.next(fault)

    error = await harness.fail()

    assert isinstance(error, OutcomeUnknown)
    assert error.code == "outcome_unknown"
    assert len(harness.api.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"created": 1, "data": [{"b64_json": "iVBORw0KGg',
        b"<html>Bad gateway</html>",
        b"[]",
    ],
)
async def test_damaged_response_is_an_unknown_outcome(body: bytes, harness: Harness) -> None:
    harness.api.next(document(body))

    error = await harness.fail()

    assert isinstance(error, OutcomeUnknown)


async def test_response_without_a_picture_is_retried_with_its_cost(harness: Harness) -> None:
    usage = b'{"input_tokens_details": {"text_tokens": 10, "image_tokens": 0}, "output_tokens": 100}'
    harness.api.next(document(b'{"created": 1, "data": [], "usage": ' + usage + b"}"))

    error = await harness.fail()

    assert isinstance(error, Retryable)
    assert error.code == "empty_result"
    assert error.cost == pytest.approx((10 * 5 + 100 * 30) / 1e6)


async def test_a_picture_that_is_too_large_is_not_kept(harness: Harness) -> None:
    harness.api.picture = bytes(100_000)
    await harness.set_up(IMAGE_JOBS_MAX_IMAGE_BYTES=50_000)

    error = await harness.fail()

    assert isinstance(error, Refused)
    assert (error.code, error.charged) == ("image_too_large", True)
    assert "larger than 50,000 bytes" in error.message


async def test_a_large_picture_arrives_byte_for_byte(harness: Harness) -> None:
    harness.api.picture = picture("PNG") + os.urandom(5_000_001)

    made = await harness.make()

    assert made.path.read_bytes() == harness.api.picture
    assert harness.recorder.previews == [harness.api.picture, harness.api.picture]
