"""What OpenAI answers when there is no picture, and what we make of it."""

import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, cast

import httpx2
from openai import APIError, APIStatusError

from daemon.errors import Refused, RunError
from daemon.providers import vendor
from daemon.providers.vendor import Facts, Vendor, as_object, capped, retry_after

OPENAI = Vendor(
    "OpenAI",
    provider="openai",
    key="OPENAI_API_KEY",
    address="OPENAI_BASE_URL",
    account="OpenAI's settings (platform.openai.com/settings)",
)
BROKEN = (APIError, *vendor.BROKEN)
"""All that the SDK and what lies below it raise when a call comes to nothing."""
_BILLING = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_MODERATION = {
    "moderation_blocked": "the request",
    "content_policy_violation": "the request",
    "invalid_prompt": "the prompt",
    "bio_policy": "the prompt",
    "misalignment_policy_violation": "the prompt",
    "image_content_policy_violation": "the previous image",
}
"""Code → what was refused, where the error does not name a stage."""
_BAD_IMAGE = {
    *("invalid_image", "invalid_image_format", "invalid_base64_image", "invalid_image_url", "invalid_image_mode"),
    *("image_too_large", "image_too_small", "image_file_too_large", "image_parse_error", "image_file_not_found"),
    *("unsupported_image_media_type", "empty_image_file", "failed_to_download_image"),
}
_NO_MODEL = {"model_not_found", "model_retired"}
_OUR_FAULT = {"invalid_request_error", "image_generation_user_error"}


def translate(error: Exception, model: str, *, api: str = "Images API") -> RunError:
    """Finds the error of ours for one of the SDK's, or of the HTTP library below it.

    Args:
        error: One of `BROKEN`, raised while sending the request or reading the answer.
        model: The model that was asked.
        api: Which of OpenAI's APIs was asked: a compatible server may not have it.
    """
    if isinstance(error, APIStatusError):
        facts = {"status": error.status_code, "request_id": error.request_id}
        wait = _wait(error.response.headers)
        return reported(error.body, model, status=error.status_code, wait=wait, facts=facts, api=api)
    cause = error.__cause__ if isinstance(error, APIError) else error
    return OPENAI.broken(cause if isinstance(cause, Exception) else error)


def reported(
    body: object,
    model: str,
    *,
    status: int | None = None,
    wait: timedelta | None = None,
    facts: Facts | None = None,
    api: str = "Images API",
) -> RunError:
    """Reads the `error` object of an answer, or of an event within a stream (then there is no status)."""
    error = as_object(body)
    code = str(error.get("code") or "")
    facts = {key: value for key, value in (facts or {}).items() if value is not None}
    facts |= {name: error[name] for name in ("code", "type", "param") if isinstance(error.get(name), str)}
    said = str(error.get("message") or error.get("type") or "")
    if by_code := _about_content(error, code, said, facts) or _about_account(status, code, said, wait, facts):
        return by_code
    if code in _NO_MODEL:
        return OPENAI.no_model(model, facts)
    if status == 404:
        return _no_api(api, facts)
    if status is None and error.get("type") not in _OUR_FAULT:
        return OPENAI.unavailable(None, said, wait, facts)
    return OPENAI.by_status(status or 400, said, facts, wait=wait, blocks="model" if wait else None)


def _about_content(error: Mapping[str, Any], code: str, said: str, facts: Facts) -> Refused | None:
    if code in _BAD_IMAGE:
        return OPENAI.bad_image(said, facts)
    if code not in _MODERATION:
        return None
    what = _MODERATION[code]
    details = as_object(error.get("moderation_details"))
    stage = str(details.get("moderation_stage") or ("unknown" if what == "the request" else "input"))
    listed = details.get("categories")
    categories = [str(category) for category in cast("list[object]", listed)] if isinstance(listed, list) else []
    if not categories and (named := re.search(r"safety_violations=\[([^\]]*)\]", said)):
        categories = [word.strip() for word in named[1].split(",") if word.strip()]
    if stage == "output":
        what = "the picture it had made"
    elif stage == "input" and what == "the request":
        what = "the prompt"
    return OPENAI.refused(what, facts, stage=stage, categories=categories)


def _about_account(status: int | None, code: str, said: str, wait: timedelta | None, facts: Facts) -> RunError | None:
    if code in _BILLING:
        return OPENAI.out_of_credit(facts)
    if code == "invalid_api_key":
        return OPENAI.wrong_key(facts)
    if code == "data_residency_mismatch":
        return OPENAI.no_permission(said, facts)
    if code == "rate_limit_exceeded":
        error = OPENAI.rate_limited(wait, facts, blocks="model" if wait else None)
        error.accepted = status is None  # a stream had begun
        return error
    return None


def _no_api(api: str, facts: Facts) -> Refused:
    return Refused(
        f"There is no {api} at this address.",
        code="not_found",
        hint="Check OPENAI_BASE_URL; it mostly ends in /v1.",
        data=dict(facts),
    )


def _wait(headers: httpx2.Headers) -> timedelta | None:
    """What the answer says about waiting: in milliseconds, in seconds, or as a date. None if nothing."""
    text = headers.get("retry-after-ms", "")
    if text.replace(".", "", 1).isdigit():
        return capped(timedelta(milliseconds=float(text)))
    return retry_after(headers.get("retry-after"))
