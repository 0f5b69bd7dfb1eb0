import json
import os
import socket
from collections.abc import AsyncIterator
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from daemon.errors import OutcomeUnknown, Refused, Retryable
from daemon.providers import create, models
from daemon.providers.catalogue import resolve
from daemon.providers.google_errors import until_midnight
from daemon.providers.google_models import estimate
from daemon.settings import Settings
from tests.fakes.google_api import KEY, GoogleAPI, answered, blocked, encoded, error, quota, reason, retry_in
from tests.fakes.server import Answer, picture, size_of
from tests.provider_studio import ProviderStudio

NEWEST = "gemini-nano-banana-2.1"
PRO = "gemini-3-pro-image"
FLASH = "gemini-2.5-flash-image"
TODAY = date(2026, 11, 24)
Studio = ProviderStudio[GoogleAPI]


@pytest.fixture(scope="module")
async def api() -> AsyncIterator[GoogleAPI]:
    async with GoogleAPI() as api:
        yield api


@pytest.fixture
async def studio(api: GoogleAPI, tmp_path: Path) -> AsyncIterator[Studio]:
    api.reset()
    studio = Studio("google", NEWEST, KEY, api, tmp_path)
    yield studio
    await studio.provider.aclose()


def sent(studio: Studio) -> dict[str, Any]:
    """The configuration of the one request that was made."""
    (call,) = studio.api.requests
    return call.fields["generationConfig"]


@pytest.mark.parametrize("variable", ["GOOGLE_API_KEY", "GEMINI_API_KEY"])
async def test_the_key_has_two_names(variable: str) -> None:
    made = create("google", Settings(_env_file=None, **{variable: "a key"}))
    assert made is not None
    await made.aclose()


async def test_of_two_keys_the_first_counts(studio: Studio) -> None:
    await studio.set_up(GEMINI_API_KEY="another")

    await studio.make()


def test_without_a_key_there_is_no_provider() -> None:
    assert create("google", Settings(_env_file=None, GOOGLE_API_KEY="", GEMINI_API_KEY="")) is None


async def test_a_prompt_becomes_a_picture_on_disk_with_its_cost(studio: Studio) -> None:
    made = await studio.make(styleModifiers=["watercolour", "soft light"])

    assert size_of(made.path.read_bytes()) == (1024, 1024)
    assert made.cost == pytest.approx(1120 * 30 / 1e6)
    assert made.data["response_id"] == "response-1"
    assert made.data["usage"]["candidatesTokensDetails"] == [{"modality": "IMAGE", "tokenCount": 1120}]
    assert studio.recorder.warnings == []
    (call,) = studio.api.requests
    assert call.path == f"/v1/models/{NEWEST}:generateContent"
    assert call.fields == {
        "contents": [{"parts": [{"text": "a red fox, watercolour, soft light"}], "role": "user"}],
        "generationConfig": {"responseModalities": ["IMAGE"], "imageConfig": {"aspectRatio": "1:1"}},
    }


async def test_the_exact_request_is_reported_without_secrets_and_with_an_estimate(studio: Studio) -> None:
    await studio.make(aspectRatio="16:9", quality="hd", seed=7)

    assert studio.recorder.requests == [{"model": NEWEST, **studio.api.requests[0].fields}]
    assert studio.recorder.estimates == [None]
    assert estimate(NEWEST, "1K") == pytest.approx(0.0336)


async def test_thoughts_and_signatures_are_neither_the_picture_nor_in_its_data(studio: Studio) -> None:
    studio.api.drawn = picture((640, 480))

    made = await studio.make()

    assert made.path.read_bytes() == studio.api.drawn
    assert "ignature" not in json.dumps(made.data, default=str)


@pytest.mark.parametrize(
    ("kind", "content_type"), [("PNG", "image/png"), ("JPEG", "image/jpeg"), ("WEBP", "image/webp")]
)
async def test_a_previous_image_goes_along_as_a_part(kind: str, content_type: str, studio: Studio) -> None:
    previous = picture(kind=kind)

    await studio.make(previous=previous)

    text, image = studio.api.requests[0].fields["contents"][0]["parts"]
    assert text == {"text": "a red fox"}
    assert image["inlineData"]["mime_type"] == content_type
    reported = studio.recorder.requests[0]["contents"][0]["parts"][1]
    assert reported == {"inlineData": f"{content_type}, {len(previous)} bytes"}


