"""A prompt becomes a request of the Gemini API."""

import asyncio
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from daemon.errors import Refused
from daemon.prompt import PromptSpec
from daemon.providers import Request, create, models, permit
from daemon.providers.catalogue import resolve
from daemon.providers.google.models import estimate
from daemon.settings import Settings
from tests.fakes.google_api import GoogleAPI
from tests.fakes.server import picture
from tests.support.provider_harness import ProviderHarness

NEWEST = "gemini-nano-banana-2.1"
PRO = "gemini-3-pro-image"
FLASH = "gemini-2.5-flash-image"
TODAY = date(2026, 11, 24)
Harness = ProviderHarness[GoogleAPI]


def sent(harness: Harness) -> dict[str, Any]:
    """The configuration of the one request that was made."""
    (call,) = harness.api.requests
    return call.fields["generationConfig"]


@pytest.mark.parametrize("variable", ["GOOGLE_API_KEY", "GEMINI_API_KEY"])
async def test_the_key_has_two_names(variable: str) -> None:
    made = create("google", Settings(_env_file=None, **{variable: "a key"}))
    assert made is not None
    await made.aclose()


async def test_of_two_keys_the_first_counts(harness: Harness) -> None:
    await harness.set_up(GEMINI_API_KEY="another")

    await harness.make()


def test_without_a_key_there_is_no_provider() -> None:
    assert create("google", Settings(_env_file=None, GOOGLE_API_KEY="", GEMINI_API_KEY="")) is None


async def test_exact_request_is_reported_without_secrets(harness: Harness) -> None:
    await harness.make(aspectRatio="16:9", quality="hd", seed=7)

    assert harness.recorder.requests == [{"model": NEWEST, **harness.api.requests[0].fields}]
    assert harness.recorder.estimates == [None]
    assert estimate(NEWEST, "1K") == pytest.approx(0.0336)


