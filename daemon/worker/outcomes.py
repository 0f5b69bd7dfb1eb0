"""How the end of an attempt is worded for `private.settle_runs`: one function per way an attempt can end without a picture.

The ways that end with a picture are in `publisher.py`.
"""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from daemon.errors import OutcomeUnknown, Retryable, RunError
from daemon.fallback import elsewhere
from daemon.providers import Submitted, Waiting
from daemon.queue import Claimed
from daemon.reporter import RunReporter, event

Body = dict[str, Any]

CRASHED = "Something went wrong inside the daemon."
STOPPED = "The daemon had to stop while it was at work."
AT_WORK = "The provider is at work."


def failure(message: str, code: str, hint: str, details: Mapping[str, Any] | None = None) -> Body:
    """A final end with a reason."""
    payload: Body = {"error": message, "code": code, "hint": hint}
    if details:
        payload["details"] = details
    return {"outcome": "failed", "payload": payload, "events": []}


def failed(error: RunError, run: Claimed, reporter: RunReporter, *, back_off: float) -> Body:
    """What went wrong, and by its policy whether it is tried again: in the time it names, else after `back_off` seconds.

    Or at another provider, where the run names one that may do better.
    """
    body = failure(error.message, error.code, error.hint, error.data)
    if error.cost is not None:
        body["events"].append(
            event("charged", "The provider charged for it all the same.", cost=error.cost, processor=run.processor)
        )
    if error.data.get("incident"):
        body["events"].append(event("incident", error.message, kind="error", **error.data))
    match error:
        case OutcomeUnknown():
            body["events"].append(_unknown_outcome(reporter, error.message))
            body.update(outcome="retry", due_in=back_off)
        case Retryable():
            wait = error.retry_in.total_seconds() if error.retry_in is not None else back_off
            body.update(outcome="retry", due_in=wait, refund=not error.accepted)
        case _:
            pass
    if "due_in" in body:
        body["message"] = f"{error.message} Trying again in {max(1, round(body['due_in']))} s."
    if elsewhere(error, run, wait=body.get("due_in", 0)):
        body["elsewhere"] = True
    return body


def crashed(reporter: RunReporter) -> Body:
    """A bug of ours; the traceback is in the log."""
    body = failure(CRASHED, "internal", "Its log has the details. Requeue the run once that is mended.")
    return {**body, "events": _unaccounted(reporter, CRASHED)}


def stopped(reporter: RunReporter, *, dropped: bool) -> Body:
    """Cancelled from outside (`dropped`: the claim is gone), or handed back because the daemon must leave.

    An order of which a webhook may still tell is not made again before.
    """
    unknown = _unaccounted(reporter, "The call to the provider was broken off; it may have been charged.")
    if dropped or not reporter.sent:
        body: Body = {"outcome": "released", "message": "Handed back by a daemon that had to stop."}
        return {**body, "if_lost": unknown[0]} if unknown else body
    hint = "The provider may have charged for it. Requeue the run to try again."
    return {
        **failure(STOPPED, "outcome_unknown", hint),
        "outcome": "retry",
        "due_in": reporter.webhook_wait.total_seconds() if reporter.webhook_wait is not None else 0,
        "message": f"{STOPPED} Another tries again.",
        "events": unknown,
    }


def came_late(run: Claimed, cost: float | None) -> Body:
    """A picture for a claim that was gone before it could be written down."""
    message = "The image came after the run had been taken away; it was not used."
    return {"outcome": "released", "if_lost": event("late", message, cost=cost, processor=run.processor)}


def parked(order: Submitted, run: Claimed, *, due: timedelta) -> Body:
    """Writes the order's id down before anything else is done with it: from then on any daemon can ask.

    By ticket and processor it finds its run, or is cancelled there, if the claim is gone.
    """
    late = "The provider took the order after the run had been taken away."
    return {
        "outcome": "parked",
        "provider_job_id": order.job_id,
        "due_in": due.total_seconds(),
        "webhook": order.webhook,
        "ticket": run.ticket,
        "processor": run.processor,
        "message": order.message or AT_WORK,
        "if_lost": event("late_order", late, providerJobId=order.job_id),
    }


def still_waiting(job_id: str | None, waiting: Waiting, *, due: timedelta, webhook: bool) -> Body:
    """Asked, and not ready yet. `webhook`: the provider will say when it is."""
    return {
        "outcome": "parked",
        "provider_job_id": job_id,
        "due_in": due.total_seconds(),
        "webhook": webhook,
        "message": waiting.message or AT_WORK,
        "progress": None if waiting.progress is None else min(int(waiting.progress), 99),
    }


def _unaccounted(reporter: RunReporter, message: str) -> list[Body]:
    """The event for a call that may have been paid for; none if it was not sent, or its cost is written down."""
    if not reporter.sent or reporter.accounted:
        return []
    return [_unknown_outcome(reporter, message)]


def _unknown_outcome(reporter: RunReporter, message: str) -> Body:
    return event("unknown_outcome", message, kind="error", possibleCost=reporter.estimate, processor=reporter.processor)
