"""Reports what keeps this daemon from claiming, and lets the database tell who waits why: `image_jobs.report_daemon`.

Beside the syncs, which a daemon without a free slot does not make, and the beats, which come too seldom: what runs wait for
shows within two seconds.
"""

import asyncio
from collections.abc import Callable

import structlog

from daemon.queue.client import Queue
from daemon.queue.identity import Identity
from daemon.queue.outage import Outage
from daemon.queue.unreachable import Unreachable

log = structlog.stdlib.get_logger()

INTERVAL = 1.0
"""Seconds between two reports. Nothing is written unless something has changed."""


class Obstacles:
    """Reports every second.

    Args:
        queue: The database.
        identity: The daemon's id.
        unreachable: The providers of which nothing is claimed.
        storage_closed: Returns whether nothing is claimed since storage takes no uploads.
    """

    def __init__(
        self, queue: Queue, identity: Identity, unreachable: Unreachable, storage_closed: Callable[[], bool]
    ) -> None:
        self._queue = queue
        self._identity = identity
        self._unreachable = unreachable
        self._storage_closed = storage_closed

    async def run(self) -> None:
        """Report until cancelled, also while the daemon drains."""
        outage = Outage("obstacles.not_reported", "obstacles.reported_again")
        while True:
            try:
                await self._queue.report_daemon(
                    self._identity.id, storage_closed=self._storage_closed(), unreachable=self._unreachable.closed()
                )
            except Exception as error:  # noqa: BLE001 - whatever the database says, the next report may pass
                await asyncio.sleep(outage.failed(error))
            else:
                outage.passed()
                await asyncio.sleep(INTERVAL)
