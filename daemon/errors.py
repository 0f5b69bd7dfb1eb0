"""What can go wrong, and what is done about it.

* ImageJobsError             a mistake of the operator's: one sentence and a cure, never a traceback
  x Misconfigured            the environment or the command line is wrong: commands exit with 2 instead of 1
* RunError                   why a run has no image: a sentence for the person at the canvas, a code, a hint
  x Refused                  final: asking again would give the same answer
  x Retryable                later: the provider said so, or something between us broke
  x OutcomeUnknown           the request was sent and no answer came: it may have been paid for
* DaemonFenced   (IJ001)     others took this daemon for dead: register anew

The policy is on the error, so nobody has to keep a table of which codes to retry.
The one with an SQLSTATE is raised by SQL; asyncpg finds the class by its `sqlstate`. A lost claim is no error: turns
carry many runs, so each gets an answer of its own (`lost`), and the others are not disturbed.
"""

from datetime import timedelta
from typing import Any, Literal

import asyncpg

Scope = Literal["provider", "model"]


class ImageJobsError(Exception):
    """Something the operator can mend.

    Args:
        message: One sentence: what is wrong.
        hint: What to do about it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class Misconfigured(ImageJobsError):
    """The environment or the command line is wrong."""


class RunError(Exception):
    """Why a run has no image.

    Args:
        message: A sentence for the person at the canvas. No secrets, no image bytes.
        code: Stable word for programs, `snake_case`, e.g. `content_policy`.
        hint: What to do about it.
        data: More for the audit trail (a JSON object): request id, moderation categories, ...
        cost: What was paid all the same, in USD; None where unknown or nothing.
    """

    def __init__(
        self, message: str, *, code: str, hint: str, data: dict[str, Any] | None = None, cost: float | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.hint = hint
        self.data = data or {}
        self.cost = cost


class Refused(RunError):
    """Final: the provider, or we, will not do this, however often it is asked."""


class Retryable(RunError):
    """Not now.

    Args:
        retry_in: Wait that the other side asked for; None leaves it to our back-off.
        accepted: False if the request surely was never accepted (429, blocked, no connection):
            the attempt is given back, as nothing can have been paid.
        blocks: Close this provider, or this model, for every daemon until `retry_in` is over.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        hint: str,
        retry_in: timedelta | None = None,
        accepted: bool = True,
        blocks: Scope | None = None,
        data: dict[str, Any] | None = None,
        cost: float | None = None,
    ) -> None:
        super().__init__(message, code=code, hint=hint, data=data, cost=cost)
        self.retry_in = retry_in
        self.accepted = accepted
        self.blocks: Scope | None = blocks


class OutcomeUnknown(RunError):
    """The request went out and nothing usable came back: it may have been paid for.

    It is tried again only as the run's next attempt, and an event says so.
    """


class DaemonFenced(asyncpg.PostgresError):
    """Other daemons took this one for dead and took its runs over."""

    sqlstate = "IJ001"
