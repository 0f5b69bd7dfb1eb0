"""Matches webhooks to runs whose provider job id was never saved: the daemon died, or the response broke off, between
submit and save.

The database receives webhooks and nearly always knows their runs. For the rest, the provider returns the run that the job
was submitted for. Nothing here settles a run: it is checked, and that decides.
"""

import asyncio
from collections.abc import Mapping

import structlog

from daemon.errors import RunError
from daemon.providers import Provider, Traceable
from daemon.queue.client import Queue
from daemon.queue.outage import Outage
from daemon.queue.signals import Signals
from daemon.run import ProviderJob

log = structlog.stdlib.get_logger()

INTERVAL = 5.0
"""Seconds between two sweeps."""
OWNER_TIMEOUT = 30.0
"""Seconds for a provider to respond; the lease on a delivery is twice as long."""
AT_ONCE = 10
"""Provider jobs that are looked up in one sweep."""


class Orphans:
    """Sweeps, every few seconds.

    Args:
        queue: The database.
        signals: `sweep` wakes it.
        providers: Those of this daemon, by name.
    """

    def __init__(self, queue: Queue, signals: Signals, providers: Mapping[str, Provider]) -> None:
        self._queue = queue
        self._due = signals.sweep
        self._providers = {name: each for name, each in providers.items() if isinstance(each, Traceable)}
        self._swept: int | None = None
        self._attaching = Outage("provider_job.not_attached", "provider_job.attached_again")

    async def run(self) -> None:
        """Sweep until cancelled."""
        outage = Outage("orphans.not_swept", "orphans.swept_again")
        while True:
            self._due.clear()
            try:
                await self._sweep()
            except Exception as error:  # noqa: BLE001 - it comes round again, whatever the database says
                await asyncio.sleep(outage.failed(error))
                continue
            outage.passed()
            try:
                async with asyncio.timeout(INTERVAL):
                    await self._due.wait()
            except TimeoutError:
                continue

    async def _sweep(self) -> None:
        await self._queue.sweep_webhooks()
        self._swept = await self._queue.sweep_calls(self._swept)
        if self._providers:
            jobs = await self._queue.unmatched_deliveries(sorted(self._providers), AT_ONCE)
            await asyncio.gather(*(self._find_owner(job) for job in jobs))

    async def _find_owner(self, job: ProviderJob) -> None:
        """Look up the run of a provider job, and attach the job to it. One that cannot be looked up now is left for later."""
        try:
            async with asyncio.timeout(OWNER_TIMEOUT):
                owner = await self._providers[job.provider].owner(job.id)
        except (RunError, TimeoutError) as error:
            log.warning("provider_job.owner_unknown", provider=job.provider, provider_job_id=job.id, error=str(error))
            return
        except Exception:  # a bug in one provider must not end the daemon
            log.exception("provider_job.owner_unknown", provider=job.provider, provider_job_id=job.id)
            return
        run_id, ticket = owner or (None, None)
        fields = {"provider": job.provider, "provider_job_id": job.id, "run_id": run_id}
        try:
            result = await self._queue.attach_provider_job(job, run_id, ticket)
        except Exception as error:  # noqa: BLE001 - it comes round again, whatever the database says
            self._attaching.failed(error, **fields)
            return
        self._attaching.passed()
        log.info("provider_job.traced", **fields, result=result)
