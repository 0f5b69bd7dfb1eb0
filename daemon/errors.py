"""The errors of the daemon, each with its policy.

* ImageJobsError             a mistake of the operator's: one sentence and a cure, never a traceback
  x Misconfigured            the environment or the command line is wrong: commands exit with 2 instead of 1
* RunError                   why a run has no image: a sentence for the person at the canvas, a code, a hint
  x Refused                  final: another try would end the same way
  x Retryable                later: the provider said so, or something between us broke
  x OutcomeUnknown           the request was sent and no response came: it may have been paid for
  x Undecodable              final: something was made and paid for, and it is no picture that can be read
* DaemonFenced   (IJ001)     others took this daemon for dead: register anew
* DaemonTooOld   (IJ002)     the database's schema needs a newer daemon: final

The policy is on the error, so there is no table of which codes to retry.
Those with an SQLSTATE are raised by SQL; asyncpg finds the class by its `sqlstate`. A lost claim is no error: a sync
carries many runs, so each gets a result of its own (`lost`), and the others are not disturbed.

At the end: the errors that this machine's own disk may cause, when it is full or may not be written to. An image to refine
lies there before anything is sent, and a picture from the provider's response until it is stored.
"""

import errno
import os
import socket
import ssl
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TypeGuard

import asyncpg

Scope = Literal["provider", "model"]


class ImageJobsError(Exception):
    """A mistake that the operator can mend.

    Args:
        message: One sentence: what is wrong.
        hint: How to mend it.
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
        hint: How to get one all the same.
        data: More for the audit trail (a JSON object): request id, moderation categories, ...
        cost: USD that were paid all the same; None where unknown or nothing.
        charged: Whether the provider said that it charges for the call, also where `cost` is unknown.
        status: The HTTP status of the provider's response; None where none came, or it was not HTTP's.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        hint: str,
        data: dict[str, Any] | None = None,
        cost: float | None = None,
        charged: bool = False,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.hint = hint
        self.data = data or {}
        self.cost = cost
        self.charged = charged or cost is not None
        self.status = status


class Refused(RunError):
    """Final: the provider, or the daemon, will not do this, however often it is tried."""


class Retryable(RunError):
    """Not now: the run is tried again.

    Args:
        retry_in: Wait that the other side asked for; None leaves it to our own.
        accepted: False if the request surely was never accepted (429, blocked, no connection):
            the attempt is given back, as nothing can have been paid.
        own_error: True if the provider itself answered with 5xx and its own JSON error: nothing was charged, and the
            attempt is given back for at most five minutes.
        blocks: Close this provider, or this model, for every daemon until `retry_in` is over. Every user then reads the
            message: it has to be a sentence of our own, as a provider's words may be about one user's prompt.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str,
        hint: str,
        retry_in: timedelta | None = None,
        accepted: bool = True,
        own_error: bool = False,
        blocks: Scope | None = None,
        data: dict[str, Any] | None = None,
        cost: float | None = None,
        charged: bool = False,
        status: int | None = None,
    ) -> None:
        super().__init__(message, code=code, hint=hint, data=data, cost=cost, charged=charged, status=status)
        self.retry_in = retry_in
        self.accepted = accepted
        self.own_error = own_error
        self.blocks: Scope | None = blocks


class OutcomeUnknown(RunError):
    """The request went out and nothing usable came back: it may have been paid for.

    It is tried again only as the run's next attempt, and an event says so.
    """


class Undecodable(RunError):
    """Final: the provider made a picture, which is paid for, and it cannot be decoded. It is kept as it came.

    Args:
        message: A sentence for the person at the canvas.
        path: A file of the request's `workdir` with what came, as it came: the worker puts it into the bucket `images-kept`.
        data: As in `RunError`; `bytes`, the size of the file, is added.
        cost, status: As in `RunError`. The call is charged in any case.
    """

    def __init__(
        self,
        message: str,
        path: Path,
        *,
        data: dict[str, Any] | None = None,
        cost: float | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(
            message,
            code="undecodable",
            hint="What came is kept for the operator. Requeueing the run makes a new picture, which is paid for anew.",
            data={**(data or {}), "bytes": path.stat().st_size},
            cost=cost,
            charged=True,
            status=status,
        )
        self.path = path


class DaemonFenced(asyncpg.PostgresError):
    """Other daemons took this one for dead, and took its runs over."""

    sqlstate = "IJ001"


class DaemonTooOld(asyncpg.PostgresError):
    """The schema of the database is for newer daemons."""

    sqlstate = "IJ002"


ASK_OPERATOR = "Choose another model, or tell whoever runs this service."
"""The hint where the person at the canvas can do nothing else; `data["cure"]` is what an operator does."""

_OF_SOCKETS = (ConnectionError, TimeoutError, ssl.SSLError, socket.gaierror)
DISK_CODE = "storage_disk"
"""As all codes of storing do, it begins with `storage`: a requeue checks the same provider job again, instead of a new one."""
OUT_OF_FILES = {errno.EMFILE, errno.ENFILE}
_ROOM = "Make room where the daemon keeps its temporary files (IMAGE_JOBS_TMP_DIR), and see that it may write there"
_MORE_FILES = "Raise its limit of open files (ulimit -n), or lower IMAGE_JOBS_CONCURRENCY"


def is_disk_error(error: BaseException) -> TypeGuard[OSError]:
    """Return whether an error is one of files; errors of sockets have the same class in Python."""
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, _OF_SOCKETS)


def nothing_sent(error: OSError) -> Retryable:
    """Return the error where nothing had been sent: it costs neither money nor an attempt."""
    return Retryable(
        _sentence(error),
        code=DISK_CODE,
        hint=f"{_cure(error)}.",
        accepted=False,
        data=_data(error),
    )


def response_lost(error: OSError) -> OutcomeUnknown:
    """Return the error where the request had been sent, and its response could not be kept."""
    return OutcomeUnknown(
        _sentence(error),
        code=DISK_CODE,
        hint=f"{_cure(error)}. It may have been paid for; another attempt makes a new one.",
        data=_data(error),
    )


def not_stored(error: RunError | OSError) -> RunError:
    """Return the error where the picture had been made and could not be stored, which is final however passing the reason is."""
    if isinstance(error, Retryable):
        error.hint = f"{error.hint} Requeue the run once that has passed.".strip()
    if isinstance(error, RunError):
        return error
    return Refused(_sentence(error), code=DISK_CODE, hint=f"{_cure(error)}, then requeue the run.", data=_data(error))


def describe_shortage(error: OSError) -> tuple[str, str]:
    """Return what this machine has run out of, in a sentence, and the cure, for its operator."""
    return _sentence(error), f"{_cure(error)}."


def _cure(error: OSError) -> str:
    return _MORE_FILES if error.errno in OUT_OF_FILES else _ROOM


def _sentence(error: OSError) -> str:
    if error.errno in OUT_OF_FILES:
        return "The daemon has run out of file descriptors."
    return f"The daemon cannot use its disk: {os.strerror(error.errno or 0)}."


def _data(error: OSError) -> dict[str, str]:
    """Return the error's name, without the path: that is this machine's business."""
    return {"errno": errno.errorcode.get(error.errno or 0, str(error.errno))}
