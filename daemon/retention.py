"""Ends what is to end: runs that are older than they are kept, the files of runs that are gone, uploads of forgotten users.

The database lists them (`sql/schema/74_retention.sql`), and leases them to one daemon at a time. A killed daemon's are leased
again.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from datetime import timedelta

import structlog

from daemon.errors import RunError
from daemon.queue.client import FileRemoval, Queue
from daemon.queue.outage import Outage
from daemon.queue.signals import Signals
from daemon.storage.addresses import SOURCES
from daemon.storage.client import Storage

log = structlog.stdlib.get_logger()

INTERVAL = 30.0
"""Seconds between two looks without a signal, once there is nothing left to do."""
PAUSE = 0.2
"""Seconds between two steps: the runs of others come first."""
STEP = 5000
"""Rows that one step looks at."""
AT_ONCE = 20
"""Runs whose files are removed before the database is asked for more."""
SOURCES_AT_ONCE = 500
"""Uploads that one request removes."""


class Retention:
    """Prunes runs and removes files, in the background.

    Args:
        queue: The database.
        signals: `remove` wakes it.
        storage: Removes objects of any bucket.
        buckets: The names of those of images, of conversations, and of what is kept.
        keep: How long a run stays after its end; None: for ever.
    """

    def __init__(
        self, queue: Queue, signals: Signals, storage: Storage, buckets: Sequence[str], *, keep: timedelta | None
    ) -> None:
        self._queue = queue
        self._due = signals.remove
        self._storage = storage
        self._buckets = buckets
        self._keep = keep
        self._files = Outage("files.not_removed", "files.removed_again")
        self._sources = Outage("sources.not_removed", "sources.removed_again")

    async def run(self) -> None:
        """Prune and remove until cancelled."""
        steps = (
            _Step(self._walk, "retention.not_done", "retention.resumed"),
            _Step(self._remove_files, "file_removals.not_taken", "file_removals.taken_again"),
            _Step(self._remove_sources, "source_removals.not_taken", "source_removals.taken_again"),
        )
        while True:
            self._due.clear()
            pause = min([await step.take() for step in steps])
            if pause <= PAUSE:
                await asyncio.sleep(pause)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._due.wait()

    async def _walk(self) -> bool:
        """Take one step through runs and buckets. Returns whether there is more to do."""
        step = await self._queue.walk(self._buckets, self._keep, STEP)
        if step.pruned or step.found:
            log.info("retention.step", pruned=step.pruned, files_of_lost_runs=step.found)
        if step.reason is not None:
            log.warning("retention.not_done", error=step.reason)
        return step.more

    async def _remove_files(self) -> bool:
        """Remove the files of some runs that are not there any more. Returns whether there may be more to do."""
        removals = await self._queue.take_file_removals(AT_ONCE)
        removed = False
        for removal in removals:
            done = await self._remove(removal)
            await self._queue.finish_file_removal(removal, done=done)
            removed |= done
        return removed and len(removals) == AT_ONCE

    async def _remove(self, removal: FileRemoval) -> bool:
        """Remove the files of one run. Returns whether none is left."""
        try:
            for bucket, keys in removal.files.items():
                await self._storage.remove(keys, bucket=bucket)
        except RunError as error:
            self._files.failed(error, run_id=removal.run_id)
            return False
        if removal.files:
            self._files.passed()
            log.info("files.removed", run_id=removal.run_id, files=sum(map(len, removal.files.values())))
        return True

    async def _remove_sources(self) -> bool:
        """Remove some uploads of users and workflows that are forgotten. Returns whether there may be more to do."""
        removed = False
        for removal in await self._queue.take_source_removals(SOURCES_AT_ONCE):
            done = True
            try:
                await self._storage.remove(removal.names, bucket=SOURCES)
            except RunError as error:
                self._sources.failed(error)
                done = False
            else:
                self._sources.passed()
            await self._queue.finish_source_removal(removal, done=done)
            removed |= done
        return removed


class _Step:
    """One of the things to do, with an outage of its own: none waits for another's trouble.

    Args:
        step: Does a part of it; returns whether there is more.
        event: As `Outage` logs it.
        over: As `Outage` logs it.
    """

    def __init__(self, step: Callable[[], Awaitable[bool]], event: str, over: str) -> None:
        self._step = step
        self._outage = Outage(event, over, longest=INTERVAL)
        self._paused_until = 0.0

    async def take(self) -> float:
        """Take the step, unless it pauses after an error. Returns the seconds to the next one."""
        paused = self._paused_until - time.monotonic()
        if paused > 0:
            return paused
        try:
            more = await self._step()
        except Exception as error:  # noqa: BLE001 - it comes round again, whatever the database says
            pause = self._outage.failed(error)
            self._paused_until = time.monotonic() + pause
            return pause
        self._outage.passed()
        return PAUSE if more else INTERVAL
