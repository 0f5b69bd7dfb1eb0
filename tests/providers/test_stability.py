import os
import socket
from collections.abc import AsyncIterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pytest

from daemon.errors import OutcomeUnknown, Refused, Retryable
from daemon.providers import create, models
from daemon.providers.catalogue import resolve
from daemon.settings import Settings
from tests.fakes.server import Response, picture, size_of
from tests.fakes.stability_api import KEY, StabilityAPI, drawn, error
from tests.support.provider_harness import ProviderHarness

LARGE = "sd3.5-large"
TURBO = "sd3.5-large-turbo"
TODAY = date(2026, 11, 24)
Harness = ProviderHarness[StabilityAPI]


@pytest.fixture(scope="module")
async def api() -> AsyncIterator[StabilityAPI]:
    async with StabilityAPI() as api:
        yield api


@pytest.fixture
async def harness(api: StabilityAPI, tmp_path: Path) -> AsyncIterator[Harness]:
    api.reset()
    harness = Harness("stability", "core", KEY, api, tmp_path)
    yield harness
    await harness.provider.aclose()


def sent(harness: Harness) -> dict[str, Any]:
    """The fields of the one request that was made."""
    (call,) = harness.api.requests
    return call.fields


def test_without_a_key_there_is_no_provider() -> None:
    assert create("stability", Settings(_env_file=None, STABILITY_API_KEY="")) is None


@pytest.mark.parametrize(
    ("model", "endpoint", "more", "cost"),
    [
        ("core", "core", {}, 0.03),
        ("ultra", "ultra", {}, 0.08),
        (LARGE, "sd3", {"model": LARGE}, 0.065),
        (TURBO, "sd3", {"model": TURBO}, 0.04),
        ("sd3.5-medium", "sd3", {"model": "sd3.5-medium"}, 0.035),
        ("sd3.5-flash", "sd3", {"model": "sd3.5-flash"}, 0.025),
    ],
)
async def test_a_prompt_becomes_a_picture_on_disk_with_its_cost(
    model: str, endpoint: str, more: dict[str, str], cost: float, harness: Harness
) -> None:
    made = await harness.make(model, styleModifiers=["watercolour"])

    assert size_of(made.path.read_bytes()) == (1024, 1024)
    assert made.cost == pytest.approx(cost)
    assert harness.recorder.estimates == [pytest.approx(cost)]
    assert made.data == {"request_id": "request-1", "seed": "343940597"}
    assert harness.recorder.warnings == []
    (call,) = harness.api.requests
    assert call.path == f"/v2beta/stable-image/generate/{endpoint}"
    assert call.headers["accept"] == "image/*"
    assert call.headers["content-type"].startswith("multipart/form-data")
    assert call.fields == {
        "prompt": "a red fox, watercolour",
        "output_format": "png",
        "aspect_ratio": "1:1",
        **more,
    }


async def test_the_exact_request_is_reported_without_secrets(harness: Harness) -> None:
    await harness.make(LARGE, seed=7, negativePrompt="text")

    assert harness.recorder.requests == [{"endpoint": "v2beta/stable-image/generate/sd3", **sent(harness)}]


@pytest.mark.parametrize(
    ("spec", "ratio", "warned"),
    [
        ({"size": "1024x1024"}, "1:1", set()),
        ({"size": "1792x1024"}, "16:9", {"size"}),
        ({"size": "512x512"}, "1:1", {"size"}),
        ({"size": "1000x4000"}, "9:21", {"size"}),
        *(({"aspectRatio": ratio}, ratio, set()) for ratio in ("16:9", "21:9", "2:3", "3:2", "4:5", "5:4", "9:16")),
        ({"aspectRatio": "4:3"}, "5:4", {"aspectRatio"}),
        ({"aspectRatio": "8:1"}, "21:9", {"aspectRatio"}),
        ({"size": "1024x1024", "aspectRatio": "16:9"}, "1:1", {"aspectRatio"}),
    ],
)
async def test_sizes_and_ratios_become_what_the_model_draws(
    spec: dict[str, Any], ratio: str, warned: set[str], harness: Harness
) -> None:
    await harness.make(**spec)

    assert sent(harness)["aspect_ratio"] == ratio
    assert harness.recorder.warned == warned


