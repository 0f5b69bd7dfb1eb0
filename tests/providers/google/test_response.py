"""A response of the Gemini API becomes an image, or the reason for having none."""

import json
import os

import pytest

from daemon.errors import OutcomeUnknown, Refused, Retryable, Undecodable
from daemon.providers.google.models import estimate
from tests.fakes.google_api import GoogleAPI, answered, blocked
from tests.fakes.server import Response, picture, size_of
from tests.support.provider_harness import ProviderHarness

NEWEST = "gemini-nano-banana-2.1"
PRO = "gemini-3-pro-image"
FLASH = "gemini-2.5-flash-image"
Harness = ProviderHarness[GoogleAPI]


async def test_a_prompt_becomes_a_picture_on_disk_with_its_cost(harness: Harness) -> None:
    made = await harness.make(styleModifiers=["watercolour", "soft light"])

    assert size_of(made.path.read_bytes()) == (1024, 1024)
    assert made.cost == pytest.approx(1120 * 30 / 1e6)
    assert made.data["response_id"] == "response-1"
    assert made.data["usage"]["candidatesTokensDetails"] == [{"modality": "IMAGE", "tokenCount": 1120}]
    assert harness.recorder.warnings == []
    (call,) = harness.api.requests
    assert call.path == f"/v1/models/{NEWEST}:generateContent"
    assert call.fields == {
        "contents": [{"parts": [{"text": "a red fox, watercolour, soft light"}], "role": "user"}],
        "generationConfig": {"responseModalities": ["IMAGE"], "imageConfig": {"aspectRatio": "1:1"}},
    }


async def test_thoughts_and_signatures_are_not_in_the_result(harness: Harness) -> None:
    harness.api.drawn = picture((640, 480))

    made = await harness.make()

    assert made.path.read_bytes() == harness.api.drawn
    assert "ignature" not in json.dumps(made.data, default=str)


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


async def test_where_nothing_was_counted_the_cost_is_that_of_the_table(harness: Harness) -> None:
    harness.api.usage = False

    assert (await harness.make()).cost == pytest.approx(0.0336)


async def test_a_cost_that_is_not_known_is_none(harness: Harness) -> None:
    harness.api.usage = False

    assert (await harness.make(quality="hd")).cost is None


@pytest.mark.parametrize("why", ["SAFETY", "OTHER", "BLOCKLIST", "PROHIBITED_CONTENT", "IMAGE_SAFETY"])
async def test_blocked_prompt_with_status_200_is_refused(why: str, harness: Harness) -> None:
    harness.api.next(blocked(why))

    failed = await harness.fail()

    assert isinstance(failed, Refused)
    assert (failed.code, failed.data["stage"], failed.data["reason"]) == ("content_policy", "input", why)
    assert failed.message.startswith("Google refused the prompt (")
    assert len(harness.api.requests) == 1


async def test_the_categories_of_a_refusal_are_named(harness: Harness) -> None:
    harness.api.next(blocked("SAFETY", "HARM_CATEGORY_SEXUALLY_EXPLICIT", "HARM_CATEGORY_HARASSMENT"))

    failed = await harness.fail()

    assert failed.data["categories"] == ["sexually explicit", "harassment"]
    assert failed.message == "Google refused the prompt (sexually explicit, harassment)."


@pytest.mark.parametrize(
    "finish",
    [
        *("SAFETY", "IMAGE_SAFETY", "PROHIBITED_CONTENT", "IMAGE_PROHIBITED_CONTENT", "RECITATION"),
        *("IMAGE_RECITATION", "BLOCKLIST", "SPII", "MODEL_ARMOR", "ESCALATION"),
    ],
)
async def test_a_picture_that_is_withheld_is_final(finish: str, harness: Harness) -> None:
    harness.api.next(answered(finish=finish))

    failed = await harness.fail()

    assert isinstance(failed, Refused)
    assert (failed.code, failed.data["stage"], failed.data["reason"]) == ("content_policy", "output", finish)
    assert failed.cost is None
    assert len(harness.api.requests) == 1


