"""Says "I am alive", knows for how long others believe it, and takes over from those who say nothing.

The local lease counts from before a beat was sent: others can never believe longer than we do. While it is not fresh
(the database is away, the process was frozen) no submission, poll or upload may begin; what is in flight goes on.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from datetime import timedelta
from uuid import UUID

import structlog

from daemon.errors import DaemonFenced
from daemon.queue import UNAVAILABLE, Queue

log = structlog.stdlib.get_logger()

RETRY = 1.0
"""Seconds between two beats of which the first did not arrive: back early, a daemon is not taken for dead."""


class Heartbeat:
    """Beats, six times a lease.

    Args:
        queue: The database.
        lease: How long others wait before they take over.
        daemon: Answers the daemon's present id.
        state: Answers how many runs are in flight, whether the session lock is held, and whether it is draining.
        fenced: Called with the id under which others took this daemon for dead; it registers anew.
    """

    def __init__(
        self,
        queue: Queue,
        *,
        lease: timedelta,
        daemon: Callable[[], UUID],
        state: Callable[[], tuple[int, bool, bool]],
        fenced: Callable[[UUID], Awaitable[None]],
    ) -> None:
        self._queue = queue
        self._lease = lease.total_seconds()
        self._daemon = daemon
        self._state = state
        self._fenced = fenced
        self._until = 0.0
        self._fresh = asyncio.Event()

    @property
    def fresh(self) -> bool:
        """Whether others must still believe that this daemon lives."""
        return time.monotonic() < self._until

    async def wait_fresh(self) -> None:
        """Returns as soon as the lease is fresh: at once, as a rule."""
        while not self.fresh:
            self._fresh.clear()
            await self._fresh.wait()

    def renewed(self, sent: float, *, session_lock: bool = False) -> None:
        """A sign of life that was sent at `sent` (monotonic seconds) has arrived.

        One that vouched for the session's lock is believed for a shorter time: if the network goes, so does the lock.
        """
        self._until = sent + (silence(self._lease) if session_lock else self._lease)
        self._fresh.set()

    async def run(self) -> None:
        """Beats until cancelled. It goes on while the daemon drains: a run that takes its time is not dead."""
        interval = self._lease / 6
        silent = False
        while True:
            pause = min(interval, RETRY)
            sent = time.monotonic()
            daemon = self._daemon()
            in_flight, session_lock, draining = self._state()
            try:
                await self._queue.heartbeat(daemon, in_flight=in_flight, session_lock=session_lock, draining=draining)
                self.renewed(sent, session_lock=session_lock)
                pause = interval
                if silent:
                    silent = False
                    log.info("heartbeat.resumed")
                if taken := await self._queue.take_over(daemon):
                    log.warning("runs.taken_over", count=taken)
            except DaemonFenced:
                self._until = 0.0
                log.warning("daemon.fenced", consequence="its runs were taken over; registering anew")
                try:
                    await self._fenced(daemon)
                    continue
                except UNAVAILABLE as error:
                    log.warning("heartbeat.failed", error=type(error).__name__)
            except UNAVAILABLE as error:
                if not silent:
                    silent = True
                    log.warning("heartbeat.failed", error=type(error).__name__)
            await asyncio.sleep(max(0.0, sent + pause - time.monotonic()))


def silence(lease: float) -> float:
    """Seconds without a beat after which a daemon whose session's lock is free is dead; as in `private.take_over`."""
    return min(lease, max(6.0, lease / 5))