@pytest.mark.parametrize(
    ("seed", "used", "warned"),
    [
        (0, "0", {"seed"}),
        (7, "7", set()),
        (4_294_967_294, "4294967294", set()),
        (4_294_967_300, "5", {"seed"}),
    ],
)
async def test_a_seed_is_sent_and_what_it_cannot_be_is_said(
    seed: int, used: str, warned: set[str], harness: Harness
) -> None:
    made = await harness.make(seed=seed)

    assert sent(harness)["seed"] == used
    assert made.data["seed"] == used
    assert harness.recorder.warned == warned


@pytest.mark.parametrize(
    ("quality", "warned"), [("standard", set()), ("auto", set()), ("hd", {"quality"}), ("low", {"quality"})]
)
async def test_there_is_no_quality_and_that_is_said(quality: str, warned: set[str], harness: Harness) -> None:
    await harness.make(quality=quality)

    assert "quality" not in sent(harness)
    assert harness.recorder.warned == warned


@pytest.mark.parametrize("model", ["core", "ultra", LARGE, "sd3.5-medium"])
async def test_a_negative_prompt_has_a_field_of_its_own(model: str, harness: Harness) -> None:
    await harness.make(model, negativePrompt="text, frames")

    assert (sent(harness)["prompt"], sent(harness)["negative_prompt"]) == ("a red fox", "text, frames")
    assert harness.recorder.warnings == []


@pytest.mark.parametrize("model", [TURBO, "sd3.5-flash"])
async def test_negative_prompt_is_folded_in_with_a_warning(model: str, harness: Harness) -> None:
    await harness.make(model, negativePrompt="text, frames")

    assert sent(harness)["prompt"] == "a red fox\n\nAvoid: text, frames"
    assert "negative_prompt" not in sent(harness)
    assert harness.recorder.warned == {"negativePrompt"}


async def test_prompts_that_are_too_long_are_cut_and_that_is_said(harness: Harness) -> None:
    await harness.make(basePrompt="x" * 12_000, negativePrompt="y" * 11_000)

    assert (len(sent(harness)["prompt"]), len(sent(harness)["negative_prompt"])) == (10_000, 10_000)
    assert harness.recorder.warned == {"basePrompt", "negativePrompt"}


@pytest.mark.parametrize(("model", "mode"), [("ultra", None), (LARGE, "image-to-image"), (TURBO, "image-to-image")])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
async def test_a_previous_image_is_refined(model: str, mode: str | None, kind: str, harness: Harness) -> None:
    previous = picture((96, 64), kind)

    await harness.make(model, previous=previous)

    (call,) = harness.api.requests
    assert (call.image, call.image_type) == (previous, f"image/{kind.lower()}")
    assert (call.fields["strength"], call.fields.get("mode")) == ("0.6", mode)
    assert "aspect_ratio" not in call.fields
    assert harness.recorder.requests[0]["image"] == f"image/{kind.lower()}, {len(previous)} bytes"
    assert harness.recorder.warnings == []


@pytest.mark.parametrize(
    ("spec", "warned"), [({"aspectRatio": "16:9"}, {"aspectRatio"}), ({"size": "1792x1024"}, {"size"})]
)
async def test_a_refined_picture_keeps_its_shape_and_that_is_said(
    spec: dict[str, str], warned: set[str], harness: Harness
) -> None:
    await harness.make("ultra", previous=picture(), **spec)

    assert harness.recorder.warned == warned


