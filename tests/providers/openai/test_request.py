"""A prompt becomes a request of OpenAI's Images API."""

from typing import Any

import pytest

from daemon.errors import Refused
from daemon.providers import create
from daemon.settings import Settings
from tests.support.openai_images_harness import FLARE, Harness, picture


def test_without_a_key_there_is_no_provider() -> None:
    assert create("openai", Settings(_env_file=None, OPENAI_API_KEY="")) is None


async def test_exact_request_is_reported_without_secrets(harness: Harness) -> None:
    await harness.make()

    assert harness.recorder.requests == [{"endpoint": "images/generations", **harness.api.requests[0].fields}]
    assert harness.recorder.estimates == [pytest.approx(0.0132 + 200 * 30 / 1e6, abs=5e-5)]


@pytest.mark.parametrize(
    ("kind", "content_type"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")]
)
async def test_a_previous_image_is_edited(kind: str, content_type: str, harness: Harness) -> None:
    previous = picture(kind)

    await harness.make(previous=previous)

    (call,) = harness.api.requests
    assert call.path == "/v1/images/edits"
    assert (call.image, call.image_type) == (previous, content_type)
    assert len(harness.recorder.previews) == 2
    assert harness.recorder.requests[0]["image"] == f"{content_type}, {len(previous)} bytes"


async def test_unusable_previous_image_is_refused_before_sending(harness: Harness) -> None:
    error = await harness.fail(previous=picture("GIF"))

    assert isinstance(error, Refused)
    assert error.code == "input_image_invalid"
    assert harness.api.requests == []


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
    model: str, spec: dict[str, Any], size: str, warned: set[str], harness: Harness
) -> None:
    await harness.make(model, **spec)

    assert harness.api.requests[0].fields["size"] == size
    assert harness.recorder.warned == warned


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
    model: str, quality: str, sent: str, warned: set[str], harness: Harness
) -> None:
    await harness.make(model, quality=quality)

    assert harness.api.requests[0].fields["quality"] == sent
    assert harness.recorder.warned == warned


async def test_negative_prompt_is_folded_in_and_seed_is_dropped(harness: Harness) -> None:
    await harness.make(negativePrompt="text, frames", seed=7)

    assert harness.api.requests[0].fields["prompt"] == "a red fox\n\nAvoid: text, frames"
    assert "seed" not in harness.api.requests[0].fields
    assert harness.recorder.warned == {"negativePrompt", "seed"}


async def test_long_prompt_is_cut_and_keeps_the_negative_prompt(harness: Harness) -> None:
    await harness.make(basePrompt="x" * 32_000, styleModifiers=["soft"], negativePrompt="text")

    sent = harness.api.requests[0].fields["prompt"]
    assert len(sent) == 32_000
    assert sent.endswith("x\n\nAvoid: text")
    assert harness.recorder.warned == {"negativePrompt", "basePrompt"}
