"""Finds the entries that the database refuses, by halving their batch: everything else of it is written."""

from collections.abc import Callable, Sequence
from uuid import UUID

import structlog

from daemon.errors import DaemonFenced
from daemon.queue.client import REFUSED, Acknowledgement, Queue
from daemon.queue.outage import describe
from daemon.queue.outbox import Batch, Outbox, Settlement

log = structlog.stdlib.get_logger()

PATIENCE = 3
"""How often a settlement is tried that the database refuses alone, where the error does not say that it always will."""


class Culprits:
    """Writes batches without claiming, in halves where the database refuses.

    Args:
        queue: The database.
        outbox: Takes settlements that are to be tried again.
        acknowledge: Called with what was written, and the results.
        set_aside: Called with a settlement that is refused in every form, and the error.
    """

    def __init__(
        self,
        queue: Queue,
        outbox: Outbox,
        *,
        acknowledge: Callable[[Batch, Sequence[Acknowledgement]], None],
        set_aside: Callable[[Settlement, Exception], None],
    ) -> None:
        self._queue = queue
        self._outbox = outbox
        self._acknowledge = acknowledge
        self._set_aside = set_aside

    async def database_works(self) -> bool:
        """Return whether the database does anything: only then an entry may be to blame for an error."""
        try:
            await self._queue.ping()
        except Exception:  # noqa: BLE001 - it does not, then
            return False
        return True

    async def write(self, daemon: UUID, batch: Batch) -> None:
        """Write a batch; raise the error of a database that does nothing at all."""
        if not len(batch):
            return
        try:
            await self._sync(daemon, batch)
        except Exception as error:
            if isinstance(error, DaemonFenced) or not await self.database_works():
                raise
            if len(batch) > 1:
                for half in batch.halves():
                    await self.write(daemon, half)
            else:
                await self._write_culprit(daemon, batch, error)

    async def _sync(self, daemon: UUID, batch: Batch) -> None:
        synced = await self._queue.sync(
            daemon,
            slots=0,
            settlements=[item.to_json() for item in batch.settlements],
            progress=[item.to_json() for item in batch.progress],
        )
        self._acknowledge(batch, synced.acknowledgements)

    async def _write_culprit(self, daemon: UUID, culprit: Batch, error: Exception) -> None:
        """Deal with the one entry that is refused: progress is left out, a settlement is tried again some times."""
        for entry in culprit.progress:
            log.warning("progress.refused", run_id=entry.run.id, reason=describe(error))
            entry.resolve(held=True)
        for item in culprit.settlements:
            item.refusals += 1
            if item.refusals < PATIENCE and not isinstance(error, REFUSED):
                self._outbox.put_off(item, 2.0 ** (item.refusals - 1))
            else:
                await self._write_safely(daemon, item, error)

    async def _write_safely(self, daemon: UUID, item: Settlement, error: Exception) -> None:
        """Write a refused settlement otherwise: one that gives the reason and keeps the image's URL."""
        log.warning("settlement.refused", run_id=item.run.id, reason=describe(error))
        safe = Settlement(item.run, item.outcome.unwritable(describe(error)), item.done)
        try:
            await self._sync(daemon, Batch([safe]))
        except Exception as another:
            if isinstance(another, DaemonFenced) or not await self.database_works():
                raise
            self._set_aside(item, another)