async def test_a_large_previous_image_goes_along_too(studio: Studio) -> None:
    previous = picture() + bytes(5_000_000)

    await studio.make(previous=previous)

    assert len(studio.api.requests) == 1


@pytest.mark.parametrize(
    ("previous", "code"), [(picture(kind="GIF"), "input_image_invalid"), (picture() + bytes(15_000_000), "too_large")]
)
async def test_a_previous_image_that_google_cannot_take_is_refused_before_anything_is_sent(
    previous: bytes, code: str, studio: Studio
) -> None:
    failed = await studio.fail(previous=previous)

    assert isinstance(failed, Refused)
    assert failed.code == code
    assert studio.api.requests == []


async def test_a_damaged_previous_image_is_final(studio: Studio) -> None:
    failed = await studio.fail(previous=b"\x89PNG\r\n\x1a\n and then nothing")

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
    model: str, spec: dict[str, Any], drawn: tuple[str, str | None], warned: set[str], studio: Studio
) -> None:
    await studio.make(model, **spec)

    image = sent(studio)["imageConfig"]
    assert (image["aspectRatio"], image.get("imageSize")) == drawn
    assert studio.recorder.warned == warned


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
    model: str, quality: str, size: str | None, warned: set[str], studio: Studio
) -> None:
    await studio.make(model, quality=quality, aspectRatio="1:1")

    assert sent(studio)["imageConfig"].get("imageSize") == size
    assert studio.recorder.warned == warned


async def test_hd_makes_more_pixels_than_the_size_says_and_that_is_said(studio: Studio) -> None:
    await studio.make(quality="hd", size="1024x1024")

    assert sent(studio)["imageConfig"]["imageSize"] == "2K"
    assert studio.recorder.warned == {"size"}


@pytest.mark.parametrize(("seed", "used"), [(0, 0), (7, 7), (2**31 - 1, 2**31 - 1), (2**31 + 5, 5)])
async def test_a_seed_is_sent_and_said_to_be_no_promise(seed: int, used: int, studio: Studio) -> None:
    await studio.make(seed=seed)

    assert sent(studio)["seed"] == used
    assert len(studio.recorder.warnings) == (1 if seed == used else 2)
    assert studio.recorder.warned == {"seed"}


async def test_a_negative_prompt_is_folded_in_and_that_is_said(studio: Studio) -> None:
    await studio.make(negativePrompt="text, frames")

    (part,) = studio.api.requests[0].fields["contents"][0]["parts"]
    assert part["text"] == "a red fox\n\nAvoid: text, frames"
    assert studio.recorder.warned == {"negativePrompt"}


async def test_a_prompt_that_is_too_long_is_cut_but_keeps_what_to_avoid(studio: Studio) -> None:
    await studio.make(basePrompt="x" * 32_000, styleModifiers=["soft"], negativePrompt="text")

    (part,) = studio.api.requests[0].fields["contents"][0]["parts"]
    assert len(part["text"]) == 32_000
    assert part["text"].endswith("x\n\nAvoid: text")
    assert studio.recorder.warned == {"negativePrompt", "basePrompt"}


@pytest.mark.parametrize(
    ("model", "size", "price"),
    [
        (NEWEST, "1K", 0.0336),
        ("gemini-3.1-flash-lite-image", "1K", 0.0336),
        ("gemini-3.1-flash-image", "1K", 0.0672),
        (PRO, "1K", 0.134),
        (PRO, "2K", 0.134),
        (PRO, "4K", 0.24),
        (FLASH, "1K", 0.039),
    ],
)
def test_estimates_are_the_published_prices(model: str, size: str, price: float) -> None:
    assert estimate(model, size) == pytest.approx(price, rel=0.01)


async def test_where_nothing_was_counted_the_cost_is_that_of_the_table(studio: Studio) -> None:
    studio.api.usage = False

    assert (await studio.make()).cost == pytest.approx(0.0336)


async def test_a_cost_that_is_not_known_is_none(studio: Studio) -> None:
    studio.api.usage = False

    assert (await studio.make(quality="hd")).cost is None


