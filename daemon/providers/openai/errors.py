"""Map the errors of OpenAI's APIs to `RunError`."""

import re
from datetime import timedelta
from typing import Annotated

import httpx2
from openai import APIError, APIStatusError, NotFoundError
from pydantic import BeforeValidator, Field

from daemon.errors import Refused, RunError
from daemon.providers import errors
from daemon.providers.error_body import ErrorBody, find_reason
from daemon.providers.errors import ABSENT, TIMED_OUT, ErrorMessages, Facts
from daemon.providers.lenient import Lenient, Name, Object, Text, as_texts, counted
from daemon.providers.waits import read_wait, retry_after
from daemon.providers.words import readable

OPENAI = ErrorMessages(
    "OpenAI",
    provider="openai",
    key="OPENAI_API_KEY",
    address="OPENAI_BASE_URL",
    account="OpenAI's settings (platform.openai.com/settings)",
)
CALL_ERRORS = (APIError, *errors.TRANSPORT_ERRORS)
"""All that the SDK and the HTTP library below it raise when a call fails."""
_BILLING = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_MODERATION = {
    "moderation_blocked": "the request",
    "content_policy_violation": "the request",
    "invalid_prompt": "the prompt",
    "bio_policy": "the prompt",
    "misalignment_policy_violation": "the prompt",
    "image_content_policy_violation": "the previous image",
}
"""Code → the refused content, where the error does not name a stage."""
_BAD_IMAGE = {
    *("invalid_image", "invalid_image_format", "invalid_base64_image", "invalid_image_url", "invalid_image_mode"),
    *("image_too_large", "image_too_small", "image_file_too_large", "image_parse_error", "image_file_not_found"),
    *("unsupported_image_media_type", "empty_image_file", "failed_to_download_image"),
}
_NO_MODEL = {"model_not_found", "model_retired"}
_OUR_FAULT = {"invalid_request_error", "image_generation_user_error"}


def translate(error: Exception, model: str, *, api: str = "Images API", sent: bool = True) -> RunError:
    """Map an exception of the SDK, or of the HTTP library below it.

    Args:
        error: One of `CALL_ERRORS`, raised while sending the request or reading the response.
        model: The model that was called.
        api: The API that was called: a compatible server may not have it.
        sent: Whether the request has left.
    """
    if isinstance(error, APIStatusError):
        return _by_response(error.response, error.status_code, error.request_id, model, api)
    cause = error.__cause__ if isinstance(error, APIError) else error
    if isinstance(cause, RunError):  # the request was kept from leaving
        return cause
    return OPENAI.transport_error(cause if isinstance(cause, Exception) else error, sent=sent)


def _by_response(response: httpx2.Response, status: int, request_id: str | None, model: str, api: str) -> RunError:
    body = ErrorBody.of(response.content, status)
    own = is_own(body) or (body.is_foreign and not _is_openai(response.request.url.host))
    facts = {"status": status, "request_id": request_id}
    error = reported(
        body.fields.get("error"),
        model,
        reason=body.reason,
        status=status,
        own=own,
        wait=_wait(response.headers),
        facts=facts,
        api=api,
    )
    error.status = status
    error.charged = counted(body.fields.get("usage")) is not None
    return error


def is_own(body: ErrorBody) -> bool:
    """Return whether a body is an error of this API. Some servers have no code in it, or a text instead of an object."""
    return bool(body.fields.get("error"))


def is_missing(error: Exception) -> bool:
    """Return whether an exception of the SDK says that what was asked for is not there: a 404 with an error object. One with a
    gateway's page, or nothing, says nothing about it."""
    if not isinstance(error, NotFoundError):
        return False
    body = ErrorBody.of(error.response.content, error.status_code)
    return is_own(body) or body.is_foreign


def _is_openai(host: str) -> bool:
    """Return whether a host is OpenAI's own, where any other object is that of a gateway in between."""
    return host == "openai.com" or host.endswith(".openai.com")