@pytest.mark.parametrize(
    ("model", "previous", "code"),
    [
        ("core", picture(), "invalid_request"),
        ("ultra", picture(kind="GIF"), "input_image_invalid"),
        (LARGE, picture() + bytes(10 * 1024 * 1024), "too_large"),
    ],
)
async def test_unusable_previous_image_is_refused_before_sending(
    model: str, previous: bytes, code: str, harness: Harness
) -> None:
    failed = await harness.fail(model, previous=previous)

    assert isinstance(failed, Refused)
    assert failed.code == code
    assert failed.hint
    assert harness.api.requests == []


async def test_a_prompt_that_is_moderated_is_final_and_costs_nothing(harness: Harness) -> None:
    harness.api.next(error(403, "content_moderation", "Your request was flagged by our content moderation system."))

    failed = await harness.fail()

    assert isinstance(failed, Refused)
    assert (failed.code, failed.data["stage"], failed.cost) == ("content_policy", "input", None)
    assert failed.data["request_id"] == "error-1"
    assert len(harness.api.requests) == 1


async def test_filtered_picture_is_refused_with_its_cost(harness: Harness) -> None:
    harness.api.next(drawn(picture(), finish_reason="CONTENT_FILTERED"))

    failed = await harness.fail("ultra")

    assert isinstance(failed, Refused)
    assert (failed.code, failed.data["stage"]) == ("content_policy", "output")
    assert failed.cost == pytest.approx(0.08)
    assert len(harness.api.requests) == 1


async def test_missing_credit_blocks_the_provider_without_an_attempt(harness: Harness) -> None:
    harness.api.next(error(402, "payment_required", "You lack sufficient credits."))

    failed = await harness.fail()

    assert isinstance(failed, Retryable)
    assert (failed.code, failed.accepted, failed.blocks) == ("billing", False, "provider")
    assert failed.retry_in == timedelta(minutes=10)


@pytest.mark.parametrize(("headers", "seconds"), [({}, 60), ({"retry_after": "9"}, 9), ({"retry_after": "soon"}, 60)])
async def test_rate_limit_blocks_the_provider_for_a_minute(
    headers: dict[str, str], seconds: int, harness: Harness
) -> None:
    harness.api.next(error(429, "rate_limit_exceeded", "You have exceeded 150 requests in 10 seconds.", **headers))

    failed = await harness.fail()

    assert isinstance(failed, Retryable)
    assert (failed.code, failed.accepted, failed.blocks) == ("rate_limited", False, "provider")
    assert failed.retry_in == timedelta(seconds=seconds)
    assert len(harness.api.requests) == 1


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (error(400, "bad_request", "prompt: is not valid"), "invalid_request"),
        (error(400, "bad_request", "image: is too small"), "input_image_invalid"),
        (error(400, "bad_request", "model: must be one of sd3.5-large"), "unknown_model"),
        (error(401, "unauthorized", "authorization: invalid"), "authentication"),
        (error(403, "forbidden", "Not for you."), "permission"),
        (error(404, "not_found", "No."), "not_found"),
        (error(413, "payload_too_large", "request: body exceeds 10MiB"), "too_large"),
        (error(422, "invalid_language", "English is the only supported language."), "invalid_request"),
        (Response(301, b"", {"location": "https://elsewhere.example/"}), "not_found"),
        (Response(400, b"<html>" + b"x" * 100_000), "invalid_request"),
        (Response.json(400, ["what"]), "invalid_request"),
    ],
)
async def test_client_errors_are_not_retried(response: Response, code: str, harness: Harness) -> None:
    harness.api.next(response)

    failed = await harness.fail()

    assert isinstance(failed, Refused)
    assert failed.code == code
    assert failed.hint
    assert failed.data["status"] == response.status
    assert len(harness.api.requests) == 1


async def test_a_wrong_key_is_refused_with_a_cure(harness: Harness) -> None:
    await harness.set_up(STABILITY_API_KEY="another")

    failed = await harness.fail()

    assert isinstance(failed, Refused)
    assert failed.code == "authentication"
    assert "STABILITY_API_KEY" in failed.data["cure"]


