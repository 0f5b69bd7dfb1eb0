"""Map errors of requests about a provider job: they are free, and say nothing about the job."""

from daemon.errors import OutcomeUnknown, Refused, Retryable, RunError


def look_up_failed(error: RunError) -> RunError:
    """Map an error of a request about a provider job that is free: nothing was bought by it, and no attempt is lost. A wrong key
    may be replaced meanwhile; what is refused otherwise stays so."""
    match error:
        case OutcomeUnknown() | Refused(code="authentication" | "permission"):
            return _asked_again(error)
        case Retryable():
            error.accepted = False
        case _:
            pass
    return error


def check_failed(error: RunError) -> Retryable:
    """Map an error of the request by which a provider job is checked. It is about that request, and says nothing about the job,
    which may draw: it is checked again, whatever the status."""
    if not isinstance(error, Retryable):
        return _asked_again(error)
    error.accepted = False
    return error


def _asked_again(error: RunError) -> Retryable:
    return Retryable(
        error.message,
        code="provider_unavailable",
        hint="",
        accepted=False,
        data=error.data,
        status=error.status,
    )
