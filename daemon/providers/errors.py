"""What every provider says in the same words when there is no picture, with its own names in them.

* the prompt, the request, the key, the model    Refused
* quota, rate, outage                            Retryable
* sent, and no answer                            OutcomeUnknown
"""

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any, cast

import anyio
import httpx
import httpx2

from daemon.errors import OutcomeUnknown, Refused, Retryable, RunError, Scope
from daemon.providers import catalogue

BROKEN = (httpx.HTTPError, httpx2.HTTPError, ssl.SSLError, anyio.EndOfStream)
"""All that the HTTP libraries raise when a call comes to nothing; the last two slip through them."""
LONGEST_WAIT = timedelta(hours=1)
"""However long we are told to wait: by then it is worth another question."""
LONGEST_ID = 500
"""Characters of an order's id. A gateway's, which wraps another's, has 205 (https://github.com/BerriAI/litellm/pull/32205).
Longer ones are neither kept nor heard of (`private.receive_webhook`): no index takes 2,700 bytes, and no event 1,024
characters that look like base64, of which an id may be written twice."""
_NEVER_SENT = (
    *(httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol),
    *(httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError, httpx2.UnsupportedProtocol),
)
_SLOW = (httpx.TimeoutException, httpx2.TimeoutException)
_BILLING_WAIT = timedelta(minutes=10)
_PASSING = {408, 409, 425, 499}
_ENCODED = re.compile(r"[A-Za-z0-9+/=_-]{60,}")
_ENDS = ".!?…。"
_MOST_CATEGORIES = 10
_AGAIN = "It is tried again by itself."

Facts = Mapping[str, Any]
"""What the answer told besides: for the audit trail."""


@dataclass(frozen=True, slots=True)
class Vendor:
    """Who is spoken of.

    Args:
        name: As people know it.
        provider: As `processor` names it.
        key: The variable with its key.
        address: The variable with its base URL.
        account: Where its credit and its rights are looked after.
    """

    name: str
    provider: str
    key: str
    address: str
    account: str

    def by_status(
        self, status: int, said: str, facts: Facts, *, wait: timedelta | None = None, blocks: Scope | None = None
    ) -> RunError:
        """What an answer's status means, where no more is known. `wait` and `blocks` are for a rate limit."""
        plain = {401: self.wrong_key, 402: self.out_of_credit, 404: self.no_api, 413: self.too_large}
        if status < 400 or status in plain:
            return plain.get(status, self.no_api)(facts)
        if status == 403:
            return self.no_permission(said, facts)
        if status == 429:
            return self.rate_limited(wait, facts, blocks=blocks)
        if status in _PASSING or status >= 500:
            return self.unavailable(status, said, wait, facts)
        return self.rejected(status, said, facts)

    def broken(self, error: Exception) -> RunError:
        """What one of `BROKEN` means."""
        if isinstance(error, _NEVER_SENT):
            return Retryable(
                f"{self.name} cannot be reached.",
                code="unreachable",
                hint=f"{_AGAIN} If it stays so, look at the network and at {self.address}.",
                accepted=False,
                data={"error": type(error).__name__},
            )
        what = "did not answer in time." if isinstance(error, _SLOW) else "broke the connection off."
        return self.unknown(f"{self.name} {what}", error=type(error).__name__)

    def unknown(self, message: str, **data: Any) -> OutcomeUnknown:
        """The request went out and nothing usable came back."""
        return OutcomeUnknown(
            message,
            code="outcome_unknown",
            hint="It may have been paid for; the next attempt makes a new one.",
            data=data,
        )

    def refused(
        self, what: str, facts: Facts, *, stage: str, categories: list[str], cost: float | None = None
    ) -> Refused:
        """The content is not wanted there. `what` is what was looked at; `stage` is input or output."""
        categories = [readable(category, 60).rstrip(".") for category in categories[:_MOST_CATEGORIES]]
        why = f" ({', '.join(categories)})" if categories else ""
        return Refused(
            f"{self.name} refused {what}{why}.",
            code="content_policy",
            hint="Rephrase the prompt.",
            data={**facts, "stage": stage, "categories": categories},
            cost=cost,
        )

    def empty(self, facts: Facts, *, said: str = "", cost: float | None = None) -> Retryable:
        """It answered in good order, but there is no picture in the answer."""
        words = f" It said: {readable(said, 200)}" if said else ""
        return Retryable(
            f"{self.name} answered without a picture.{words}",
            code="empty_result",
            hint=f"{_AGAIN} If it stays so, rephrase the prompt.",
            data=dict(facts),
            cost=cost,
        )

    def out_of_credit(self, facts: Facts) -> Retryable:
        """Nothing will be made before somebody pays: closes the provider for everybody."""
        return Retryable(
            f"The {self.name} account is out of credit.",
            code="billing",
            hint=f"Add credit at {self.account}; waiting runs go on by themselves.",
            retry_in=_BILLING_WAIT,
            accepted=False,
            blocks="provider",
            data=dict(facts),
        )

    def rate_limited(self, wait: timedelta | None, facts: Facts, *, blocks: Scope | None) -> Retryable:
        """Too many requests."""
        return Retryable(
            f"{self.name} asks us to slow down.",
            code="rate_limited",
            hint=_AGAIN,
            retry_in=wait,
            accepted=False,
            blocks=blocks,
            data=dict(facts),
        )

    def unavailable(self, status: int | None, said: str, wait: timedelta | None, facts: Facts) -> Retryable:
        """An outage, or too much going on there. What is told within an answer has no status."""
        number = f" ({status})" if status else ""
        return Retryable(
            f"{self.name} had a problem{number}: {readable(said) or 'no reason given.'}",
            code="provider_unavailable",
            hint=_AGAIN,
            retry_in=wait,
            data=dict(facts),
        )

    def wrong_key(self, facts: Facts) -> Refused:
        """The key is not accepted."""
        return Refused(
            f"{self.name} does not accept our key.",
            code="authentication",
            hint=f"Set {self.key} to a valid key, restart the daemon, and requeue.",
            data=dict(facts),
        )

    def no_permission(self, said: str, facts: Facts) -> Refused:
        """The key is good, and may not do this."""
        return Refused(
            f"The {self.name} account may not do this: {readable(said) or 'no reason given.'}",
            code="permission",
            hint=f"See {self.account}, then requeue.",
            data=dict(facts),
        )

    def no_model(self, model: str, facts: Facts) -> Refused:
        """The model is not there any more, or never was."""
        known = catalogue.entry(self.provider, model)
        if known is not None and known.retired is not None:
            gone = catalogue.retired(self.provider, known)
            gone.data = dict(facts)
            return gone
        return Refused(
            f"{self.name} has no model {model}.",
            code="unknown_model",
            hint=catalogue.did_you_mean(self.provider, model),
            data=dict(facts),
        )

    def no_api(self, facts: Facts) -> Refused:
        """Somebody else answered."""
        return Refused(
            f"There is no API of {self.name} at this address.",
            code="not_found",
            hint=f"Check {self.address}.",
            data=dict(facts),
        )

    def bad_image(self, said: str, facts: Facts) -> Refused:
        """The previous image cannot be read there."""
        return Refused(
            f"{self.name} cannot use the previous image: {readable(said) or 'no reason given.'}",
            code="input_image_invalid",
            hint="Choose another previousImage, or leave it out.",
            data=dict(facts),
        )

    def too_large(self, facts: Facts) -> Refused:
        """The previous image makes the request larger than it may be."""
        return Refused(
            f"The previous image is too large for {self.name}.",
            code="too_large",
            hint="Use a smaller one.",
            data=dict(facts),
        )

    def rejected(self, status: int, said: str, facts: Facts) -> Refused:
        """Something in the request is wrong."""
        return Refused(
            f"{self.name} rejected the request: {readable(said) or f'status {status}.'}",
            code="invalid_request",
            hint="Change the prompt or its options, and requeue.",
            data=dict(facts),
        )


