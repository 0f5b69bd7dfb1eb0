"""Errors of the Gemini API are refused, retried or of unknown outcome."""

import socket
from datetime import UTC, datetime, timedelta

import pytest

from daemon.errors import OutcomeUnknown, Refused, Retryable
from daemon.providers.google.errors import until_midnight
from tests.fakes.google_api import GoogleAPI, error, quota, reason, retry_in
from tests.fakes.server import Response
from tests.support.provider_harness import ProviderHarness

NEWEST = "gemini-nano-banana-2.1"
Harness = ProviderHarness[GoogleAPI]


@pytest.mark.parametrize(
    ("response", "wait"),
    [
        (error(429, "RESOURCE_EXHAUSTED", "Slow down.", retry_in("37s")), timedelta(seconds=37)),
        (error(429, "RESOURCE_EXHAUSTED", "Slow down.", retry_in("2.5s")), timedelta(seconds=2.5)),
        (error(429, "RESOURCE_EXHAUSTED", "Slow down.", quota("PerMinute"), retry_in("9999s")), timedelta(hours=1)),
        (error(429, "RESOURCE_EXHAUSTED", "Slow down.", retry_after="7"), timedelta(seconds=7)),
        (error(429, "RESOURCE_EXHAUSTED", "Slow down.", retry_in("soon")), None),
        (error(429, "RESOURCE_EXHAUSTED", "Slow down."), None),
    ],
)
async def test_rate_limit_costs_no_attempt_and_waits_as_asked(
    response: Response, wait: timedelta | None, harness: Harness
) -> None:
    harness.api.next(response)

    failed = await harness.fail()

    assert isinstance(failed, Retryable)
    assert (failed.code, failed.accepted) == ("rate_limited", False)
    assert (failed.retry_in, failed.blocks) == (wait, "model" if wait else None)
    assert len(harness.api.requests) == 1


async def test_daily_quota_blocks_the_model_until_midnight(harness: Harness) -> None:
    name = "GenerateRequestsPerDayPerProjectPerModel-FreeTier"
    harness.api.next(error(429, "RESOURCE_EXHAUSTED", "You exceeded your quota.", quota(name), retry_in("12s")))

    failed = await harness.fail()

    assert isinstance(failed, Retryable)
    assert (failed.code, failed.accepted, failed.blocks) == ("quota_daily", False, "model")
    assert failed.retry_in is not None
    assert timedelta(0) < failed.retry_in <= timedelta(hours=1)
    assert failed.data["quota"] == name


def test_googles_day_ends_at_midnight_in_california() -> None:
    assert until_midnight(datetime(2026, 11, 24, 7, 30, tzinfo=UTC)) == timedelta(minutes=30)
    assert until_midnight(datetime(2026, 11, 24, 8, 0, tzinfo=UTC)) == timedelta(hours=24)


@pytest.mark.parametrize(
    "response",
    [
        error(402, "PAYMENT_REQUIRED", "Pay."),
        error(403, "PERMISSION_DENIED", "Billing is disabled.", reason("BILLING_DISABLED")),
        error(429, "RESOURCE_EXHAUSTED", "Your prepayment credits are depleted.", retry_in("7s")),
    ],
)
async def test_missing_credit_blocks_the_provider_without_an_attempt(response: Response, harness: Harness) -> None:
    harness.api.next(response)

    failed = await harness.fail()

    assert isinstance(failed, Retryable)
    assert (failed.code, failed.accepted, failed.blocks) == ("billing", False, "provider")
    assert failed.retry_in == timedelta(minutes=10)


@pytest.mark.parametrize(
    ("response", "code"),
    [
        (error(400, "INVALID_ARGUMENT", "API key not valid.", reason("API_KEY_INVALID")), "authentication"),
        (error(401, "UNAUTHENTICATED", "No."), "authentication"),
        (error(403, "PERMISSION_DENIED", "Your API key was reported as leaked."), "permission"),
        (error(400, "FAILED_PRECONDITION", "User location is not supported for the API use."), "permission"),
        (error(400, "INVALID_ARGUMENT", "Unable to process input image."), "input_image_invalid"),
        (error(400, "INVALID_ARGUMENT", "Something else."), "invalid_request"),
        (error(413, "INVALID_ARGUMENT", "Too much."), "too_large"),
        (error(404, "NOT_FOUND", "models/x is not found."), "unknown_model"),
        (Response(404, b"<html>nginx</html>", {"content-type": "text/html"}), "not_found"),
        (Response(302, b"", {"location": "https://elsewhere.example/"}), "not_found"),
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
    await harness.set_up(GOOGLE_API_KEY="another")

    failed = await harness.fail()

    assert isinstance(failed, Refused)
    assert failed.code == "authentication"
    assert "GOOGLE_API_KEY" in failed.data["cure"]


@pytest.mark.parametrize(
    ("model", "code", "hint"),
    [
        ("gemini-2.5-flash-image-preview", "model_retired", "google:gemini-2.5-flash-image"),
        ("imagen-4.0-generate-001", "model_retired", f"google:{NEWEST}"),
        ("gemini-nano-banana-3", "unknown_model", f"google:{NEWEST}"),
    ],
)
async def test_unknown_model_is_refused_with_a_suggestion(model: str, code: str, hint: str, harness: Harness) -> None:
    failed = await harness.fail(model)

    assert isinstance(failed, Refused)
    assert failed.code == code
    assert hint in failed.hint


@pytest.mark.parametrize("model", ["../files", "x:countTokens?", "tunedModels/1", ""])
async def test_a_name_that_would_make_another_url_is_not_asked(model: str, harness: Harness) -> None:
    harness.model = model

    failed = await harness.fail()

    assert failed.code == "unknown_model"
    assert harness.api.requests == []


@pytest.mark.parametrize("status", [500, 502, 503])
async def test_outage_is_retried_as_the_next_attempt(status: int, harness: Harness) -> None:
    harness.api.next(error(status, "UNAVAILABLE", "The model is overloaded. Please try again later."))

    failed = await harness.fail()
    await harness.make()

    assert isinstance(failed, Retryable)
    assert (failed.code, failed.accepted, failed.blocks) == ("provider_unavailable", True, None)
    assert (failed.own_error, failed.charged, failed.status) == (True, False, status)
    assert "overloaded" in failed.message
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
