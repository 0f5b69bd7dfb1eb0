"""The trouble that a loop has with the database: what to log of it, and how long to pause.

No error decides here whether a loop lives on: each does, whatever the database, a pooler or a trigger of the application
says. What an error is decides only what is done next.
"""

import random

import structlog

from daemon.database import EXPECTED
from daemon.errors import ImageJobsError, RunError

log = structlog.stdlib.get_logger()

SHORTEST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
"""Seconds between two tries to reach a database that is away."""


class Outage:
    """Logs where the trouble begins, changes and ends; pauses that grow lie between.

    Args:
        event: The event's name in the log, `thing.verb`.
        over: The event's name when the trouble is over.
        longest: Seconds that a pause grows to.
    """

    def __init__(self, event: str, over: str, *, longest: float = LONGEST_PAUSE) -> None:
        self._event = event
        self._over = over
        self._longest = longest
        self._reason: str | None = None
        self.failures = 0

    def failed(self, error: BaseException, **fields: object) -> float:
        """Log an error, once while it stays the same. Returns the seconds to pause.

        Args:
            error: What was raised.
            fields: More for the line.
        """
        self.failures += 1
        reason = describe(error)
        if reason != self._reason:
            self._reason = reason
            expected = isinstance(error, (*EXPECTED, ImageJobsError, RunError))
            trace = None if expected else error  # any other may be a bug of ours
            log.warning(self._event, **fields, error=reason, failures=self.failures, exc_info=trace)
        pause = min(SHORTEST_PAUSE * 2 ** min(self.failures, 16), self._longest)
        return pause * random.uniform(0.5, 1.0)  # noqa: S311 - jitter

    def passed(self) -> None:
        """Log that the trouble is over, if there was any."""
        if self.failures:
            log.info(self._over, failures=self.failures)
        self.failures, self._reason = 0, None


def describe(error: BaseException) -> str:
    """Return an error in one line: its class, its SQLSTATE where it has one, and its first line."""
    if isinstance(error, ImageJobsError | RunError):
        return error.message
    name = type(error).__name__
    if isinstance(sqlstate := getattr(error, "sqlstate", None), str):
        name = f"{name} ({sqlstate})"
    message = str(error).strip().split("\n", 1)[0]
    return f"{name}: {message[:300]}" if message else name