@pytest.mark.parametrize("why", ["SAFETY", "OTHER", "BLOCKLIST", "PROHIBITED_CONTENT", "IMAGE_SAFETY"])
async def test_a_prompt_that_is_blocked_is_final_although_the_status_is_200(why: str, studio: Studio) -> None:
    studio.api.next(blocked(why))

    failed = await studio.fail()

    assert isinstance(failed, Refused)
    assert (failed.code, failed.data["stage"], failed.data["reason"]) == ("content_policy", "input", why)
    assert failed.message.startswith("Google refused the prompt (")
    assert len(studio.api.requests) == 1


async def test_the_categories_of_a_refusal_are_named(studio: Studio) -> None:
    studio.api.next(blocked("SAFETY", "HARM_CATEGORY_SEXUALLY_EXPLICIT", "HARM_CATEGORY_HARASSMENT"))

    failed = await studio.fail()

    assert failed.data["categories"] == ["sexually explicit", "harassment"]
    assert failed.message == "Google refused the prompt (sexually explicit, harassment)."


@pytest.mark.parametrize(
    "finish",
    [
        *("SAFETY", "IMAGE_SAFETY", "PROHIBITED_CONTENT", "IMAGE_PROHIBITED_CONTENT", "RECITATION"),
        *("IMAGE_RECITATION", "BLOCKLIST", "SPII", "MODEL_ARMOR", "ESCALATION"),
    ],
)
async def test_a_picture_that_is_withheld_is_final(finish: str, studio: Studio) -> None:
    studio.api.next(answered(finish=finish))

    failed = await studio.fail()

    assert isinstance(failed, Refused)
    assert (failed.code, failed.data["stage"], failed.data["reason"]) == ("content_policy", "output", finish)
    assert failed.cost is None
    assert len(studio.api.requests) == 1


async def test_a_withheld_picture_costs_what_was_counted(studio: Studio) -> None:
    studio.api.next(answered(finish="IMAGE_SAFETY", usage=1120))

    assert (await studio.fail()).cost == pytest.approx(0.0336)


@pytest.mark.parametrize(("finish", "code"), [("PUP_LIMITED_DISABLED", "permission"), ("LANGUAGE", "invalid_request")])
async def test_what_the_account_or_the_language_forbids_is_final(finish: str, code: str, studio: Studio) -> None:
    studio.api.next(answered(finish=finish))

    failed = await studio.fail()

    assert isinstance(failed, Refused)
    assert failed.code == code


@pytest.mark.parametrize(
    "answer",
    [
        *(answered(finish=finish) for finish in ("NO_IMAGE", "IMAGE_OTHER", "OTHER", "MALFORMED_RESPONSE")),
        *(answered(finish=finish) for finish in ("MAX_TOKENS", "STOP", None)),
        answered({"inlineData": {"mimeType": "image/png", "data": encoded(picture())}, "thought": True}),
        answered({"inlineData": {"mimeType": "image/png", "data": ""}}),
        Answer.json(200, {}),
        Answer.json(200, {"candidates": []}),
    ],
)
async def test_an_answer_without_a_picture_is_tried_again(answer: Answer, studio: Studio) -> None:
    studio.api.next(answer)

    failed = await studio.fail()
    await studio.make()

    assert isinstance(failed, Retryable)
    assert (failed.code, failed.accepted) == ("empty_result", True)
    assert len(studio.api.requests) == 2


async def test_words_instead_of_a_picture_are_passed_on(studio: Studio) -> None:
    studio.api.next(answered({"text": "Which colour should the fox have?"}))

    failed = await studio.fail()

    assert failed.code == "empty_result"
    assert "Which colour should the fox have?" in failed.message


async def test_an_answer_that_wants_to_be_continued_is_not_continued_in_secret(studio: Studio) -> None:
    studio.api.next(answered({"text": "to be"}, finish="CONTINUATION", continuationToken="bmV4dA=="))

    failed = await studio.fail()

    assert failed.code == "empty_result"
    assert len(studio.api.requests) == 1


