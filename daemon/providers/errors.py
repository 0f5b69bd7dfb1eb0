"""Map HTTP statuses and transport errors to `RunError`, worded alike for every provider.

* the prompt, the request, the key, the model    Refused: the run fails
* quota, rate limit, outage                      Retryable: there is another attempt
* sent, and no response                          OutcomeUnknown: there is another attempt; this one may have been paid for
"""

import ssl
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import anyio
import httpx
import httpx2
import structlog

from daemon.errors import ASK_OPERATOR, OutcomeUnknown, Refused, Retryable, RunError, Scope, Undecodable, is_disk_error
from daemon.providers import catalogue
from daemon.providers.sending import Sending
from daemon.providers.words import A_PAGE, readable

log = structlog.stdlib.get_logger()

TRANSPORT_ERRORS = (httpx.HTTPError, httpx2.HTTPError, ssl.SSLError, anyio.EndOfStream)
"""All that the HTTP libraries raise when a call fails; the last two slip through them."""
MAX_JOB_ID = 500
"""Characters of a provider job id. A gateway's, which wraps another's, has 205 (https://github.com/BerriAI/litellm/pull/32205).
Longer ones are neither saved nor accepted in webhooks (`image_jobs.receive_webhook`): no index takes 2,700 bytes, and no event 1,024
characters that look like base64, of which an id may be written twice."""
_NEVER_SENT = (
    *(httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol),
    *(httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.ProxyError, httpx2.UnsupportedProtocol),
    *(httpx.LocalProtocolError, httpx2.LocalProtocolError),  # a request that could not be written to its end
)
_SLOW = (httpx.TimeoutException, httpx2.TimeoutException)
_BILLING_WAIT = timedelta(minutes=10)
_PASSING = {409, 425}
TIMED_OUT = {408, 499, 504, *range(520, 531)}
"""By these a gateway, or the API itself, says that it did not wait for the result. 520-530 are Cloudflare's."""
ABSENT = {404, 405, 410}
"""By these a server says that it has nothing like this API at the address."""
_TOO_LARGE = 413
_OF_GATEWAYS = {407, 431}
"""Their sentences name what stands in between, whether it sends a page or not."""
_OF_PAGES = {"authentication", "permission", "invalid_request"}
"""Codes of which a page is no sign: no API here sends one."""
_MOST_CATEGORIES = 10

Facts = Mapping[str, Any]
"""More of the response (status, code, request id), for the audit trail."""


