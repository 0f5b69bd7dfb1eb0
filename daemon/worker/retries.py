"""When a failed attempt is tried again (exponential, with jitter), and whether another provider takes it instead.

Refusals (429, no connection) count as well, though they cost no attempt. So tries are counted here, for each processor that
a run goes to; a daemon that has just started goes by the attempt alone.

Where a run falls back to is the database's business (`image_jobs.settle_runs`): the next step of `metadata.fallback`, if
there is one left.
"""

import random

from daemon.errors import OutcomeUnknown, RunError
from daemon.run import ClaimedRun

FIRST_WAIT = 2.0
"""Seconds before the second try; doubled for each further one."""
LONGEST_WAIT = 60.0
JITTER = 0.25
"""Of the wait, more or less: runs that failed together are not to come back together."""
MOST_RUNS = 10_000
"""That are counted; one that falls back is settled by another daemon, so the oldest is forgotten."""

LONGEST_RATE_LIMIT = 30.0
"""Seconds: shorter rate limits are waited for rather than escaped, as all blocks are; `image_jobs.closed_reason` has the same."""

FALLBACK_CODES = {
    # down
    *("unreachable", "provider_unavailable", "timeout", "polling_timeout"),
    # out of quota or credit
    *("billing", "quota_daily"),
    # closed to us
    *("no_key", "authentication", "permission"),
    # not there, or not any more
    *("model_retired", "unknown_model", "unknown_provider", "not_found"),
}
"""Errors that another provider may not have. A run that names another wants a picture now, so that even a passing one is
not waited for. An error of the request, the previous image or our storage would be the same everywhere."""

_NO_RESPONSE = {"outcome_unknown", "timeout"}
"""The codes of an unknown outcome that lie with the provider, and not with our disk."""


class Retries:
    """Counts the tries of this daemon's runs."""

    def __init__(self) -> None:
        self._tries: dict[tuple[str, str], int] = {}

    def next(self, run: ClaimedRun) -> float:
        """Count a failed try; return the seconds until the next one."""
        key = run.id, run.processor
        tries = self._tries.pop(key, 0) + 1
        self._tries[key] = tries
        if len(self._tries) > MOST_RUNS:
            del self._tries[next(iter(self._tries))]
        wait = min(FIRST_WAIT * 2 ** (max(tries, run.attempt) - 1), LONGEST_WAIT)
        return wait * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - jitter

    def forget(self, run: ClaimedRun) -> None:
        """Forget the tries of a run that is not tried again."""
        self._tries.pop((run.id, run.processor), None)


def should_fall_back(error: RunError, run: ClaimedRun, *, wait: float) -> bool:
    """Return whether the run should fall back to its next provider, instead of failing or a new try in `wait` seconds.

    A call whose outcome is unknown may have been paid for: its attempts are used up first. A refusal of the content is
    final, unless the caller has said otherwise (`metadata.fallbackOnRefusal`).
    """
    if isinstance(error, OutcomeUnknown):
        return error.code in _NO_RESPONSE and run.attempt >= run.max_attempts
    if error.code == "content_policy":
        return run.metadata.get("fallbackOnRefusal") is True
    if error.code == "rate_limited":
        return wait >= LONGEST_RATE_LIMIT
    return error.code in FALLBACK_CODES