def asked_in_vain(error: RunError) -> RunError:
    """What goes wrong with asking about an order: nothing was ordered by it, and the order is still there. So it is asked
    again, also after somebody has mended the key."""
    match error:
        case OutcomeUnknown() | Refused(code="authentication" | "permission"):
            return Retryable(
                error.message,
                code="provider_unavailable",
                hint="It is asked again by itself.",
                accepted=False,
                data=error.data,
            )
        case Retryable():
            error.accepted = False
        case _:
            pass
    return error


def readable(said: str, length: int = 500) -> str:
    """Somebody else's words as they may be shown: short, in one line, without what looks like base64, with a full stop."""
    words = " ".join(_ENCODED.sub("…", said).split())[:length]
    return f"{words}." if words and words[-1] not in _ENDS else words


def as_object(value: object) -> dict[str, Any]:
    """A JSON object of an answer; an empty one for anything else."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def order_name(value: object) -> str | None:
    """The id of an order, as it was answered; None for what is none, or cannot be kept: nobody could ask for it again."""
    if isinstance(value, str) and 0 < len(value) <= LONGEST_ID and value.isprintable():
        return value
    return None


def retry_after(header: str | None) -> timedelta | None:
    """Reads a `Retry-After` header: seconds, or a date. None if it says nothing."""
    try:
        text = header or ""
        if text.replace(".", "", 1).isdigit():
            return capped(timedelta(seconds=float(text)))
        return capped(parsedate_to_datetime(text) - datetime.now(UTC))
    except (ValueError, TypeError, OverflowError):
        return None


def capped(wait: timedelta) -> timedelta:
    """A wait that makes sense."""
    return min(max(wait, timedelta(0)), LONGEST_WAIT)
