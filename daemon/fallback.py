"""Whether another provider may do better where one has failed: `metadata.fallback`.

This is the one place that decides it, by the error's code. Where the run then goes is the database's business
(`private.settle_runs`): to the next step of its list, if there is one left.
"""

from daemon.errors import OutcomeUnknown, RunError
from daemon.queue import Claimed

LONGEST_RATE_LIMIT = 10.0
"""Seconds of a rate limit that are waited for rather than escaped; `private.why_closed` has the same."""

_CANNOT = {
    # down
    *("unreachable", "provider_unavailable", "timeout", "polling_timeout"),
    # out of quota or credit
    *("billing", "quota_daily"),
    # closed to us
    *("no_key", "authentication", "permission"),
    # not there, or not any more
    *("model_retired", "unknown_model", "unknown_provider", "not_found"),
}
"""What this provider cannot do now, and another may. Whoever names another wants a picture now, so that even what may
pass is not waited for. Whatever is wrong with the request, the previous image or our storage is wrong everywhere."""

_SILENT = {"outcome_unknown", "timeout"}
"""Of what ends with an unknown outcome: that which lies with the provider, and not with our disk."""


def elsewhere(error: RunError, run: Claimed, *, wait: float) -> bool:
    """Whether the run should go on to its next provider instead of being tried again in `wait` seconds, or failing.

    A call whose outcome is unknown may have been paid for: its attempts are used up first. A refusal of the content is
    final, unless the caller has said otherwise.
    """
    if isinstance(error, OutcomeUnknown):
        return error.code in _SILENT and run.attempt >= run.max_attempts
    if error.code == "content_policy":
        return run.metadata.get("fallbackOnRefusal") is True
    if error.code == "rate_limited":
        return wait >= LONGEST_RATE_LIMIT
    return error.code in _CANNOT
