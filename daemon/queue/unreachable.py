"""The providers that this daemon cannot reach just now, of which it claims nothing.

A connection that fails is the business of this machine, its network or its proxy: others may reach the provider, so it is
closed for this daemon alone. Server errors close it for all daemons (`image_jobs.provider_streaks`).
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

log = structlog.stdlib.get_logger()

STREAK = 3
"""Failed connections in a row that close a provider."""
FIRST_PAUSE = 4.0
"""Seconds; doubled each time the provider still cannot be reached after a pause. As `image_jobs.note_responses` does."""
LONGEST_PAUSE = 60.0


@dataclass(slots=True)
class _Trouble:
    failures: int = 0
    closings: int = 0
    until: float = 0.0


class Unreachable:
    """Counts failed connections, by provider.

    Args:
        clock: Seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._troubles: dict[str, _Trouble] = {}

    def failed(self, provider: str) -> None:
        """Count a call that did not reach the provider. Calls that were under way when it was closed do not count again."""
        now = self._clock()
        trouble = self._troubles.setdefault(provider, _Trouble())
        if now < trouble.until:
            return
        trouble.failures += 1
        if trouble.failures < STREAK and not trouble.closings:
            return
        pause = min(FIRST_PAUSE * 2**trouble.closings, LONGEST_PAUSE)
        trouble.until = now + pause
        trouble.closings = min(trouble.closings + 1, 9)
        log.warning("provider.unreachable", provider=provider, again_in=pause)

    def reached(self, provider: str) -> None:
        """Forget the trouble: the provider has answered."""
        trouble = self._troubles.pop(provider, None)
        if trouble is not None and trouble.closings:
            log.info("provider.reached", provider=provider)

    def closed(self) -> list[str]:
        """Return the providers of which nothing is to be claimed now."""
        now = self._clock()
        return [provider for provider, trouble in self._troubles.items() if now < trouble.until]