def reported(
    body: object,
    model: str,
    *,
    reason: str = "",
    status: int | None = None,
    own: bool = True,
    wait: timedelta | None = None,
    facts: Facts | None = None,
    api: str = "Images API",
) -> RunError:
    """Map the `error` object of a response, or of an event within a stream, which has no status.

    Args:
        body: The object; anything else counts as one without fields.
        model: The model that was called.
        reason: The message, where the object has none.
        status, own, wait, facts: See `ErrorMessages.by_status`.
        api: The API that was called.
    """
    error = _Reported.read(body)
    code = error.code or ""
    facts = {key: value for key, value in (facts or {}).items() if value is not None}
    facts |= {name: word for name, word in error.words.items() if word}
    message = error.message or reason or find_reason(body) or error.type or ""
    if status in TIMED_OUT:
        return OPENAI.by_status(status, message, facts, own=own)
    if by_code := _about_content(error, code, message, facts) or _about_account(status, code, message, wait, facts):
        return by_code
    if code in _NO_MODEL:
        return OPENAI.no_model(model, facts)
    if status in ABSENT:
        return _no_api(api, facts, reason)
    if status is None and error.type not in _OUR_FAULT:
        return OPENAI.unavailable(None, message, wait, facts)
    return OPENAI.by_status(status or 400, message, facts, own=own, wait=wait, blocks="model" if wait else None)


class _Moderation(Lenient):
    moderation_stage: Text = None
    categories: Annotated[list[str], BeforeValidator(as_texts)] = Field(default_factory=list)


class _Reported(Lenient):
    """The `error` object, as far as it is one."""

    code: Name = None
    type: Text = None
    param: Text = None
    message: Text = None
    moderation_details: Object[_Moderation] = None

    @property
    def words(self) -> dict[str, str]:
        """The fields for the audit trail."""
        named = {"code": self.code, "type": self.type, "param": self.param}
        return {name: readable(value, 100).rstrip(".") for name, value in named.items() if value}


def _about_content(error: _Reported, code: str, message: str, facts: Facts) -> Refused | None:
    if code in _BAD_IMAGE:
        return OPENAI.bad_image(message, facts)
    if code not in _MODERATION:
        return None
    what = _MODERATION[code]
    details = error.moderation_details or _Moderation()
    stage = details.moderation_stage or ("unknown" if what == "the request" else "input")
    categories = details.categories
    if not categories and (named := re.search(r"safety_violations=\[([^\[\]]*)\]", message)):
        categories = [word.strip() for word in named[1].split(",") if word.strip()]
    if stage == "output":
        what = "the picture it had made"
    elif stage == "input" and what == "the request":
        what = "the prompt"
    return OPENAI.refused(what, facts, stage=stage, categories=categories)


def _about_account(
    status: int | None, code: str, message: str, wait: timedelta | None, facts: Facts
) -> RunError | None:
    if code in _BILLING:
        return OPENAI.out_of_credit(facts)
    if code == "invalid_api_key":
        return OPENAI.wrong_key(facts)
    if code == "unsupported_country_region_territory":
        return OPENAI.not_here(message, facts)
    if code == "data_residency_mismatch":
        return OPENAI.no_permission(message, facts)
    if code == "rate_limit_exceeded":
        error = OPENAI.rate_limited(wait, facts, blocks="model" if wait else None)
        error.accepted = status is None  # a stream had begun
        return error
    return None


def _no_api(api: str, facts: Facts, reason: str) -> Refused:
    error = OPENAI.no_api(facts, reason, api=api)
    error.hint = "Check OPENAI_BASE_URL; it mostly ends in /v1."
    return error


def _wait(headers: httpx2.Headers) -> timedelta | None:
    """Read the pause that a response asks for, in milliseconds, in seconds, or as a date; None if there is none."""
    exact = read_wait(headers.get("retry-after-ms"), unit=timedelta(milliseconds=1))
    return retry_after(headers.get("retry-after")) if exact is None else exact
