"""Webhook deliveries on their way to the runs they are about. The database receives them and nearly always knows whose
they are; what is left are those of orders that nobody wrote down: a daemon was killed, or an answer broke off, between
the provider's taking the order and its id's arrival here. The provider is asked whose they are.

Nothing here settles a run: it is checked, and that decides.
"""

import asyncio
from collections.abc import Mapping

import structlog

from daemon.errors import RunError
from daemon.providers import Provider, Traceable
from daemon.queue import TROUBLE, Order, Queue

log = structlog.stdlib.get_logger()

INTERVAL = 5.0
"""Seconds between two sweeps."""
ANSWER_TIMEOUT = 30.0
"""Seconds for a provider to say whose an order is; the lease on the question is twice as long."""
AT_ONCE = 10
"""Orders that are asked about in one sweep."""


class Inbox:
    """Sweeps, every few seconds.

    Args:
        queue: The database.
        providers: Those of this daemon, by name.
    """

    def __init__(self, queue: Queue, providers: Mapping[str, Provider]) -> None:
        self._queue = queue
        self._providers = {name: each for name, each in providers.items() if isinstance(each, Traceable)}
        self._something = asyncio.Event()

    def look(self) -> None:
        """The connection was interrupted: sweeps now."""
        self._something.set()

    async def run(self) -> None:
        """Sweeps until cancelled."""
        while True:
            self._something.clear()
            try:
                await self._sweep()
            except TROUBLE as error:
                log.warning("inbox.not_swept", error=type(error).__name__)
            try:
                await asyncio.wait_for(self._something.wait(), INTERVAL)
            except TimeoutError:
                continue

    async def _sweep(self) -> None:
        await self._queue.sweep_webhooks()
        if self._providers:
            orders = await self._queue.unmatched_deliveries(sorted(self._providers), AT_ONCE)
            await asyncio.gather(*(self._find_owner(order) for order in orders))

    async def _find_owner(self, order: Order) -> None:
        """Asks whose an order is, and gives it to its run. One that cannot be asked about now is left for later."""
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT):
                owner = await self._providers[order.provider].owner(order.job_id)
        except (RunError, TimeoutError) as error:
            log.warning("order.owner_unknown", provider=order.provider, order=order.job_id, error=str(error))
            return
        except Exception:  # a bug in one provider must not end the daemon
            log.exception("order.owner_unknown", provider=order.provider, order=order.job_id)
            return
        run_id, ticket = owner or (None, None)
        try:
            result = await self._queue.attach_order(order, run_id, ticket)
        except TROUBLE as error:
            log.warning("order.not_attached", order=order.job_id, run_id=run_id, error=type(error).__name__)
            return
        log.info("order.traced", provider=order.provider, order=order.job_id, run_id=run_id, result=result)
