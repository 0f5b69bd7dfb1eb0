"""What the Gemini API answers when a call fails, and what we make of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from typing import Any, cast

from google.genai.errors import APIError

from daemon.errors import Retryable, RunError
from daemon.providers.vendor import Facts, Vendor, as_object, capped, retry_after

GOOGLE = Vendor(
    "Google",
    provider="google",
    key="GOOGLE_API_KEY",
    address="GOOGLE_BASE_URL",
    account="Google AI Studio (aistudio.google.com)",
)
_BAD_KEY = {"API_KEY_INVALID", "API_KEY_EXPIRED"}
_BAD_IMAGE = re.compile(r"\bprocess\b.*\bimage\b", re.IGNORECASE)
_NO_CREDIT = "credits are depleted"
_PACIFIC = timezone(timedelta(hours=-8))
"""Where Google's day ends. In summer it ends an hour earlier; no wait of ours is longer than that anyway."""


@dataclass(frozen=True, slots=True)
class _Reported:
    """The `error` object of an answer, as far as it is one."""

    status: str
    said: str
    details: tuple[Mapping[str, Any], ...]

    @classmethod
    def of(cls, body: object) -> "_Reported":
        error = as_object(as_object(body).get("error"))
        details = error.get("details")
        listed = cast("list[object]", details) if isinstance(details, list) else []
        return cls(
            str(error.get("status") or ""),
            str(error.get("message") or ""),
            tuple(as_object(detail) for detail in listed),
        )

    @property
    def reason(self) -> str:
        """The word for it in `ErrorInfo`."""
        return next((str(detail["reason"]) for detail in self.details if "reason" in detail), "")

    @property
    def wait(self) -> timedelta | None:
        """How long to wait, by `RetryInfo`."""
        for detail in self.details:
            text = str(detail.get("retryDelay") or "").removesuffix("s")
            if text.replace(".", "", 1).isdigit():
                return capped(timedelta(seconds=float(text)))
        return None

    @property
    def quota(self) -> str | None:
        """Which quota of a day is used up, by `QuotaFailure`; None if none of a day is."""
        for detail in self.details:
            violations = detail.get("violations")
            for violation in cast("list[object]", violations) if isinstance(violations, list) else ():
                quota = str(as_object(violation).get("quotaId") or "")
                if "PerDay" in quota:
                    return quota
        return None


def translate(error: APIError, model: str) -> RunError:
    """Finds the error of ours for an answer that is an error.

    Args:
        error: Raised by the SDK for any status but 200.
        model: The model that was asked.
    """
    raised = cast("Any", error)  # the SDK's own types are half unknown
    reported, status = _Reported.of(raised.details), error.code or 0
    said = reported.said or str(error.message or "")
    facts: dict[str, Any] = {"status": status}
    facts |= {name: value for name, value in (("code", reported.status), ("reason", reported.reason)) if value}
    if about_account := _about_account(status, said, reported, facts):
        return about_account
    if status == 404 and reported.status == "NOT_FOUND":
        return GOOGLE.no_model(model, facts)
    if status == 400 and _BAD_IMAGE.search(said):
        return GOOGLE.bad_image(said, facts)
    wait = reported.wait or retry_after(raised.response.headers.get("retry-after"))
    return GOOGLE.by_status(status, said, facts, wait=wait, blocks="model" if wait else None)


def _about_account(status: int, said: str, reported: _Reported, facts: Facts) -> RunError | None:
    if reported.reason in _BAD_KEY:
        return GOOGLE.wrong_key(facts)
    if reported.reason == "BILLING_DISABLED" or (status == 429 and _NO_CREDIT in said):
        return GOOGLE.out_of_credit(facts)
    if status == 429 and (quota := reported.quota):
        return _daily(quota, facts)
    if reported.status == "FAILED_PRECONDITION":  # not in this country, or not without paying
        return GOOGLE.no_permission(said, facts)
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
    """How long Google's day still is."""
    there = now.astimezone(_PACIFIC)
    return there.replace(hour=0, minute=0, second=0, microsecond=0) + timedelta(days=1) - there
