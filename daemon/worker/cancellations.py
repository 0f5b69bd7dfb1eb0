"""Orders that nobody waits for any more, cancelled at their providers.

The database knows which: a run was cancelled, or requeued, while an order was out. Any daemon that serves the provider
does it, and the trail of the run says what came of it. What a killed daemon had taken is taken again.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping
from functools import partial

import structlog

from daemon.errors import Refused, RunError
from daemon.providers import Deferred, Provider
from daemon.queue import TROUBLE, Order, Queue

log = structlog.stdlib.get_logger()

INTERVAL = 5.0
"""Seconds between two looks of a daemon that is told of nothing."""
ANSWER_TIMEOUT = 30.0
"""Seconds for a provider to answer; the lease on a cancellation is twice as long."""
AT_ONCE = 8
"""Cancellations under way at the same time at one provider: one that does not answer keeps no other waiting."""


class Cancellations:
    """Tells providers to stop.

    Args:
        queue: The database.
        providers: Those of this daemon, by name.
    """

    def __init__(self, queue: Queue, providers: Mapping[str, Provider]) -> None:
        self._queue = queue
        self._providers = {name: each for name, each in providers.items() if isinstance(each, Deferred)}
        self._something = asyncio.Event()
        self._busy = Counter[str]()

    def look(self) -> None:
        """There may be something to cancel."""
        self._something.set()

    async def run(self) -> None:
        """Cancels orders until cancelled itself."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._something.clear()
                try:
                    await self._take(group)
                except TROUBLE as error:
                    log.warning("cancellations.not_taken", error=type(error).__name__)
                try:
                    await asyncio.wait_for(self._something.wait(), INTERVAL)
                except TimeoutError:
                    continue

    async def _take(self, group: asyncio.TaskGroup) -> None:
        for provider in self._providers:
            free = AT_ONCE - self._busy[provider]
            if free <= 0:
                continue
            for order in await self._queue.take_cancellations([provider], free):
                task = group.create_task(self._cancel(order), name=f"cancellation of {order.job_id}")
                self._busy[provider] += 1
                task.add_done_callback(partial(self._ended, provider))

    def _ended(self, provider: str, _: asyncio.Task[None]) -> None:
        self._busy[provider] -= 1
        self.look()

    async def _cancel(self, order: Order) -> None:
        """Tells one provider, and writes down what came of it."""
        reason, final = None, False
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                await self._providers[order.provider].cancel(order.job_id)
        except TimeoutError:
            reason = "The provider did not answer in time."
        except RunError as error:
            reason, final = error.message, isinstance(error, Refused)
        except Exception:  # a bug in one provider must not end the daemon
            log.exception("order.not_cancelled", provider=order.provider, order=order.job_id)
            reason = "Something went wrong inside the daemon."
        try:
            await self._queue.finish_cancellation(order, reason, final=final)
        except TROUBLE as error:
            log.warning("cancellation.not_written", order=order.job_id, error=type(error).__name__)
            return
        said = {"provider": order.provider, "order": order.job_id, "run_id": order.run_id}
        if reason is None:
            log.info("order.cancelled", **said)
        else:
            log.warning("order.not_cancelled", **said, reason=reason)
