"""Read the responses of a midjourney-proxy, and map its errors to `RunError`.

Almost every response has status 200: the result is in a `code` of the proxy's own, and an unknown job is an empty body.
"""

import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Annotated, Any, Self, cast

from pydantic import BeforeValidator, Field

from daemon.errors import Refused, Retryable, RunError
from daemon.providers.error_body import ErrorBody
from daemon.providers.errors import ErrorMessages, Facts, as_object, read_job_id
from daemon.providers.lenient import Encoded, Lenient, Name, Object, Text, as_count, as_encoded
from daemon.providers.words import readable

MIDJOURNEY = ErrorMessages(
    "Midjourney",
    provider="midjourney",
    key="MIDJOURNEY_API_KEY",
    address="MIDJOURNEY_API_URL",
    account="the settings of the midjourney-proxy",
)
SUCCESS, FAILURE, CANCELLED, MODAL = "SUCCESS", "FAILURE", "CANCEL", "MODAL"
_QUEUE_WAIT = timedelta(seconds=15)
_ACCOUNT_WAIT = timedelta(seconds=60)
_MODERATION = ("banned", "moderat", "blocked", "violat", "违禁", "敏感")
_TRANSIENT = ("timeout", "timed out", "queue", "busy", "try again", "internal", "超时", "队列", "系统异常", "连接")
_CANCELLATIONS = ("取消", "cancel")
_INTEGER = re.compile(r"\s*-?[0-9]{1,9}\s*")
_ENVELOPES = ("result", "data")
"""The fields in which some proxies wrap what was asked for: `{"code": 1, "result": {…}}`."""


def _code(value: object) -> int | None:
    """Read a result code, which some proxies write as a text."""
    if isinstance(value, str) and _INTEGER.fullmatch(value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _addresses(value: object) -> list[str]:
    """Read a list of addresses, as texts or as objects with a `url`."""
    listed = cast("list[object]", value) if isinstance(value, list) else []
    named = (cast("dict[str, object]", item).get("url") if isinstance(item, dict) else item for item in listed)
    return [address for item in named if (address := as_encoded(item))]


class _Properties(Lenient):
    final_prompt: Text = Field(validation_alias="finalPrompt", default=None)
    banned_word: Text = Field(validation_alias="bannedWord", default=None)


class _TaskFields(Lenient):
    id: Name = None
    status: Name = None
    progress: object = None
    image_url: Encoded = Field(validation_alias="imageUrl", default=None)
    image_urls: Annotated[list[str], BeforeValidator(_addresses)] = Field(
        validation_alias="imageUrls", default_factory=list
    )
    fail_reason: Text = Field(validation_alias="failReason", default=None)
    state: Name = None
    properties: Object[_Properties] = None


class _Submission(Lenient):
    code: Annotated[int | None, BeforeValidator(_code)] = None
    description: Text = None
    result: Name = None
    properties: Object[_Properties] = None


@dataclass(frozen=True, slots=True)
class Task:
    """A provider job. `progress` is 0-100; values that are missing or malformed are None. `image_url` may also be an address
    relative to the proxy's, or the image itself. Without `grid` it is one of several images, and not all of them in one."""

    id: str
    status: str
    progress: float | None
    image_url: str | None
    fail_reason: str
    state: str | None
    final_prompt: str | None
    banned_word: str | None = None
    grid: bool = True

    @classmethod
    def read(cls, document: object) -> Self | None:
        """Read a task; None for any other document."""
        fields = _TaskFields.read(unwrapped(document))
        job = read_job_id(fields.id)
        if job is None:
            return None
        properties = fields.properties or _Properties()
        image_url = fields.image_url or next(iter(fields.image_urls), None)
        return cls(
            id=job,
            status=(fields.status or "").strip().upper(),
            progress=_percent(fields.progress),
            image_url=None if image_url is None else image_url.strip(),
            fail_reason=fields.fail_reason or "",
            state=fields.state,
            final_prompt=properties.final_prompt,
            banned_word=properties.banned_word,
            grid=fields.image_url is not None or len(fields.image_urls) < 2,
        )

    @property
    def useful(self) -> bool:
        """Whether it has an image, or may still get one: the address may come a moment after the success."""
        return self.status not in (FAILURE, CANCELLED)

    @property
    def facts(self) -> dict[str, Any]:
        """The fields for the audit trail."""
        facts = {"taskId": self.id, "status": self.status, "finalPrompt": self.final_prompt}
        return {name: value for name, value in facts.items() if value}

    def failure(self) -> RunError:
        """Map the reason for having no image to an error."""
        reason = self.fail_reason.lower()
        if self.status == CANCELLED or any(word in reason for word in _CANCELLATIONS):
            return Refused(
                "The order was cancelled at the Midjourney proxy.",
                code="cancelled_there",
                hint="Requeue the run to order it again.",
                data=self.facts,
            )
        if any(word in reason for word in _MODERATION):
            facts = {**self.facts, "said": readable(self.fail_reason)}
            return MIDJOURNEY.refused("the prompt", facts, stage="input", categories=_list(self.banned_word))
        if any(word in reason for word in _TRANSIENT):
            return _failed(self.fail_reason, self.facts)
        return MIDJOURNEY.rejected(400, self.fail_reason or "no reason given.", self.facts)


def unwrapped(document: object) -> object:
    """Return what was asked for: the document, or what its envelope holds."""
    fields = as_object(document)
    held = (fields.get(name) for name in _ENVELOPES if "id" not in fields)
    return next((cast("object", value) for value in held if isinstance(value, dict | list)), document)


def submitted_job_id(document: object) -> str:
    """Read the id of a submitted job.

    Raises:
        RunError: If the job was not accepted.
    """
    reply = _Submission.read(document)
    code, reason = reply.code, reply.description or ""
    facts: Facts = {"code": code, "said": readable(reason)}
    match code:
        case 1 | 21 | 22 if (job := read_job_id(reply.result)) is not None:  # accepted, existed, queued
            return job
        case 23:  # the queue is full
            raise MIDJOURNEY.rate_limited(_QUEUE_WAIT, facts, blocks="provider")
        case 24:  # a banned word
            word = (reply.properties or _Properties()).banned_word
            raise MIDJOURNEY.refused("the prompt", facts, stage="input", categories=_list(word))
        case 3:  # no account
            raise Retryable(
                f"The Midjourney proxy has no account that could draw: {readable(reason) or 'no reason given.'}",
                code="provider_unavailable",
                hint="Look at the accounts in the proxy's settings.",
                retry_in=_ACCOUNT_WAIT,
                accepted=False,
                data=dict(facts),
            )
        case 4:  # invalid
            raise MIDJOURNEY.rejected(400, reason, facts)
        case 9:  # failed
            raise _failed(reason, facts)
        case _:
            raise MIDJOURNEY.unknown("The Midjourney proxy's answer does not name an order.", **facts)


def _failed(reason: str, facts: Facts) -> Retryable:
    return Retryable(
        f"Midjourney did not draw it: {readable(reason) or 'no reason given.'}",
        code="provider_unavailable",
        hint="",
        data=dict(facts),
    )


def _percent(value: object) -> float | None:
    count = as_count(value.strip().removesuffix("%") if isinstance(value, str) else value)
    return None if count is None else min(float(count), 100)


def is_own(body: ErrorBody) -> bool:
    """Return whether a body is an error of the proxy itself, and no page of a gateway in front of it."""
    return _code(body.fields.get("code")) is not None and isinstance(body.fields.get("description"), str)


def _list(word: str | None) -> list[str]:
    return [] if word is None else [word]
