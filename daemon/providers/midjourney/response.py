"""What a midjourney-proxy answers, and what we make of it.

It answers 200 to almost everything: what happened is in a code of its own, and what it does not know is an empty body.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self

from daemon.errors import Refused, Retryable, RunError
from daemon.providers.vendor import Facts, Vendor, as_object, order_name, readable

MIDJOURNEY = Vendor(
    "Midjourney",
    provider="midjourney",
    key="MIDJOURNEY_API_KEY",
    address="MIDJOURNEY_API_URL",
    account="the settings of the midjourney-proxy",
)
SUCCESS, FAILURE, CANCELLED, MODAL = "SUCCESS", "FAILURE", "CANCEL", "MODAL"
_QUEUE_WAIT = timedelta(seconds=15)
_ACCOUNT_WAIT = timedelta(seconds=60)
_NOT_WANTED = ("banned", "moderat", "blocked", "violat", "违禁", "敏感")
_PASSING = ("timeout", "timed out", "queue", "busy", "try again", "internal", "超时", "队列", "系统异常", "连接")
_TAKEN_BACK = ("取消", "cancel")


@dataclass(frozen=True, slots=True)
class Task:
    """An order as the proxy sees it. `progress` is 0-100; what it did not tell, or told wrongly, is None."""

    id: str
    status: str
    progress: float | None
    image_url: str | None
    fail_reason: str
    state: str | None
    final_prompt: str | None
    banned_word: str | None = None

    @classmethod
    def read(cls, document: object) -> Self | None:
        """Reads a task; None if it is none."""
        fields = as_object(document)
        name = order_name(_text(fields.get("id")))
        if name is None:
            return None
        properties = as_object(fields.get("properties"))
        return cls(
            id=name,
            status=_text(fields.get("status")) or "",
            progress=_percent(fields.get("progress")),
            image_url=_text(fields.get("imageUrl")),
            fail_reason=_text(fields.get("failReason")) or "",
            state=_text(fields.get("state")),
            final_prompt=_text(properties.get("finalPrompt")),
            banned_word=_text(properties.get("bannedWord")),
        )

    @property
    def useful(self) -> bool:
        """Whether it has a picture, or may still get one."""
        return self.image_url is not None if self.status == SUCCESS else self.status not in (FAILURE, CANCELLED)

    @property
    def facts(self) -> dict[str, Any]:
        """For the audit trail."""
        facts = {"taskId": self.id, "status": self.status, "finalPrompt": self.final_prompt}
        return {name: value for name, value in facts.items() if value}

    def failure(self) -> RunError:
        """Why it has no picture."""
        said = self.fail_reason.lower()
        if self.status == CANCELLED or any(word in said for word in _TAKEN_BACK):
            return Refused(
                "The order was cancelled at the Midjourney proxy.",
                code="cancelled_there",
                hint="Requeue the run to order it again.",
                data=self.facts,
            )
        if any(word in said for word in _NOT_WANTED):
            facts = {**self.facts, "said": readable(self.fail_reason)}
            return MIDJOURNEY.refused("the prompt", facts, stage="input", categories=_list(self.banned_word))
        if any(word in said for word in _PASSING):
            return _failed(self.fail_reason, self.facts)
        return MIDJOURNEY.rejected(400, self.fail_reason or "no reason given.", self.facts)


def order_id(document: object) -> str:
    """The id of an order that was accepted.

    Raises:
        RunError: If it was not.
    """
    reply = as_object(document)
    code, said = reply.get("code"), _text(reply.get("description")) or ""
    properties = as_object(reply.get("properties"))
    facts: Facts = {"code": code, "said": readable(said)}
    match code:
        case 1 | 21 | 22 if (name := order_name(_text(reply.get("result")))) is not None:  # accepted, existed, queued
            return name
        case 23:  # the queue is full
            raise MIDJOURNEY.rate_limited(_QUEUE_WAIT, facts, blocks="provider")
        case 24:  # a banned word
            word = _text(properties.get("bannedWord"))
            raise MIDJOURNEY.refused("the prompt", facts, stage="input", categories=_list(word))
        case 3:  # no account
            raise Retryable(
                f"The Midjourney proxy has no account that could draw: {readable(said) or 'no reason given.'}",
                code="provider_unavailable",
                hint="Look at the accounts in the proxy's settings. It is tried again by itself.",
                retry_in=_ACCOUNT_WAIT,
                accepted=False,
                data=dict(facts),
            )
        case 4:  # invalid
            raise MIDJOURNEY.rejected(400, said, facts)
        case 9:  # failed
            raise _failed(said, facts)
        case _:
            raise MIDJOURNEY.unknown("The Midjourney proxy's answer does not name an order.", **facts)


def _failed(said: str, facts: Facts) -> Retryable:
    return Retryable(
        f"Midjourney did not draw it: {readable(said) or 'no reason given.'}",
        code="provider_unavailable",
        hint="It is tried again by itself.",
        data=dict(facts),
    )


def _text(value: object) -> str | None:
    """Ids are numbers in some proxies."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) and value else None


def _percent(value: object) -> float | None:
    text = value.strip().removesuffix("%") if isinstance(value, str) else ""
    return min(float(text), 100) if text.isdecimal() else None


def _list(word: str | None) -> list[str]:
    return [] if word is None else [word]
