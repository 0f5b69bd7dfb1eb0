"""The local lease: for how long other daemons must still believe that this one lives.

It counts from before a beat was sent: others can never believe longer than we do. While it is not fresh (the database is
away, the process was frozen) no submission, poll or upload may begin; what is in flight goes on.
"""

import asyncio
import time
from datetime import timedelta


class Lease:
    """Becomes fresh with each beat that arrives, and lapses by itself.

    Args:
        length: The time others wait before they take over.
    """

    def __init__(self, length: timedelta) -> None:
        self.length = length
        self._until = 0.0
        self._beaten = time.monotonic()
        self._fresh = asyncio.Event()

    @property
    def fresh(self) -> bool:
        """Whether others must still believe that this daemon lives."""
        return time.monotonic() < self._until

    @property
    def silent(self) -> float:
        """Seconds since the last beat that arrived; before the first one, since the start."""
        return time.monotonic() - self._beaten

    async def wait_fresh(self) -> None:
        """Return as soon as the lease is fresh: at once, as a rule."""
        while not self.fresh:
            self._fresh.clear()
            await self._fresh.wait()

    def renew(self, sent: float, *, session_lock: bool = False) -> None:
        """Renew the lease by a beat that was sent at `sent` (monotonic seconds) and has arrived.

        One that vouched for the session's lock is believed for a shorter time: if the network goes, so does the lock.
        """
        self._beaten = sent
        seconds = self.length.total_seconds()
        self._until = sent + (silence(seconds) if session_lock else seconds)
        self._fresh.set()

    def lapse(self) -> None:
        """End the lease now: others have taken the runs over."""
        self._until = 0.0


def silence(lease: float) -> float:
    """Seconds without a beat after which a daemon whose session's lock is free is dead; as in `image_jobs.take_over`."""
    return min(lease, max(6.0, lease / 5))