@pytest.mark.parametrize(
    ("answer", "wait"),
    [
        (error(429, "RESOURCE_EXHAUSTED", "Slow down.", retry_in("37s")), timedelta(seconds=37)),
        (error(429, "RESOURCE_EXHAUSTED", "Slow down.", retry_in("2.5s")), timedelta(seconds=2.5)),
        (error(429, "RESOURCE_EXHAUSTED", "Slow down.", quota("PerMinute"), retry_in("9999s")), timedelta(hours=1)),
        (error(429, "RESOURCE_EXHAUSTED", "Slow down.", retry_after="7"), timedelta(seconds=7)),
        (error(429, "RESOURCE_EXHAUSTED", "Slow down.", retry_in("soon")), None),
        (error(429, "RESOURCE_EXHAUSTED", "Slow down."), None),
    ],
)
async def test_a_rate_limit_gives_the_attempt_back_and_waits_as_long_as_asked(
    answer: Answer, wait: timedelta | None, studio: Studio
) -> None:
    studio.api.next(answer)

    failed = await studio.fail()

    assert isinstance(failed, Retryable)
    assert (failed.code, failed.accepted) == ("rate_limited", False)
    assert (failed.retry_in, failed.blocks) == (wait, "model" if wait else None)
    assert len(studio.api.requests) == 1


async def test_a_used_up_quota_of_the_day_closes_the_model_until_it_is_filled_again(studio: Studio) -> None:
    name = "GenerateRequestsPerDayPerProjectPerModel-FreeTier"
    studio.api.next(error(429, "RESOURCE_EXHAUSTED", "You exceeded your quota.", quota(name), retry_in("12s")))

    failed = await studio.fail()

    assert isinstance(failed, Retryable)
    assert (failed.code, failed.accepted, failed.blocks) == ("quota_daily", False, "model")
    assert failed.retry_in is not None
    assert timedelta(0) < failed.retry_in <= timedelta(hours=1)
    assert failed.data["quota"] == name


def test_googles_day_ends_at_midnight_in_california() -> None:
    assert until_midnight(datetime(2026, 11, 24, 7, 30, tzinfo=UTC)) == timedelta(minutes=30)
    assert until_midnight(datetime(2026, 11, 24, 8, 0, tzinfo=UTC)) == timedelta(hours=24)


@pytest.mark.parametrize(
    "answer",
    [
        error(402, "PAYMENT_REQUIRED", "Pay."),
        error(403, "PERMISSION_DENIED", "Billing is disabled.", reason("BILLING_DISABLED")),
        error(429, "RESOURCE_EXHAUSTED", "Your prepayment credits are depleted.", retry_in("7s")),
    ],
)
async def test_an_empty_account_closes_the_provider_and_costs_no_attempt(answer: Answer, studio: Studio) -> None:
    studio.api.next(answer)

    failed = await studio.fail()

    assert isinstance(failed, Retryable)
    assert (failed.code, failed.accepted, failed.blocks) == ("billing", False, "provider")
    assert failed.retry_in == timedelta(minutes=10)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (error(400, "INVALID_ARGUMENT", "API key not valid.", reason("API_KEY_INVALID")), "authentication"),
        (error(401, "UNAUTHENTICATED", "No."), "authentication"),
        (error(403, "PERMISSION_DENIED", "Your API key was reported as leaked."), "permission"),
        (error(400, "FAILED_PRECONDITION", "User location is not supported for the API use."), "permission"),
        (error(400, "INVALID_ARGUMENT", "Unable to process input image."), "input_image_invalid"),
        (error(400, "INVALID_ARGUMENT", "Something else."), "invalid_request"),
        (error(413, "INVALID_ARGUMENT", "Too much."), "too_large"),
        (error(404, "NOT_FOUND", "models/x is not found."), "unknown_model"),
        (Answer(404, b"<html>nginx</html>", {"content-type": "text/html"}), "not_found"),
        (Answer(302, b"", {"location": "https://elsewhere.example/"}), "not_found"),
        (Answer.json(400, ["what"]), "invalid_request"),
    ],
)
async def test_what_asking_again_cannot_change_is_final(answer: Answer, code: str, studio: Studio) -> None:
    studio.api.next(answer)

    failed = await studio.fail()

    assert isinstance(failed, Refused)
    assert failed.code == code
    assert failed.hint
    assert failed.data["status"] == answer.status
    assert len(studio.api.requests) == 1


async def test_a_wrong_key_is_refused_with_a_cure(studio: Studio) -> None:
    await studio.set_up(GOOGLE_API_KEY="another")

    failed = await studio.fail()

    assert isinstance(failed, Refused)
    assert failed.code == "authentication"
    assert "GOOGLE_API_KEY" in failed.hint


