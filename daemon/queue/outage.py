"""How long a run that is to be tried again waits for that: exponential, with jitter.

Refusals (429, no connection) count as well, though they cost no attempt. So tries are counted here, for each processor that
a run goes to; a daemon that has just started goes by the attempt alone.
"""

import random

from daemon.queue import Claimed

FIRST_WAIT = 2.0
"""Seconds before the second try; doubled for each further one."""
LONGEST_WAIT = 60.0
JITTER = 0.25
"""Of the wait, more or less: what failed together is not to come back together."""
MOST_RUNS = 10_000
"""That are counted; one that goes on elsewhere is never heard of again, so the oldest is forgotten."""


class BackOff:
    """Counts the tries of this daemon's runs."""

    def __init__(self) -> None:
        self._tries: dict[tuple[str, str], int] = {}

    def next(self, run: Claimed) -> float:
        """Counts a try that came to nothing; answers the seconds until the next one."""
        key = run.id, run.processor
        tries = self._tries.pop(key, 0) + 1
        self._tries[key] = tries
        if len(self._tries) > MOST_RUNS:
            del self._tries[next(iter(self._tries))]
        wait = min(FIRST_WAIT * 2 ** (max(tries, run.attempt) - 1), LONGEST_WAIT)
        return wait * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - jitter

    def forget(self, run: Claimed) -> None:
        """The run is not tried again."""
        self._tries.pop((run.id, run.processor), None)
