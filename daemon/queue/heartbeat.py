"""Beats: tells others that this daemon lives, and takes over the runs of those that are silent."""

import asyncio
import time
from collections.abc import Callable
from typing import NamedTuple
from uuid import UUID

import structlog

from daemon.errors import DaemonFenced
from daemon.queue.client import Queue
from daemon.queue.identity import Identity
from daemon.queue.lease import Lease
from daemon.queue.outage import Outage

log = structlog.stdlib.get_logger()

RETRY = 1.0
"""Seconds between two beats of which the first did not arrive: back early, a daemon is not taken for dead."""


class State(NamedTuple):
    """The state of a daemon that goes with each beat."""

    in_flight: int
    session_lock: bool
    draining: bool


class Heartbeat:
    """Beats, six times a lease.

    Args:
        queue: The database.
        identity: The daemon's id, which is renewed if others took this daemon for dead.
        lease: Renewed by each beat.
        state: Returns the daemon's present state.
    """

    def __init__(self, queue: Queue, identity: Identity, lease: Lease, state: Callable[[], State]) -> None:
        self._queue = queue
        self._identity = identity
        self._lease = lease
        self._state = state
        self._interval = lease.length.total_seconds() / 6
        self._outage = Outage("heartbeat.failed", "heartbeat.resumed")
        self._may_take_over = asyncio.Event()

    async def run(self) -> None:
        """Beat until cancelled. It goes on while the daemon drains: a run that takes its time is not dead."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._take_over_forever(), name="take over")
            while True:
                sent = time.monotonic()
                pause = await self._beat(sent)
                await asyncio.sleep(max(0.0, sent + pause - time.monotonic()))

    async def _beat(self, sent: float) -> float:
        """Beat once. Returns the seconds from then to the next beat."""
        daemon = self._identity.id
        state = self._state()
        try:
            await self._queue.heartbeat(
                daemon, in_flight=state.in_flight, session_lock=state.session_lock, draining=state.draining
            )
        except DaemonFenced:
            self._lease.lapse()
            log.warning("daemon.fenced", consequence="its runs were taken over; registering anew")
            return await self._rejoin(daemon)
        except Exception as error:  # noqa: BLE001 - whatever the database says, the next beat may arrive
            self._outage.failed(error)
            return min(self._interval, RETRY)
        self._lease.renew(sent, session_lock=state.session_lock)
        self._outage.passed()
        self._may_take_over.set()
        return self._interval

    async def _rejoin(self, daemon: UUID) -> float:
        try:
            await self._identity.rejoin(daemon)
        except Exception as error:  # noqa: BLE001 - as above
            self._outage.failed(error)
            return min(self._interval, RETRY)
        return 0.0

    async def _take_over_forever(self) -> None:
        """Take over after each beat that arrived; beside the beats, so that none waits for it."""
        outage = Outage("runs.not_taken_over", "runs.taken_over_again")
        while True:
            await self._may_take_over.wait()
            self._may_take_over.clear()
            try:
                if taken := await self._queue.take_over(self._identity.id):
                    log.warning("runs.taken_over", count=taken)
            except Exception as error:  # noqa: BLE001 - as above
                await asyncio.sleep(outage.failed(error))
            else:
                outage.passed()