@pytest.mark.parametrize(
    ("model", "code", "hint"),
    [
        ("gemini-2.5-flash-image-preview", "model_retired", "google:gemini-2.5-flash-image"),
        ("imagen-4.0-generate-001", "model_retired", f"google:{NEWEST}"),
        ("gemini-nano-banana-3", "unknown_model", f"google:{NEWEST}"),
    ],
)
async def test_a_model_that_is_not_there_is_refused_with_what_to_use_instead(
    model: str, code: str, hint: str, studio: Studio
) -> None:
    failed = await studio.fail(model)

    assert isinstance(failed, Refused)
    assert failed.code == code
    assert hint in failed.hint


@pytest.mark.parametrize("model", ["../files", "x:countTokens?", "tunedModels/1", ""])
async def test_a_name_that_would_make_another_url_is_not_asked(model: str, studio: Studio) -> None:
    studio.model = model

    failed = await studio.fail()

    assert failed.code == "unknown_model"
    assert studio.api.requests == []


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408, 499])
async def test_an_outage_is_tried_again_as_the_next_attempt_and_then_succeeds(status: int, studio: Studio) -> None:
    studio.api.next(error(status, "UNAVAILABLE", "The model is overloaded. Please try again later."))

    failed = await studio.fail()
    await studio.make()

    assert isinstance(failed, Retryable)
    assert (failed.code, failed.accepted, failed.blocks) == ("provider_unavailable", True, None)
    assert "overloaded" in failed.message
    assert len(studio.api.requests) == 2


async def test_a_server_that_cannot_be_reached_never_got_the_request(studio: Studio) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    await studio.set_up(f"http://127.0.0.1:{port}")

    failed = await studio.fail()

    assert isinstance(failed, Retryable)
    assert (failed.code, failed.accepted) == ("unreachable", False)


async def test_silence_after_the_request_was_sent_is_an_unknown_outcome_and_is_not_repeated(studio: Studio) -> None:
    studio.api.hold()
    await studio.set_up(IMAGE_JOBS_RUN_TIMEOUT="0.3")

    failed = await studio.fail()

    assert isinstance(failed, OutcomeUnknown)
    assert "in time" in failed.message
    assert len(studio.api.requests) == 1


@pytest.mark.parametrize("cut", [0, 40, 1000])
async def test_an_answer_that_breaks_off_is_an_unknown_outcome(cut: int, studio: Studio) -> None:
    studio.api.next(Answer(headers={"content-type": "application/json"}, cut=cut))

    failed = await studio.fail()

    assert isinstance(failed, OutcomeUnknown)
    assert failed.code == "outcome_unknown"
    assert len(studio.api.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"candidates": [{"content": {"parts": [{"inlineData": {"data": "iVBORw0KGg',
        b'{"candidates": [{"content": {"parts": [{"inlineData": {"data": "***"}}]}}]}',
        b'{"candidates": 7}',
        b"<html>Bad gateway</html>",
        b"[]",
        b"null",
        b"",
        b'{"x": "' + b"x" * 16_100_000 + b'"}',
    ],
)
async def test_an_answer_that_is_damaged_is_an_unknown_outcome(body: bytes, studio: Studio) -> None:
    studio.api.next(Answer(200, body, {"content-type": "application/json"}))

    failed = await studio.fail()

    assert isinstance(failed, OutcomeUnknown)


async def test_an_answer_that_is_compressed_is_not_read(studio: Studio) -> None:
    studio.api.next(Answer(200, b"{}", {"content-encoding": "br"}))

    assert isinstance(await studio.fail(), OutcomeUnknown)
    assert studio.api.requests[0].headers["accept-encoding"] == "identity"


async def test_a_picture_that_is_too_large_is_not_kept(studio: Studio) -> None:
    studio.api.drawn = bytes(100_000)
    await studio.set_up(IMAGE_JOBS_MAX_IMAGE_BYTES=50_000)

    failed = await studio.fail()

    assert isinstance(failed, OutcomeUnknown)
    assert "larger than 50,000 bytes" in failed.message


async def test_a_large_picture_arrives_byte_for_byte(studio: Studio) -> None:
    studio.api.drawn = os.urandom(5_000_001)

    made = await studio.make()

    assert made.path.read_bytes() == studio.api.drawn


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
def test_a_retired_model_is_replaced_by_its_successor_and_that_is_said(model: str, successor: str) -> None:
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