async def test_unknown_model_is_refused_with_a_suggestion(harness: Harness) -> None:
    failed = await harness.fail("sd3.5-larger")

    assert isinstance(failed, Refused)
    assert failed.code == "unknown_model"
    assert failed.hint == "Did you mean stability:sd3.5-large?"


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_outage_is_retried_as_the_next_attempt(status: int, harness: Harness) -> None:
    harness.api.next(error(status, "internal_error", "An unexpected server error has occurred."))

    failed = await harness.fail()
    await harness.make()

    assert isinstance(failed, Retryable)
    assert (failed.code, failed.accepted, failed.blocks) == ("provider_unavailable", True, None)
    assert (failed.own_error, failed.charged, failed.status) == (True, False, status)
    assert len(harness.api.requests) == 2


async def test_a_server_that_cannot_be_reached_never_got_the_request(harness: Harness) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    await harness.set_up(f"http://127.0.0.1:{port}")

    failed = await harness.fail()

    assert isinstance(failed, Retryable)
    assert (failed.code, failed.accepted) == ("unreachable", False)


async def test_timeout_after_sending_is_an_unknown_outcome(harness: Harness) -> None:
    harness.api.hold()
    await harness.set_up(IMAGE_JOBS_RUN_TIMEOUT="0.3")

    failed = await harness.fail()

    assert isinstance(failed, OutcomeUnknown)
    assert "in time" in failed.message
    assert len(harness.api.requests) == 1


@pytest.mark.parametrize("cut", [0, 50])
async def test_a_picture_that_breaks_off_is_an_unknown_outcome(cut: int, harness: Harness) -> None:
    harness.api.next(Response(headers={"content-type": "image/png"}, cut=cut))

    failed = await harness.fail()

    assert isinstance(failed, OutcomeUnknown)
    assert failed.code == "outcome_unknown"
    assert len(harness.api.requests) == 1


async def test_a_response_that_is_no_picture_is_an_unknown_outcome(harness: Harness) -> None:
    harness.api.next(drawn(b"<html>Bad gateway</html>", kind="text/html"))

    assert isinstance(await harness.fail(), OutcomeUnknown)


async def test_an_empty_picture_is_tried_again(harness: Harness) -> None:
    harness.api.next(drawn(b""))

    failed = await harness.fail()

    assert isinstance(failed, Retryable)
    assert failed.code == "empty_result"


async def test_a_picture_that_is_too_large_is_not_kept(harness: Harness) -> None:
    harness.api.drawn = picture() + bytes(100_000)
    await harness.set_up(IMAGE_JOBS_MAX_IMAGE_BYTES=50_000)

    failed = await harness.fail()

    assert isinstance(failed, Refused)
    assert (failed.code, failed.charged, failed.cost) == ("image_too_large", True, 0.03)
    assert "larger than 50,000 bytes" in failed.message


async def test_a_large_picture_arrives_byte_for_byte(harness: Harness) -> None:
    harness.api.drawn = picture() + os.urandom(5_000_001)

    made = await harness.make()

    assert made.path.read_bytes() == harness.api.drawn


@pytest.mark.parametrize(
    ("model", "successor"),
    [
        ("stable-diffusion-3", LARGE),
        ("sd3-large-turbo", TURBO),
        ("sd3-medium", "sd3.5-medium"),
        ("stable-diffusion-xl", "core"),
        ("stable-diffusion-xl-1024-v1-0", "core"),
    ],
)
def test_retired_model_is_replaced_by_its_successor(model: str, successor: str) -> None:
    found = resolve(f"stability:{model}", strict=False, today=TODAY)

    assert (found.requested, found.model) == (model, successor)
    assert found.warning is not None
    assert found.warning.startswith(f"{model} was retired on 202")


def test_stability_alone_means_core() -> None:
    assert resolve("stability", strict=True, today=TODAY).model == "core" == models("stability")[0].name
