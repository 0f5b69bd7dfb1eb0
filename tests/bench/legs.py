"""A daemon that takes the time of each leg, from the INSERT of a run to the call of its provider.

Listener, dispatcher, queue and worker are real, the provider refuses each request, and nothing is stored.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from structlog.testing import capture_logs

from daemon.errors import Refused
from daemon.providers import Model, Reporter, Request
from daemon.queue.client import Queue, SyncResult
from daemon.queue.dispatcher import Dispatcher
from daemon.queue.listener import Listener
from daemon.queue.signals import Signals
from daemon.run import ClaimedRun
from daemon.storage.client import Storage
from tests.support.postgres import wait_until
from tests.support.wiring import wired

LEGS = ("notified", "sync sent", "sync returned", "task started", "provider called")
"""The ends of the legs, in sequence; the first one begins with the INSERT."""


@dataclass
class Times:
    """When the last thing of each kind has happened, by the monotonic clock."""

    at: dict[str, float] = field(default_factory=dict)
    run: str = ""
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, name: str) -> None:
        """Take the time."""
        self.at[name] = time.perf_counter()

    def legs(self, sent: float) -> list[float]:
        """Return the seconds of each leg of a run whose INSERT was sent then."""
        ends = [self.at[name] for name in LEGS]
        return [end - begin for begin, end in zip([sent, *ends], ends, strict=False)]


class TimedSignals(Signals):
    """Takes the time at which a notification has arrived."""

    times: Times

    def wake(self) -> None:
        self.times.take("notified")
        super().wake()


class TimedQueue(Queue):
    """Takes the time of the sync that claims the run."""

    def __init__(self, dsn: str, times: Times) -> None:
        super().__init__(dsn)
        self._times = times

    async def sync(self, daemon: UUID, **options: Any) -> SyncResult:
        sent = time.perf_counter()
        synced = await super().sync(daemon, **options)
        if any(run.id == self._times.run for run in synced.claimed):
            self._times.at["sync sent"] = sent
            self._times.take("sync returned")
        return synced


class Refusing:
    """A provider that takes the time, and refuses."""

    models: Sequence[Model] = ()

    def __init__(self, times: Times) -> None:
        self._times = times

    async def generate(self, request: Request, report: Reporter) -> Any:
        """Refuse."""
        if request.run_id == self._times.run:
            self._times.take("provider called")
            self._times.done.set()
        raise Refused("Not now.", code="refused", hint="")

    async def aclose(self) -> None:
        """Close nothing."""


@asynccontextmanager
async def timed_daemon(dsn: str, *, slots: int = 200) -> AsyncIterator[Times]:
    """Run such a daemon for as long as the block lasts."""
    times = Times()
    nowhere = Storage("http://127.0.0.1:9", "key", bucket="images")
    async with TimedQueue(dsn, times) as queue, asyncio.TaskGroup() as runs:
        wiring = await wired(queue, slots=slots)
        wiring.signals.__class__ = TimedSignals
        wiring.signals.times = times
        wiring.lease.renew(time.monotonic() + 3600)
        worker = wiring.worker(runs, nowhere, nowhere, {"demo": Refusing(times)})

        def start(run: ClaimedRun) -> None:
            if run.id == times.run:
                times.take("task started")
            worker.start(run)

        dispatcher = Dispatcher(
            queue,
            wiring.identity,
            wiring.signals,
            wiring.outbox,
            unreachable=wiring.unreachable,
            slots=slots,
            start=start,
            drop=worker.drop,
        )
        listener = Listener(dsn, wiring.identity, wiring.signals, drop=worker.drop)
        tasks = [asyncio.create_task(listener.run()), asyncio.create_task(dispatcher.run())]
        try:
            await wait_until(lambda: listener.hears)
            with capture_logs():  # of each run, that it was refused
                yield times
                await dispatcher.wait_idle()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await nowhere.aclose()
