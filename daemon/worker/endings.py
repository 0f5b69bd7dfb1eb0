"""Chooses the outcome of an attempt that ends without a picture, by what happened."""

from datetime import timedelta

from daemon.calls import Call
from daemon.errors import OutcomeUnknown, Retryable, RunError
from daemon.events import Event
from daemon.providers import Submitted, Waiting
from daemon.run import ClaimedRun
from daemon.worker.outcomes import Failed, Failure, Parked, Released, Retry
from daemon.worker.reporter import RunReporter
from daemon.worker.retries import should_fall_back

CRASHED = "Something went wrong inside the daemon."
STOPPED = "The daemon had to stop while it was at work."
AT_WORK = "The provider is at work."
OWN_ERROR_REFUND = 300.0
"""Seconds for which a provider's own server errors cost no attempt."""
CRASH_REFUND = 60.0
"""Seconds for which a bug of ours before sending costs no attempt: one that stays must end."""
HANDED_OVER = "download"
"""Errors whose code begins so: the picture was made, but could not be fetched."""


def failed(error: RunError, run: ClaimedRun, reporter: RunReporter, *, wait: float) -> Failed | Retry:
    """Return the outcome of an attempt that failed, by the policy of its error.

    Args:
        error: The error; the time after which to try again is its `retry_in`, where it names one.
        wait: Seconds until the next try otherwise.
    """
    failure = Failure.of(error)
    events: list[Event] = []
    call = _call(error, reporter)
    if error.charged:
        charged = {"cost": error.cost, "processor": run.processor}
        events.append(Event("charged", "The provider charged for it all the same.", data=charged))
    if error.data.get("incident"):
        events.append(Event("incident", error.message, "error", error.data))
    refund, refund_for = False, None
    match error:
        case OutcomeUnknown():
            if reporter.requested:
                events.append(_unknown_outcome(reporter, error.message))
            refund = not reporter.requested
        case Retryable():
            refund = error.own_error or not error.accepted or not reporter.requested
            refund_for = _refund_for(error)
            if error.retry_in is not None:
                wait = error.retry_in.total_seconds()
        case _:
            return Failed(failure, should_fall_back(error, run, wait=0), events=events, calls=[call])
    message = f"{error.message} Trying again in {max(1, round(wait))} s."
    fall_back = should_fall_back(error, run, wait=wait)
    return Retry(failure, wait, message, refund, fall_back, refund_for, events=events, calls=[call])


def crash(reporter: RunReporter) -> OutcomeUnknown | Retryable | None:
    """Return the error for a bug of ours. After the request was sent it may have been paid for, so the run is tried again as its
    next attempt. Before, it is tried again for nothing: another daemon may do better. None where the picture came: then
    another attempt would meet the same."""
    if reporter.paid is not None:
        return None
    if not reporter.sent:
        hint = "Its log has the details. Nothing was sent or paid."
        return Retryable(CRASHED, code="internal", hint=hint, accepted=False)
    hint = "The daemon's log has the details. It may have been paid for; another attempt makes a new one."
    return OutcomeUnknown(CRASHED, code="outcome_unknown", hint=hint)


def check_crashed() -> Retryable:
    """Return the error for a bug of ours while a provider job was checked: the job is checked again."""
    return Retryable(CRASHED, code="internal", hint="Its log has the details.")


def crashed(reporter: RunReporter) -> Failed:
    """Return the outcome of an attempt that met a bug of ours; the traceback is in the log."""
    failure = Failure(CRASHED, "internal", "Its log has the details. Requeue the run once that is mended.")
    return Failed(failure, events=_unaccounted(reporter, CRASHED), calls=[_call_so_far(reporter)])


def stopped(reporter: RunReporter) -> Released | Retry:
    """Return the outcome of an attempt that was cancelled: its claim is lost (`dropped`), or the daemon must leave.

    A request whose provider job a webhook may still name is not sent again before that.
    """
    unknown = _unaccounted(reporter, "The call to the provider was broken off; it may have been charged.")
    if reporter.dropped or not reporter.sent:
        told = reporter.sent or reporter.paid is not None or not reporter.requested
        calls = [_call_so_far(reporter)] if told else None
        message = "Handed back by a daemon that had to stop."
        return Released(message, if_lost=unknown[0] if unknown else None, calls=calls)
    hint = "The provider may have charged for it."
    wait = reporter.webhook_wait.total_seconds() if reporter.webhook_wait is not None else 0
    calls = [_call_so_far(reporter)]
    message = f"{STOPPED} Another tries again."
    return Retry(Failure(STOPPED, "outcome_unknown", hint), wait, message, events=unknown, calls=calls)


def came_late(call: Call, reporter: RunReporter) -> Released:
    """Return the outcome of a picture whose claim was lost before it could be written down."""
    message = "The image came after the run had been taken away; it was not used."
    late = Event("late", message, data={"cost": call.cost, "processor": reporter.processor})
    return Released(if_lost=late, calls=[call])


def submitted(job: Submitted, run: ClaimedRun, reporter: RunReporter, *, due: timedelta) -> Parked:
    """Return the outcome that writes a provider job's id down: from then on, any daemon can check it."""
    late = "The provider took the order after the run had been taken away."
    return Parked(
        job.job_id,
        due.total_seconds(),
        job.message or AT_WORK,
        job.webhook,
        ticket=run.ticket,
        processor=run.processor,
        found=not reporter.sent,
        if_lost=Event("late_provider_job", late, data={"providerJobId": job.job_id}),
        calls=[reporter.call("open", provider_job_id=job.job_id)],
    )


def still_waiting(job_id: str, waiting: Waiting, *, due: timedelta, webhook: bool) -> Parked:
    """Return the outcome of a check that found the provider job unfinished; `webhook`: one will come when it is."""
    progress = None if waiting.progress is None else min(int(waiting.progress), 99)
    return Parked(job_id, due.total_seconds(), waiting.message or AT_WORK, webhook, progress)


def _refund_for(error: Retryable) -> float | None:
    """Return the seconds for which an error costs no attempt; None for the usual hour."""
    if error.own_error:
        return OWN_ERROR_REFUND
    return CRASH_REFUND if error.code == "internal" else None


def _call(error: RunError, reporter: RunReporter) -> Call:
    """Return what an error says about the call of its attempt."""
    if reporter.paid is not None:
        return reporter.paid
    if not reporter.requested:
        return reporter.call("free")
    if error.charged or error.code.startswith(HANDED_OVER):
        return reporter.call("charged", cost=error.cost)
    # What fails before the provider was asked about its job says nothing about that, which may be drawing.
    asked = reporter.sent or reporter.asked
    unknown = isinstance(error, OutcomeUnknown) or error.code == "polling_timeout" or not asked
    return reporter.call("unknown" if unknown else "free")


def _call_so_far(reporter: RunReporter) -> Call:
    """Return what is known of the call of an attempt that was broken off."""
    return reporter.paid or reporter.call("unknown" if reporter.requested else "free")


def _unaccounted(reporter: RunReporter, message: str) -> list[Event]:
    """Return the event for a call that may have been paid for; none if it was not sent, or its cost is written down."""
    if not reporter.sent or reporter.accounted:
        return []
    return [_unknown_outcome(reporter, message)]


def _unknown_outcome(reporter: RunReporter, message: str) -> Event:
    data = {"possibleCost": reporter.estimate, "processor": reporter.processor}
    return Event("unknown_outcome", message, "error", data)
