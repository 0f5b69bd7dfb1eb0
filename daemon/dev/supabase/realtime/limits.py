"""The rate limit of a project: what goes beyond it is dropped without a word to the client, as by the real server."""

import time
from collections import deque
from collections.abc import Callable

import structlog

log = structlog.stdlib.get_logger()

WINDOW = 60
"""Seconds over which the real server takes the average."""


class RateLimit:
    """Counts messages to clients: each delivery is one.

    Args:
        per_second: The limit, an average over `WINDOW`; None for no limit. With 0 nothing gets through.
        clock: Seconds that only grow.
    """

    def __init__(self, per_second: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._most = None if per_second is None else per_second * WINDOW
        self._seconds: deque[tuple[int, int]] = deque()
        self._total = 0
        self._silent = False

    def admits(self) -> bool:
        """Whether a message may be delivered; it is counted then."""
        if self._most is None:
            return True
        now = int(self._clock())
        while self._seconds and self._seconds[0][0] <= now - WINDOW:
            self._total -= self._seconds.popleft()[1]
        admitted = self._total < self._most
        if admitted:
            counted = self._seconds.pop()[1] if self._seconds and self._seconds[-1][0] == now else 0
            self._seconds.append((now, counted + 1))
            self._total += 1
        elif not self._silent:
            log.warning("realtime.rate_limited", remark="Messages are dropped: clients are told nothing.")
        self._silent = not admitted
        return admitted