async def test_a_withheld_picture_costs_what_was_counted(harness: Harness) -> None:
    harness.api.next(answered(finish="IMAGE_SAFETY", usage=1120))

    assert (await harness.fail()).cost == pytest.approx(0.0336)


@pytest.mark.parametrize(("finish", "code"), [("PUP_LIMITED_DISABLED", "permission"), ("LANGUAGE", "invalid_request")])
async def test_forbidden_accounts_and_languages_are_refused(finish: str, code: str, harness: Harness) -> None:
    harness.api.next(answered(finish=finish))

    failed = await harness.fail()

    assert isinstance(failed, Refused)
    assert failed.code == code


@pytest.mark.parametrize(
    "response",
    [
        *(answered(finish=finish) for finish in ("NO_IMAGE", "IMAGE_OTHER", "OTHER", "MALFORMED_RESPONSE")),
        *(answered(finish=finish) for finish in ("MAX_TOKENS", "STOP", None)),
        answered({"inlineData": {"mimeType": "image/png", "data": ""}}),
        Response.json(200, {}),
        Response.json(200, {"candidates": []}),
    ],
)
async def test_response_without_a_picture_is_retried(response: Response, harness: Harness) -> None:
    harness.api.next(response)

    failed = await harness.fail()
    await harness.make()

    assert isinstance(failed, Retryable)
    assert (failed.code, failed.accepted) == ("empty_result", True)
    assert len(harness.api.requests) == 2


async def test_words_instead_of_a_picture_are_passed_on(harness: Harness) -> None:
    harness.api.next(answered({"text": "Which colour should the fox have?"}))

    failed = await harness.fail()

    assert failed.code == "empty_result"
    assert "Which colour should the fox have?" in failed.message


async def test_continuation_is_never_requested(harness: Harness) -> None:
    harness.api.next(answered({"text": "to be"}, finish="CONTINUATION", continuationToken="bmV4dA=="))

    failed = await harness.fail()

    assert failed.code == "empty_result"
    assert len(harness.api.requests) == 1


@pytest.mark.parametrize("cut", [0, 40, 1000])
async def test_a_response_that_breaks_off_is_an_unknown_outcome(cut: int, harness: Harness) -> None:
    harness.api.next(Response(headers={"content-type": "application/json"}, cut=cut))

    failed = await harness.fail()

    assert isinstance(failed, OutcomeUnknown)
    assert failed.code == "outcome_unknown"
    assert len(harness.api.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        b'{"candidates": [{"content": {"parts": [{"inlineData": {"data": "iVBORw0KGg',
        b'{"candidates": 7}',
        b"<html>Bad gateway</html>",
        b"[]",
        b"null",
        b"",
    ],
)
async def test_a_response_that_is_damaged_is_an_unknown_outcome(body: bytes, harness: Harness) -> None:
    harness.api.next(Response(200, body, {"content-type": "application/json"}))

    failed = await harness.fail()

    assert isinstance(failed, OutcomeUnknown)


async def test_response_with_a_compression_we_lack_is_kept(harness: Harness) -> None:
    harness.api.next(Response(200, b"\x1b\x03\x00 not ours", {"content-encoding": "br"}))

    failed = await harness.fail()

    assert isinstance(failed, Undecodable)
    assert failed.path.read_bytes() == b"\x1b\x03\x00 not ours"
    assert harness.api.requests[0].headers["accept-encoding"] == "identity"


async def test_a_picture_that_is_too_large_is_not_kept(harness: Harness) -> None:
    harness.api.drawn = bytes(100_000)
    await harness.set_up(IMAGE_JOBS_MAX_IMAGE_BYTES=50_000)

    failed = await harness.fail()

    assert isinstance(failed, Refused)
    assert (failed.code, failed.charged, failed.cost) == ("image_too_large", True, pytest.approx(0.0336))
    assert "larger than 50,000 bytes" in failed.message


async def test_a_large_picture_arrives_byte_for_byte(harness: Harness) -> None:
    harness.api.drawn = picture() + os.urandom(5_000_001)

    made = await harness.make()

    assert made.path.read_bytes() == harness.api.drawn