@pytest.mark.parametrize(
    ("kind", "content_type"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")]
)
async def test_a_previous_image_goes_along_as_a_part(kind: str, content_type: str, harness: Harness) -> None:
    previous = picture(kind=kind)

    await harness.make(previous=previous)

    text, image = harness.api.requests[0].fields["contents"][0]["parts"]
    assert text == {"text": "a red fox"}
    assert image["inlineData"]["mime_type"] == content_type
    reported = harness.recorder.requests[0]["contents"][0]["parts"][1]
    assert reported == {"inlineData": f"{content_type}, {len(previous)} bytes"}


async def test_a_large_previous_image_goes_along_too(harness: Harness) -> None:
    previous = picture() + bytes(5_000_000)

    await harness.make(previous=previous)

    assert len(harness.api.requests) == 1


@pytest.mark.parametrize(
    ("previous", "code"), [(picture(kind="GIF"), "input_image_invalid"), (picture() + bytes(15_000_000), "too_large")]
)
async def test_unusable_previous_image_is_refused_before_sending(previous: bytes, code: str, harness: Harness) -> None:
    failed = await harness.fail(previous=previous)

    assert isinstance(failed, Refused)
    assert failed.code == code
    assert harness.api.requests == []


async def test_a_damaged_previous_image_is_final(harness: Harness) -> None:
    failed = await harness.fail(previous=b"\x89PNG\r\n\x1a\n and then nothing")

    assert isinstance(failed, Refused)
    assert failed.code == "input_image_invalid"


@pytest.mark.parametrize(
    ("model", "spec", "drawn", "warned"),
    [
        (NEWEST, {"size": "1024x1024"}, ("1:1", None), set()),
        (NEWEST, {"size": "2048x2048"}, ("1:1", "2K"), set()),
        (NEWEST, {"size": "4096x4096"}, ("1:1", "4K"), set()),
        (NEWEST, {"size": "1792x1024"}, ("16:9", "2K"), {"size"}),
        (NEWEST, {"size": "512x512"}, ("1:1", None), {"size"}),
        (NEWEST, {"size": "9000x1000"}, ("8:1", "4K"), {"size"}),
        (PRO, {"size": "1000x4000"}, ("9:16", "4K"), {"size"}),
        (FLASH, {"size": "2048x2048"}, ("1:1", None), {"size"}),
        *((NEWEST, {"aspectRatio": ratio}, (ratio, None), set()) for ratio in models("google")[0].ratios),
        (PRO, {"aspectRatio": "1:8"}, ("9:16", None), {"aspectRatio"}),
        (NEWEST, {"aspectRatio": "2:1"}, ("16:9", None), {"aspectRatio"}),
        (NEWEST, {"aspectRatio": "32:18"}, ("16:9", None), set()),
        (NEWEST, {"size": "1024x1024", "aspectRatio": "16:9"}, ("1:1", None), {"aspectRatio"}),
        (NEWEST, {"size": "1792x1024", "aspectRatio": "16:9"}, ("16:9", "2K"), {"size"}),
    ],
)
async def test_sizes_and_ratios_become_what_the_model_draws(
    model: str, spec: dict[str, Any], drawn: tuple[str, str | None], warned: set[str], harness: Harness
) -> None:
    await harness.make(model, **spec)

    image = sent(harness)["imageConfig"]
    assert (image["aspectRatio"], image.get("imageSize")) == drawn
    assert harness.recorder.warned == warned


@pytest.mark.parametrize(
    ("model", "quality", "size", "warned"),
    [
        (NEWEST, "standard", None, set()),
        (NEWEST, "auto", None, set()),
        (NEWEST, "hd", "2K", set()),
        (NEWEST, "max", "2K", {"quality"}),
        (NEWEST, "low", None, {"quality"}),
        ("gemini-3.1-flash-lite-image", "hd", None, {"quality"}),
    ],
)
async def test_a_finer_quality_is_a_larger_picture(
    model: str, quality: str, size: str | None, warned: set[str], harness: Harness
) -> None:
    await harness.make(model, quality=quality, aspectRatio="1:1")

    assert sent(harness)["imageConfig"].get("imageSize") == size
    assert harness.recorder.warned == warned


async def test_hd_makes_more_pixels_with_a_warning(harness: Harness) -> None:
    await harness.make(quality="hd", size="1024x1024")

    assert sent(harness)["imageConfig"]["imageSize"] == "2K"
    assert harness.recorder.warned == {"size"}


@pytest.mark.parametrize(("seed", "used"), [(0, 0), (7, 7), (2**31 - 1, 2**31 - 1), (2**31 + 5, 5)])
async def test_a_seed_is_sent_and_said_to_be_no_promise(seed: int, used: int, harness: Harness) -> None:
    await harness.make(seed=seed)

    assert sent(harness)["seed"] == used
    assert len(harness.recorder.warnings) == (1 if seed == used else 2)
    assert harness.recorder.warned == {"seed"}


async def test_a_negative_prompt_is_folded_in_and_that_is_said(harness: Harness) -> None:
    await harness.make(negativePrompt="text, frames")

    (part,) = harness.api.requests[0].fields["contents"][0]["parts"]
    assert part["text"] == "a red fox\n\nAvoid: text, frames"
    assert harness.recorder.warned == {"negativePrompt"}


async def test_long_prompt_is_cut_and_keeps_the_negative_prompt(harness: Harness) -> None:
    await harness.make(basePrompt="x" * 32_000, styleModifiers=["soft"], negativePrompt="text")

    (part,) = harness.api.requests[0].fields["contents"][0]["parts"]
    assert len(part["text"]) == 32_000
    assert part["text"].endswith("x\n\nAvoid: text")
    assert harness.recorder.warned == {"negativePrompt", "basePrompt"}


@pytest.mark.parametrize(
    ("model", "successor"),
    [
        ("gemini-2.5-flash-image-preview", FLASH),
        ("gemini-3-pro-image-preview", PRO),
        ("gemini-3.1-flash-image-preview", "gemini-3.1-flash-image"),
        ("imagen-3.0", NEWEST),
        ("imagen-3.0-generate-002", NEWEST),
        ("imagen-4.0-generate-preview-06-06", NEWEST),
        ("imagen-4.0-ultra-generate-001", NEWEST),
    ],
)
def test_retired_model_is_replaced_by_its_successor(model: str, successor: str) -> None:
    found = resolve(f"google:{model}", strict=False, today=TODAY)

    assert (found.requested, found.model) == (model, successor)
    assert found.warning is not None
    assert found.warning.startswith(f"{model} was retired on 2026-")


def test_the_newest_model_draws_all_fourteen_ratios() -> None:
    assert set(models("google")[0].ratios) == {
        *("1:1", "2:3", "3:2", "3:4", "4:3", "4:5", "5:4", "9:16", "16:9", "21:9", "1:4", "4:1", "1:8", "8:1")
    }


def test_google_alone_means_the_newest_model() -> None:
    assert resolve("google", strict=True, today=TODAY).model == NEWEST == models("google")[0].name


async def test_large_inputs_wait_for_a_permit_before_the_call(harness: Harness, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(bytes(5_000_000))
    prompt = PromptSpec.parse({"promptSpec": {"basePrompt": "a red fox"}})
    request = Request("run_1", NEWEST, prompt, tmp_path, previous_image=large)

    held = 0
    two, leave = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        nonlocal held
        async with permit(harness.provider, request):
            held += 1
            if held == 2:
                two.set()
            await leave.wait()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(3):
            tasks.create_task(hold())
        await two.wait()
        async with permit(harness.provider, replace(request, previous_image=None)):
            assert held == 2
        leave.set()
    assert held == 3
    assert harness.api.requests == []
