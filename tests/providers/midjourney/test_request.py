"""A prompt becomes a line with flags for Midjourney."""

from typing import Any

import pytest

from daemon.errors import Refused
from daemon.providers import create, models
from daemon.settings import Settings
from tests.fakes.midjourney_api import KEY
from tests.fakes.server import picture
from tests.support.midjourney_provider_harness import STATE, Harness


def test_without_an_address_there_is_no_provider() -> None:
    assert create("midjourney", Settings(_env_file=None, MIDJOURNEY_API_URL="", MIDJOURNEY_API_KEY=KEY)) is None


def test_no_model_has_a_price_as_a_subscription_pays() -> None:
    assert [(model.name, model.price) for model in models("midjourney")] == [
        ("v7", None),
        ("v6", None),
        ("niji-6", None),
    ]


@pytest.mark.parametrize(
    ("model", "flag", "bot"),
    [
        ("v7", "--v 7", "MID_JOURNEY"),
        ("v6", "--v 6", "MID_JOURNEY"),
        ("niji-6", "--niji 6", "NIJI_JOURNEY"),
        ("v8.1", "--v 8.1", "MID_JOURNEY"),
    ],
)
async def test_submission_names_the_version_the_bot_and_the_run(
    model: str, flag: str, bot: str, harness: Harness
) -> None:
    job_id = await harness.submit_id(model, styleModifiers=["watercolour"])

    assert job_id == "1000"
    (call,) = harness.api.requests
    assert call.fields == {
        "botType": bot,
        "prompt": f"a red fox, watercolour {flag}",
        "base64Array": [],
        "state": STATE,
    }
    assert harness.recorder.requests == [{"endpoint": "mj/submit/imagine", **call.fields}]
    assert harness.recorder.estimates == [None]
    assert harness.recorder.warnings == []


@pytest.mark.parametrize("model", ["v7 --repeat 4", "7", "v", "dall-e-3"])
async def test_malformed_version_stays_out_of_the_prompt(model: str, harness: Harness) -> None:
    error = await harness.fail(model=model)

    assert isinstance(error, Refused)
    assert error.code == "unknown_model"
    assert harness.api.requests == []


@pytest.mark.parametrize(
    ("spec", "flags", "warned"),
    [
        ({}, "", set()),
        ({"size": "1024x1024"}, "", set()),
        ({"size": "1792x1024"}, "--ar 7:4 ", {"size"}),
        ({"size": "512x512"}, "", {"size"}),
        ({"aspectRatio": "16:9"}, "--ar 16:9 ", set()),
        ({"aspectRatio": "8:1"}, "--ar 8:1 ", set()),
        ({"size": "1024x1024", "aspectRatio": "16:9"}, "", {"aspectRatio"}),
        ({"seed": 0}, "--seed 0 ", set()),
        ({"seed": 4_294_967_295}, "--seed 4294967295 ", set()),
        ({"seed": 4_294_967_300}, "--seed 4 ", {"seed"}),
        ({"negativePrompt": "text, dogs"}, "--no text, dogs ", set()),
        ({"negativePrompt": "text --v 5"}, "--no text ", {"negativePrompt"}),
        ({"negativePrompt": "--v 5"}, "", {"negativePrompt"}),
        ({"quality": "hd"}, "", {"quality"}),
        ({"quality": "auto"}, "", set()),
    ],
)
async def test_every_field_becomes_a_flag_or_a_warning(
    spec: dict[str, Any], flags: str, warned: set[str], harness: Harness
) -> None:
    await harness.submit_id(**spec)

    assert harness.line == f"a red fox {flags}--v 7"
    assert harness.recorder.warned == warned


@pytest.mark.parametrize(
    ("prompt", "line", "warned"),
    [
        ("a fox --stylize 50 --chaos 10", "a fox --stylize 50 --chaos 10", False),
        ("a fox --s 50 --w 1 --stylize 70", "a fox --stylize 70 --weird 1", False),
        ("a fox --style raw --tile", "a fox --style raw --tile", False),
        ("a fox --stylize 50 in the snow", "a fox in the snow --stylize 50", False),
        ("a fox --ar 16:9", "a fox", True),
        ("a fox --AR 16:9 --weird 3", "a fox --weird 3", True),
        ("a fox --v 5 --repeat 10 --seed 1", "a fox", True),
        ("a fox --stylize 50000", "a fox", True),
        ("a fox --style https://example.com/a.png", "a fox", True),
        ("a fox --no dogs, cats", "a fox", True),
        ("a fox\n--ar 2:1", "a fox", True),
        ("a fox \N{EM DASH}repeat 4", "a fox \N{EM DASH} repeat 4", False),
        ("a well--known fox", "a well-- known fox", False),
        ("a {red, blue} fox", "a (red, blue) fox", True),
    ],
)
async def test_flags_in_a_prompt_pass_only_if_they_are_allowed(
    prompt: str, line: str, *, warned: bool, harness: Harness
) -> None:
    await harness.submit_id(basePrompt=prompt)

    assert harness.line == f"{line} --v 7"
    assert harness.recorder.warned == ({"basePrompt"} if warned else set())


async def test_a_flag_in_a_style_modifier_takes_nothing_else_with_it(harness: Harness) -> None:
    await harness.submit_id(styleModifiers=["--fast", "watercolour --ar 2:1", "soft light"])

    assert harness.line == "a red fox, watercolour, soft light --v 7"
    assert harness.recorder.warned == {"styleModifiers"}


async def test_a_prompt_of_nothing_but_flags_is_refused(harness: Harness) -> None:
    error = await harness.fail(basePrompt="--repeat 40")

    assert (error.code, error.message) == ("invalid_request", "Nothing is left of the prompt without its flags.")
    assert "basePrompt" in error.hint
    assert harness.api.requests == []


async def test_a_previous_image_is_an_example_and_that_is_said(harness: Harness) -> None:
    image = picture(kind="JPEG")
    await harness.submit_id(previous=image)

    (call,) = harness.api.jobs
    (url,) = call.fields["base64Array"]
    assert url.startswith("data:image/jpeg;base64,")
    assert harness.recorder.warned == {"previousImage"}
    assert harness.recorder.requests[0]["base64Array"] == [f"image/jpeg, {len(image)} bytes"]


async def test_a_previous_image_that_discord_would_not_take_is_refused(harness: Harness) -> None:
    error = await harness.fail(previous=bytes(10 * 1024 * 1024 + 1))

    assert error.code == "too_large"
    assert harness.api.requests == []
