"""Takes into metrics and log what no settlement of this daemon says: runs that ended otherwise, calls, webhooks, the queue."""

import asyncio

import structlog

from daemon.metrics import Metrics, Tally
from daemon.queue.client import Queue
from daemon.queue.outage import Outage

log = structlog.stdlib.get_logger()

INTERVAL = 5.0
"""Seconds between two looks."""


class Observer:
    """Looks for as long as it runs. What it takes, no other daemon counts; what it logs, no other logs.

    Args:
        queue: The database.
        metrics: Counts it. Without a port others count, and the queue is not looked at.
    """

    def __init__(self, queue: Queue, metrics: Metrics) -> None:
        self._queue = queue
        self._metrics = metrics

    async def run(self) -> None:
        """Look until cancelled."""
        outage = Outage("metrics.not_read", "metrics.read")
        while True:
            try:
                await self._look()
            except Exception as error:  # noqa: BLE001 - whatever the database says, it is asked again
                self._metrics.show(())
                outage.failed(error)
            else:
                outage.passed()
            await asyncio.sleep(INTERVAL)

    async def _look(self) -> None:
        for tally in await self._queue.take_tallies(counts=self._metrics.served):
            self._metrics.tally(tally)
            _log(tally)
        if self._metrics.served:
            self._metrics.show(await self._queue.gauges())


def _log(tally: Tally) -> None:
    """Log a run that failed without a daemon's settlement: the worker logs the others."""
    if tally.run_id is not None and not tally.logged:
        log.warning(
            "run.finished",
            outcome=tally.result,
            code=tally.code,
            error=tally.error,
            run_id=tally.run_id,
            processor=f"{tally.provider}:{tally.model}",
            workflow=tally.workflow_id,
            node=None if tally.node_id is None else tally.node_id[:200],
        )
