"""Cancels provider jobs that no run waits for any more.

The database lists them: a run was cancelled, or requeued, while a provider job was under way. Any daemon that serves the
provider cancels it, and an event of the run records the result. Those a killed daemon had leased are leased again.
"""

import asyncio
from collections import Counter
from collections.abc import Mapping
from functools import partial

import structlog

from daemon.errors import Refused, RunError
from daemon.providers import Charge, Deferred, Provider
from daemon.queue.client import Queue
from daemon.queue.outage import Outage
from daemon.queue.signals import Signals
from daemon.run import ProviderJob

log = structlog.stdlib.get_logger()

INTERVAL = 5.0
"""Seconds between two looks without a signal."""
CANCEL_TIMEOUT = 30.0
"""Seconds for a provider to respond; the lease on a cancellation is twice as long."""
AT_ONCE = 8
"""Cancellations under way at the same time at one provider: one that does not respond keeps no other waiting."""


class Cancellations:
    """Cancels at providers.

    Args:
        queue: The database.
        signals: `cancel` wakes it.
        providers: Those of this daemon, by name.
    """

    def __init__(self, queue: Queue, signals: Signals, providers: Mapping[str, Provider]) -> None:
        self._queue = queue
        self._due = signals.cancel
        self._providers = {name: each for name, each in providers.items() if isinstance(each, Deferred)}
        self._busy = Counter[str]()
        self._writing = Outage("cancellation.not_written", "cancellation.written_again")

    async def run(self) -> None:
        """Cancel provider jobs until cancelled itself."""
        outage = Outage("cancellations.not_taken", "cancellations.taken_again")
        async with asyncio.TaskGroup() as group:
            while True:
                self._due.clear()
                try:
                    await self._take(group)
                except Exception as error:  # noqa: BLE001 - it comes round again, whatever the database says
                    await asyncio.sleep(outage.failed(error))
                    continue
                outage.passed()
                try:
                    async with asyncio.timeout(INTERVAL):
                        await self._due.wait()
                except TimeoutError:
                    continue

    async def _take(self, group: asyncio.TaskGroup) -> None:
        for provider in self._providers:
            free = AT_ONCE - self._busy[provider]
            if free <= 0:
                continue
            for job in await self._queue.take_cancellations([provider], free):
                task = group.create_task(self._cancel(job), name=f"cancellation of {job.id}")
                self._busy[provider] += 1
                task.add_done_callback(partial(self._ended, provider))

    def _ended(self, provider: str, _: asyncio.Task[None]) -> None:
        self._busy[provider] -= 1
        self._due.set()

    async def _cancel(self, job: ProviderJob) -> None:
        """Cancel at one provider, and write the result down."""
        reason, final, charge = None, False, None
        try:
            async with asyncio.timeout(CANCEL_TIMEOUT):
                charge = await self._providers[job.provider].cancel(job.id)
        except TimeoutError:
            reason = "The provider did not answer in time."
        except RunError as error:
            reason, final = error.message, isinstance(error, Refused)
        except Exception:  # a bug in one provider must not end the daemon
            log.exception("provider_job.not_cancelled", provider=job.provider, provider_job_id=job.id)
            reason = "Something went wrong inside the daemon."
        try:
            await self._queue.finish_cancellation(job, reason, final=final, charge=_call(charge))
        except Exception as error:  # noqa: BLE001 - it comes round again, whatever the database says
            self._writing.failed(error, provider_job_id=job.id)
            return
        self._writing.passed()
        fields = {"provider": job.provider, "provider_job_id": job.id, "run_id": job.run_id}
        if reason is None:
            log.info("provider_job.cancelled", **fields)
        else:
            log.warning("provider_job.not_cancelled", **fields, reason=reason)


def _call(charge: Charge | None) -> dict[str, object] | None:
    """Return what a provider said about the charge of a cancelled job, as `image_jobs.finish_cancellation` takes it."""
    if charge is None:
        return None
    return {"state": "charged" if charge.charged else "free", "cost": charge.cost if charge.charged else None}
