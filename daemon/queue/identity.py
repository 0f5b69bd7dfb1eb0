"""The id under which this process is registered in `image_jobs.daemons`."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from uuid import UUID, uuid4

import structlog

from daemon.queue.lease import Lease
from daemon.queue.signals import Signals

log = structlog.stdlib.get_logger()


class Identity:
    """The present daemon id; a fenced daemon gets a new one.

    Args:
        register: Registers an id as a daemon; raises asyncpg's errors.
        lease: Renewed when a new id is registered.
        signals: Resynced when a new id is registered.
    """

    def __init__(self, register: Callable[[UUID], Awaitable[None]], lease: Lease, signals: Signals) -> None:
        self._register = register
        self._lease = lease
        self._signals = signals
        self._joining = asyncio.Lock()
        self.id = uuid4()

    async def join(self) -> None:
        """Register the first id."""
        await self._register(self.id)

    async def rejoin(self, former: UUID) -> None:
        """Register a new id, once, however many parts noticed that `former` was fenced."""
        sent = time.monotonic()
        async with self._joining:
            if self.id != former:
                return
            successor = uuid4()
            self.id = successor
            try:
                await self._register(successor)
            except BaseException:
                self.id = former
                raise
            log.warning("daemon.rejoined", former=str(former), daemon=str(successor))
        self._lease.renew(sent)
        self._signals.resync()
