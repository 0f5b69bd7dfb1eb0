"""What this machine's own disk may do to a run: it is full, or may not be written to. A sentence, with a cure.

An image to refine lies there before anything is sent, and a picture from the provider's answer until it is stored.
"""

import errno
import socket
import ssl
from typing import TypeGuard

from daemon.errors import OutcomeUnknown, Refused, Retryable, RunError

_OF_SOCKETS = (ConnectionError, TimeoutError, ssl.SSLError, socket.gaierror)
CODE = "storage_disk"
"""As all codes of storing do, it begins with `storage`: an order that is requeued is asked for again, not made again."""
_ROOM = "Make room where the daemon keeps its temporary files (IMAGE_JOBS_TMP_DIR), and see that it may write there"


def is_disk(error: BaseException) -> TypeGuard[OSError]:
    """Whether an error is one of files; what sockets raise is of the same class in Python."""
    return isinstance(error, OSError) and error.errno is not None and not isinstance(error, _OF_SOCKETS)


def untouched(error: OSError) -> Retryable:
    """Nothing had been sent: it costs neither money nor an attempt."""
    return Retryable(
        _said(error), code=CODE, hint=f"{_ROOM}. It is tried again by itself.", accepted=False, data=_data(error)
    )


def answer_lost(error: OSError) -> OutcomeUnknown:
    """The request had been sent, and its answer could not be kept."""
    return OutcomeUnknown(
        _said(error),
        code=CODE,
        hint=f"{_ROOM}. It may have been paid for; the next attempt makes a new one.",
        data=_data(error),
    )


def not_stored(error: RunError | OSError) -> RunError:
    """The picture had been made and could not be stored; an error of ours stays as it is."""
    if isinstance(error, RunError):
        return error
    return Refused(_said(error), code=CODE, hint=f"{_ROOM}, then requeue the run.", data=_data(error))


def _said(error: OSError) -> str:
    return f"The daemon cannot use its disk: {error.strerror}."


def _data(error: OSError) -> dict[str, str]:
    """Not the path: it is this machine's business."""
    return {"errno": errno.errorcode.get(error.errno or 0, str(error.errno))}