@dataclass(frozen=True, slots=True)
class ErrorMessages:
    """Make the errors of one provider: the same sentences for all, with its names in them.

    Args:
        name: Its name in sentences.
        provider: Its name in `processor`.
        key: The environment variable with its API key.
        address: The environment variable with its base URL.
        account: Where credit and permissions are managed.
    """

    name: str
    provider: str
    key: str
    address: str
    account: str

    def by_status(
        self,
        status: int,
        reason: str,
        facts: Facts,
        *,
        own: bool,
        wait: timedelta | None = None,
        blocks: Scope | None = None,
    ) -> RunError:
        """Map an HTTP status, where the body has no code of its own.

        Args:
            status: Any but a success.
            reason: The message of the response, see `ErrorBody`.
            facts: Recorded in the run's events.
            own: Whether the body is the JSON error of the API itself: then the request came through, and was turned down.
            wait: The pause a rate limit or an outage names.
            blocks: Whether a rate limit blocks the model or the whole provider.
        """
        error = self._by_status(status, reason, facts, own=own, wait=wait, blocks=blocks)
        of_page = isinstance(error, Refused) and error.code in _OF_PAGES and reason.startswith(A_PAGE)
        if of_page and status not in _OF_GATEWAYS:
            error = self.turned_down(status, error.code, facts)
        error.status = status
        return error

    def _by_status(  # noqa: C901, PLR0911 - a table
        self, status: int, reason: str, facts: Facts, *, own: bool, wait: timedelta | None, blocks: Scope | None
    ) -> RunError:
        if status in TIMED_OUT or (status >= 500 and not own):
            return self._cut_off(status, reason, facts, own=own)
        if status in _PASSING or status >= 500:
            error = self.unavailable(status, reason, wait, facts)
            error.own_error = status >= 500
            return error
        match status:
            case 401:
                return self.wrong_key(facts)
            case 402:
                return self.out_of_credit(facts)
            case 403:
                return self.no_permission(reason, facts)
            case 407:
                return self.no_way_through(facts)
            case 413:
                return self.too_large(facts)
            case 429:
                return self.rate_limited(wait, facts, blocks=blocks)
            case 431:
                return self.too_long_headers(facts)
            case 451:
                return self.not_here(reason, facts)
            case _:
                absent = status < 400 or status in ABSENT
                return self.no_api(facts, reason) if absent else self.rejected(status, reason, facts)

    def _cut_off(self, status: int, reason: str, facts: Facts, *, own: bool) -> OutcomeUnknown:
        """Return the error for a response by which the request may have been carried out, or be under way still."""
        if own or status in TIMED_OUT:
            said = f": {readable(reason)}" if readable(reason) else "."
            return self.unknown(f"{self.name} did not answer in time ({status}){said}", **facts)
        return self.unknown(f"{self.name} did not answer; a gateway in between did ({status}).", **facts)

    def transport_error(self, error: Exception, *, sent: bool = True) -> RunError:
        """Map one of `TRANSPORT_ERRORS`: `unreachable` if nothing was `sent`, else `outcome_unknown`."""
        if isinstance(error, _NEVER_SENT) or not sent:
            return Retryable(
                f"{self.name} cannot be reached.",
                code="unreachable",
                hint=f"If it stays so, look at the network and at {self.address}.",
                accepted=False,
                data={"error": type(error).__name__},
            )
        what = "did not answer in time." if isinstance(error, _SLOW) else "broke the connection off."
        return self.unknown(f"{self.name} {what}", error=type(error).__name__)

    @contextmanager
    def guard(self, sending: Sending) -> Generator[None]:
        """Let nothing but a `RunError` out of a call that was sent: what we do not understand may have been paid for.

        Trouble with the disk passes, too: the worker knows what that means.
        """
        try:
            yield
        except RunError as error:
            if error.status is None:
                error.status = sending.status
            if error.status == _TOO_LARGE and error.code == "too_large" and not sending.has_image:
                smaller = self.too_large_request(error.data)
                smaller.status = error.status
                raise smaller from error
            raise
        except Exception as error:
            if not sending.sent or is_disk_error(error):
                raise
            log.warning("provider.response_not_understood", provider=self.provider, exc_info=True)
            unknown = self.unknown(f"{self.name}'s answer cannot be read.", error=type(error).__name__)
            unknown.status = sending.status
            raise unknown from error

    def unknown(self, message: str, **data: Any) -> OutcomeUnknown:
        """Return the error for a request that was sent and has no usable response (`outcome_unknown`)."""
        return OutcomeUnknown(
            message,
            code="outcome_unknown",
            hint="It may have been paid for; another attempt makes a new one.",
            data=data,
        )

    def refused(
        self,
        what: str,
        facts: Facts,
        *,
        stage: str,
        categories: list[str],
        cost: float | None = None,
        charged: bool = False,
    ) -> Refused:
        """Return the error for moderated content (`content_policy`): `what` was refused, at the `stage` input or output."""
        categories = [readable(category, 60).rstrip(".") for category in categories[:_MOST_CATEGORIES]]
        why = f" ({', '.join(categories)})" if categories else ""
        return Refused(
            f"{self.name} refused {what}{why}.",
            code="content_policy",
            hint="Rephrase the prompt.",
            data={**facts, "stage": stage, "categories": categories},
            cost=cost,
            charged=charged,
        )

    def empty(self, facts: Facts, *, reason: str = "", cost: float | None = None, charged: bool = False) -> Retryable:
        """Return the error for a successful response without an image (`empty_result`)."""
        words = f" It said: {readable(reason, 200)}" if reason else ""
        return Retryable(
            f"{self.name} answered without a picture.{words}",
            code="empty_result",
            hint="If it stays so, rephrase the prompt.",
            data=dict(facts),
            cost=cost,
            charged=charged,
        )

    def too_large_picture(self, max_bytes: int, facts: Facts, *, cost: float | None = None) -> Refused:
        """Return the error for an image that was made, and is larger than we take (`image_too_large`)."""
        return Refused(
            f"{self.name}'s picture is larger than {max_bytes:,} bytes.",
            code="image_too_large",
            hint="Ask for a smaller size, or raise the limit (IMAGE_JOBS_MAX_IMAGE_BYTES).",
            data=dict(facts),
            cost=cost,
            charged=True,
        )

    def undecodable(self, path: Path, facts: Facts, *, cost: float | None = None) -> Undecodable:
        """Return the error for something that was made, and is no picture that we take (`undecodable`)."""
        return Undecodable(f"{self.name}'s picture cannot be read.", path, data=dict(facts), cost=cost)

    def out_of_credit(self, facts: Facts) -> Retryable:
        """Return the error for missing credit (`billing`). Blocks the provider for all runs."""
        return Retryable(
            f"The {self.name} account is out of credit.",
            code="billing",
            hint=f"Add credit at {self.account}.",
            retry_in=_BILLING_WAIT,
            accepted=False,
            blocks="provider",
            data=dict(facts),
        )

    def rate_limited(self, wait: timedelta | None, facts: Facts, *, blocks: Scope | None) -> Retryable:
        """Return the error for too many requests (`rate_limited`). `blocks` the model or the provider for `wait`."""
        return Retryable(
            f"{self.name} asks us to slow down.",
            code="rate_limited",
            hint="",
            retry_in=wait,
            accepted=False,
            blocks=blocks,
            data=dict(facts),
        )

    def unavailable(self, status: int | None, reason: str, wait: timedelta | None, facts: Facts) -> Retryable:
        """Return the error for an outage (`provider_unavailable`). `status` is None where a stream reports it."""
        number = f" ({status})" if status else ""
        return Retryable(
            f"{self.name} had a problem{number}: {readable(reason) or 'no reason given.'}",
            code="provider_unavailable",
            hint="",
            retry_in=wait,
            data=dict(facts),
        )

    def wrong_key(self, facts: Facts) -> Refused:
        """Return the error for a key that is not accepted (`authentication`)."""
        return Refused(
            f"{self.name} does not accept our key.",
            code="authentication",
            hint=ASK_OPERATOR,
            data={**facts, "cure": f"Set {self.key} to a valid key, restart the daemon, and requeue."},
        )

    def no_permission(self, reason: str, facts: Facts) -> Refused:
        """Return the error for a valid key without the permission (`permission`)."""
        return Refused(
            f"The {self.name} account may not do this: {readable(reason) or 'no reason given.'}",
            code="permission",
            hint=f"See {self.account}, then requeue.",
            data=dict(facts),
        )

    def no_model(self, model: str, facts: Facts) -> Refused:
        """Return the error for a model that is retired (`model_retired`) or unknown (`unknown_model`)."""
        known = catalogue.entry(self.provider, model)
        if known is not None and known.retired is not None:
            error = catalogue.retired(self.provider, known)
            error.data = dict(facts)
            return error
        return Refused(
            f"{self.name} has no model {model}.",
            code="unknown_model",
            hint=catalogue.did_you_mean(self.provider, model),
            data=dict(facts),
        )

    def no_api(self, facts: Facts, reason: str = "", *, api: str = "") -> Refused:
        """Return the error for a base URL without this API (`not_found`)."""
        said = "" if reason.lower().strip(" .") in ("", "not found") else f" It said: {readable(reason)}"
        return Refused(
            f"There is no {api or f'API of {self.name}'} at this address.{said}",
            code="not_found",
            hint=f"Check {self.address}.",
            data=dict(facts),
        )

    def bad_image(self, reason: str, facts: Facts) -> Refused:
        """Return the error for a previous image that the provider cannot read (`input_image_invalid`)."""
        return Refused(
            f"{self.name} cannot use the previous image: {readable(reason) or 'no reason given.'}",
            code="input_image_invalid",
            hint="Choose another previousImage, or leave it out.",
            data=dict(facts),
        )

    def too_large(self, facts: Facts) -> Refused:
        """Return the error for a previous image that makes the request too large (`too_large`)."""
        return Refused(
            f"The previous image is too large for {self.name}.",
            code="too_large",
            hint="Use a smaller one.",
            data=dict(facts),
        )

    def too_large_request(self, facts: Facts) -> Refused:
        """Return the error for a request that is too large without a previous image (`too_large`)."""
        return Refused(
            f"The request is too large for {self.name}, or for what stands in between.",
            code="too_large",
            hint=f"Shorten the prompt; if it is short, check {self.address}, and the limits of gateways in between.",
            data=dict(facts),
        )

    def no_way_through(self, facts: Facts) -> Refused:
        """Return the error for a proxy that does not let us through (`permission`)."""
        return Refused(
            f"A proxy on the way to {self.name} asks for a name and a password (407).",
            code="permission",
            hint=f"Set them in HTTPS_PROXY, or name the host of {self.name} in NO_PROXY, then requeue.",
            data=dict(facts),
        )

    def too_long_headers(self, facts: Facts) -> Refused:
        """Return the error for headers that are too long (`invalid_request`): the prompt is in none of them."""
        return Refused(
            f"{self.name}, or what stands in between, finds the headers of the request too long (431).",
            code="invalid_request",
            hint=f"Check {self.key} and {self.address}, and what gateways in between add, then requeue.",
            data=dict(facts),
        )

    def not_here(self, reason: str, facts: Facts) -> Refused:
        """Return the error for a place in which the provider may not work (`permission`)."""
        return Refused(
            f"{self.name} may not be used from here: {readable(reason) or 'no reason given.'}",
            code="permission",
            hint=f"Run the daemon where {self.name} may be used, then requeue.",
            data=dict(facts),
        )

    def turned_down(self, status: int, code: str, facts: Facts) -> Refused:
        """Return the error for a page, by which a gateway turned the request down: it says nothing about prompt or account."""
        return Refused(
            f"A gateway in front of {self.name} turned the request down ({status}).",
            code=code,
            hint=f"Check {self.address}, and what stands in between (a firewall, a proxy), then requeue.",
            data=dict(facts),
        )

    def rejected(self, status: int, reason: str, facts: Facts) -> Refused:
        """Return the error for any other fault of the request (`invalid_request`)."""
        return Refused(
            f"{self.name} rejected the request: {readable(reason) or f'status {status}.'}",
            code="invalid_request",
            hint="Change the prompt or its options, and requeue.",
            data=dict(facts),
        )


def as_object(value: object) -> dict[str, Any]:
    """Return a JSON object as a dict; an empty one for anything else."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def read_job_id(value: object) -> str | None:
    """Read the provider job id of a response; None for no id, or one that cannot be saved, and so never be checked."""
    if isinstance(value, str) and 0 < len(value) <= MAX_JOB_ID and value.isprintable():
        return value
    return None
