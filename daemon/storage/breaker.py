"""Closes while storage takes no uploads: until it does, no run is claimed, as its picture would be paid for and lost.

Closed at the start, until a first look has shown that an upload works; later after failed uploads in a row, or a refusal
that is about the bucket or the key. Any upload that succeeds opens it, also one of a picture that waits.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime

import structlog

from daemon.errors import DISK_CODE, Refused, Retryable, RunError

log = structlog.stdlib.get_logger()

STREAK = 2
"""Failed uploads in a row that close it: one alone may be a hiccup, and is tried again."""
FIRST_PAUSE = 1.0
"""Seconds between the first two looks; doubled for each further one."""
LONGEST_PAUSE = 30.0

_CURE = "See whether the project's Storage works and SUPABASE_URL is its address; it is looked at again by itself."
LEASE_CODE = "storage_lease"
"""The code of an upload that ended with the daemon's lease: like one of its own disk, it says nothing about storage."""
_OF_ALL = {"storage_no_bucket", "storage_unauthorized"}
"""Refusals that every upload would meet. Any other is about one object."""


class Breaker:
    """Whether storage takes uploads, as far as this daemon knows.

    Args:
        opened: Called whenever it opens.
    """

    def __init__(self, opened: Callable[[], None] = lambda: None) -> None:
        self._opened = opened
        self._streak = 0
        self._looking = asyncio.Event()
        self._looking.set()
        self._closed = True
        self.reason: RunError | None = None
        """Why it is closed; None while it is open, and before the first look."""
        self.since: datetime | None = None

    @property
    def closed(self) -> bool:
        """Whether no run may be claimed."""
        return self._closed

    def passed(self) -> None:
        """Open: an upload has succeeded."""
        self._streak = 0
        if not self._closed:
            return
        if self.reason is not None:
            log.info("storage.opened", closed_since=self.since.isoformat() if self.since else None)
        self._closed, self.reason, self.since = False, None, None
        self._looking.clear()
        self._opened()

    def failed(self, error: RunError) -> None:
        """Count a failed upload, and close where the error says that others would fail, too."""
        if isinstance(error, Refused) and error.code in _OF_ALL:
            self._close(error)
        elif isinstance(error, Retryable) and error.code not in {DISK_CODE, LEASE_CODE}:
            self._streak += 1
            if self._streak >= STREAK:
                self._close(error)

    async def run(self, probe: Callable[[], Awaitable[None]]) -> None:
        """Look whether uploads work, at the start and whenever it is closed, with growing pauses, until cancelled.

        Args:
            probe: Makes one upload; raises RunError.
        """
        while True:
            await self._looking.wait()
            looks = 0
            while self._closed:
                if looks or self.reason is not None:
                    await self._pause(looks)
                looks += 1
                await self._look(probe)

    async def _look(self, probe: Callable[[], Awaitable[None]]) -> None:
        try:
            await probe()
        except RunError as error:
            self._close(error)
        except Exception:  # a bug of ours must not keep the daemon from looking again
            log.exception("storage.not_looked_at")
        else:
            self.passed()

    async def _pause(self, looks: int) -> None:
        """Wait for the next look, or until an upload of a picture has opened it."""
        seconds = min(FIRST_PAUSE * 2 ** min(looks, 10), LONGEST_PAUSE) * random.uniform(0.5, 1.0)  # noqa: S311 - jitter
        if isinstance(self.reason, Retryable) and self.reason.retry_in is not None:
            seconds = max(seconds, self.reason.retry_in.total_seconds())
        await asyncio.sleep(seconds)

    def _close(self, error: RunError) -> None:
        if self.reason is None or isinstance(self.reason, Refused) != isinstance(error, Refused):
            cure = error.hint if isinstance(error, Refused) else _CURE
            consequence = "no run is claimed until an upload works"
            log.warning("storage.closed", reason=error.message, code=error.code, cure=cure, consequence=consequence)
        self.since = self.since or datetime.now(UTC)
        self._closed, self.reason = True, error
        self._looking.set()
