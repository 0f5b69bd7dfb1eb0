"""What OpenAI answers when there is no picture, and what we make of it.

* the prompt, the request, the key, the model    Refused
* quota, rate, outage                            Retryable
* sent, and no answer                            OutcomeUnknown
"""

import re
import ssl
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, cast

import anyio
import httpx2
from openai import APIError, APIStatusError

from daemon.errors import OutcomeUnknown, Refused, Retryable, RunError
from daemon.providers import catalogue

BROKEN = (APIError, httpx2.HTTPError, ssl.SSLError, anyio.EndOfStream)
"""All that the SDK and what lies below it raise when a call comes to nothing; the last two slip through both."""
_NEVER_SENT = (
    httpx2.ConnectError,
    httpx2.ConnectTimeout,
    httpx2.PoolTimeout,
    httpx2.ProxyError,
    httpx2.UnsupportedProtocol,
)
_BILLING = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_MODERATION = {"moderation_blocked", "content_policy_violation", "image_content_policy_violation"}
_BAD_IMAGE = {"invalid_image", "invalid_image_format", "invalid_base64_image", "image_too_large", "empty_image_file"}
_BILLING_WAIT = timedelta(minutes=10)
_LONGEST_WAIT = timedelta(hours=1)
_ENCODED = re.compile(r"[A-Za-z0-9+/=_-]{60,}")


def translate(error: Exception, model: str) -> RunError:
    """Finds the error of ours for one of the SDK's, or of the HTTP library below it.

    Args:
        error: One of `BROKEN`, raised while sending the request or reading the answer.
        model: The model that was asked.
    """
    if isinstance(error, APIStatusError):
        data = {"status": error.status_code, "request_id": error.request_id}
        wait = _retry_after(error.response.headers)
        return reported(error.body, model, status=error.status_code, wait=wait, data=data)
    cause = error.__cause__ if isinstance(error, APIError) else error
    what = type(cause or error).__name__
    if isinstance(cause, _NEVER_SENT):
        return Retryable(
            "OpenAI cannot be reached.",
            code="unreachable",
            hint="It is tried again by itself. If it stays so, look at the network and at OPENAI_BASE_URL.",
            accepted=False,
            data={"error": what},
        )
    slow = isinstance(cause, httpx2.TimeoutException)
    return unknown("OpenAI did not answer in time." if slow else "The connection to OpenAI broke off.", error=what)


def unknown(message: str, **data: Any) -> OutcomeUnknown:
    """The request went out and nothing usable came back."""
    return OutcomeUnknown(
        message, code="outcome_unknown", hint="It may have been paid for; the next attempt makes a new one.", data=data
    )


def reported(
    body: object,
    model: str,
    *,
    status: int | None = None,
    wait: timedelta | None = None,
    data: Mapping[str, Any] | None = None,
) -> RunError:
    """Reads the `error` object of an answer, or of an event within a stream (then there is no status)."""
    error: dict[str, Any] = cast("dict[str, Any]", body) if isinstance(body, dict) else {}
    code = str(error.get("code") or "")
    kind = str(error.get("type") or "")
    facts = {key: value for key, value in (data or {}).items() if value is not None}
    facts |= {name: error[name] for name in ("code", "type", "param") if isinstance(error.get(name), str)}
    said = _ENCODED.sub("…", str(error.get("message") or ""))[:500]
    if code in _MODERATION:
        return _moderated(error, facts)
    if about_account := _about_account(status, code, said, wait, facts):
        return about_account
    if code in ("model_not_found", "model_retired"):
        return _no_model(model, facts)
    if status is not None and status in range(400, 500) and status not in (408, 409):
        return _rejected(status, code, said, facts)
    return Retryable(
        f"OpenAI had a problem{f' ({status})' if status else ''}: {said or kind or 'no reason given'}",
        code="provider_unavailable",
        hint="It is tried again by itself.",
        retry_in=wait,
        data=facts,
    )


