"""Map the errors of the Gemini API to `RunError`."""

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

from pydantic import Field

from daemon.errors import Retryable, RunError
from daemon.providers.error_body import ErrorBody
from daemon.providers.errors import TIMED_OUT, ErrorMessages, Facts
from daemon.providers.google.models import made_something
from daemon.providers.lenient import Lenient, Objects, Text
from daemon.providers.waits import capped, read_wait, retry_after
from daemon.providers.words import readable

GOOGLE = ErrorMessages(
    "Google",
    provider="google",
    key="GOOGLE_API_KEY",
    address="GOOGLE_BASE_URL",
    account="Google AI Studio (aistudio.google.com)",
)
_BAD_KEY = {"API_KEY_INVALID", "API_KEY_EXPIRED"}
_BAD_IMAGE = re.compile(r"\bprocess\b.*\bimage\b", re.IGNORECASE)
_MOST_SEARCHED = 500
"""Characters: the pattern takes the square of their number."""
_NO_CREDIT = "credits are depleted"
_PACIFIC = timezone(timedelta(hours=-8))
"""Where Google's day ends. In summer it ends an hour earlier; no wait is longer than that anyway."""


class _Violation(Lenient):
    quota_id: Text = Field(validation_alias="quotaId", default=None)


class _Detail(Lenient):
    reason: Text = None
    retry_delay: object = Field(validation_alias="retryDelay", default=None)
    violations: Objects[_Violation] = Field(default_factory=list)


class _Reported(Lenient):
    """The `error` object of a response, as far as it is one."""

    code: object = None
    status: Text = None
    message: Text = None
    details: Objects[_Detail] = Field(default_factory=list)

    @property
    def reason(self) -> str:
        """The reason in `ErrorInfo`; empty if there is none."""
        return next((detail.reason for detail in self.details if detail.reason), "")[:100]

    @property
    def wait(self) -> timedelta | None:
        """The pause of `RetryInfo`; None if there is none."""
        waits = (read_wait(detail.retry_delay) for detail in self.details)
        return next((wait for wait in waits if wait is not None), None)

    @property
    def quota(self) -> str | None:
        """The daily quota that is used up, by `QuotaFailure`; None if no daily one is."""
        quotas = (violation.quota_id or "" for detail in self.details for violation in detail.violations)
        return next((quota[:200] for quota in quotas if "PerDay" in quota), None)


def translate(status: int, headers: Mapping[str, str], body: bytes, model: str, *, foreign: bool = False) -> RunError:
    """Map an error response to a `RunError`.

    Args:
        status: Its status.
        headers, body: The rest of it; `{"error": {"code", "message", "status"}}` from the API itself.
        model: The model that was called.
        foreign: Whether the server is not Google's, and may have an error object of its own.
    """
    document = ErrorBody.of(body, status)
    own = isinstance(document.fields.get("error"), dict) or (foreign and document.is_foreign)
    error = _by_response(_Reported.read(document.fields.get("error")), status, headers, document.reason, model, own=own)
    error.status = status
    error.charged = made_something(document.fields.get("usageMetadata"))
    return error


def _by_response(
    reported: _Reported, status: int, headers: Mapping[str, str], message: str, model: str, *, own: bool
) -> RunError:
    facts: dict[str, Any] = {"status": status}
    named = (("code", reported.status), ("reason", reported.reason))
    facts |= {name: readable(value, 100).rstrip(".") for name, value in named if value}
    wait = reported.wait or retry_after(headers.get("retry-after"))
    if status in TIMED_OUT:
        return GOOGLE.by_status(status, message, facts, own=own)
    if about_account := _about_account(status, message, reported, facts):
        return about_account
    if status == 404 and reported.status == "NOT_FOUND":
        return GOOGLE.no_model(model, facts)
    if status == 400 and _BAD_IMAGE.search(message[:_MOST_SEARCHED]):
        return GOOGLE.bad_image(message, facts)
    return GOOGLE.by_status(status, message, facts, own=own, wait=wait, blocks="model" if wait else None)


def _about_account(status: int, message: str, reported: _Reported, facts: Facts) -> RunError | None:
    if reported.reason in _BAD_KEY:
        return GOOGLE.wrong_key(facts)
    if reported.reason == "BILLING_DISABLED" or (status == 429 and _NO_CREDIT in message):
        return GOOGLE.out_of_credit(facts)
    if status == 429 and (quota := reported.quota):
        return _daily(quota, facts)
    if reported.status == "FAILED_PRECONDITION":  # not in this country, or not without paying
        return GOOGLE.no_permission(message, facts)
    return None


def _daily(quota: str, facts: Facts) -> Retryable:
    return Retryable(
        "Google's quota of the day for this model is used up.",
        code="quota_daily",
        hint="It is filled again at midnight, Pacific time. Enable billing in Google AI Studio for a larger one.",
        retry_in=capped(until_midnight(datetime.now(UTC))),
        accepted=False,
        blocks="model",
        data={**facts, "quota": quota},
    )


def until_midnight(now: datetime) -> timedelta:
    """Return the time left of Google's day."""
    there = now.astimezone(_PACIFIC)
    return there.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1) - there