def _moderated(error: Mapping[str, Any], facts: dict[str, Any]) -> Refused:
    details = error.get("moderation_details")
    detail: dict[str, Any] = cast("dict[str, Any]", details) if isinstance(details, dict) else {}
    stage = str(detail.get("moderation_stage") or "")
    categories = [str(category) for category in detail.get("categories") or ()]
    if not categories and (named := re.search(r"safety_violations=\[([^\]]*)\]", str(error.get("message")))):
        categories = [word.strip() for word in named[1].split(",") if word.strip()]
    what = {"input": "the prompt", "output": "the picture it had made"}.get(stage, "the request")
    why = f" ({', '.join(categories)})" if categories else ""
    return Refused(
        f"OpenAI refused {what}{why}.",
        code="content_policy",
        hint="Rephrase the prompt.",
        data={**facts, "stage": stage or None, "categories": categories},
    )


def _about_account(
    status: int | None, code: str, said: str, wait: timedelta | None, facts: dict[str, Any]
) -> RunError | None:
    if code in _BILLING or status == 402:
        return Retryable(
            f"The OpenAI account is out of credit ({code or 'payment required'}).",
            code="billing",
            hint="Add credit at OpenAI's billing page; waiting runs go on by themselves.",
            retry_in=_BILLING_WAIT,
            accepted=False,
            blocks="provider",
            data=facts,
        )
    if status == 429 or code == "rate_limit_exceeded":
        return Retryable(
            "OpenAI asks us to slow down.",
            code="rate_limited",
            hint="It is tried again by itself.",
            retry_in=wait,
            accepted=status is None,
            blocks="model" if wait else None,
            data=facts,
        )
    if status == 401 or code == "invalid_api_key":
        return Refused(
            "OpenAI does not accept our key.",
            code="authentication",
            hint="Set OPENAI_API_KEY to a valid key, restart the daemon, and requeue.",
            data=facts,
        )
    if status == 403:
        return Refused(
            f"The OpenAI account may not do this: {said}",
            code="permission",
            hint="Give the project access to the model, or verify the organisation, in OpenAI's settings.",
            data=facts,
        )
    return None


def _no_model(model: str, facts: dict[str, Any]) -> Refused:
    known = catalogue.entry("openai", model)
    if known is not None and known.retired is not None:
        gone = catalogue.retired("openai", known)
        gone.data = facts
        return gone
    return Refused(
        f"OpenAI has no model {model}.",
        code="unknown_model",
        hint=catalogue.did_you_mean("openai", model),
        data=facts,
    )


def _rejected(status: int, code: str, said: str, facts: dict[str, Any]) -> Refused:
    if code in _BAD_IMAGE:
        return Refused(
            f"OpenAI cannot use the previous image: {said}",
            code="input_image_invalid",
            hint="Choose another previousImage, or leave it out.",
            data=facts,
        )
    if status == 404:
        return Refused(
            "There is no Images API at this address.",
            code="not_found",
            hint="Check OPENAI_BASE_URL; it mostly ends in /v1.",
            data=facts,
        )
    if status == 413:
        return Refused(
            "The previous image is too large for OpenAI.", code="too_large", hint="Use a smaller one.", data=facts
        )
    return Refused(
        f"OpenAI rejected the request: {said or f'status {status}'}",
        code="invalid_request",
        hint="Change the prompt or its options, and requeue.",
        data=facts,
    )


def _retry_after(headers: httpx2.Headers) -> timedelta | None:
    """What the answer says about waiting: in milliseconds, in seconds, or as a date. None if nothing."""
    try:
        if text := headers.get("retry-after-ms"):
            wait = timedelta(milliseconds=float(text))
        elif (text := headers.get("retry-after", "")).replace(".", "", 1).isdigit():
            wait = timedelta(seconds=float(text))
        else:
            wait = parsedate_to_datetime(text) - datetime.now(UTC)
    except (ValueError, TypeError, OverflowError):
        return None
    return min(max(wait, timedelta(0)), _LONGEST_WAIT)
