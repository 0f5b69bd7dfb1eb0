"""The entries that wait for the next sync: settlements and progress of runs that are held."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from uuid import UUID

import structlog

from daemon.calls import Call
from daemon.events import Event
from daemon.queue.client import Acknowledgement, Result
from daemon.queue.signals import Signals
from daemon.run import ClaimedRun, Fate

log = structlog.stdlib.get_logger()

BATCH = 400
"""Settlements in one sync at most. Larger batches were slower (a plan flip at 500 was measured)."""


class Outcome(Protocol):
    """How a run ends. `daemon/worker/outcomes.py` has the ways."""

    @property
    def events(self) -> Sequence[Event]:
        """Events that are written before the outcome's own."""
        ...

    def following(self, earlier: Sequence[Event]) -> "Outcome":
        """Return the outcome with `earlier` events in front of its own."""
        ...

    def unwritable(self, reason: str) -> "Outcome":
        """Return the outcome to write instead, if the database refuses this one for a `reason`."""
        ...

    def noted(self) -> "Outcome":
        """Return the outcome without the provider's response, which the database has noted."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Return the settlement as `image_jobs.settle_runs` takes it, without the fence."""
        ...


@dataclass(slots=True)
class Settlement:
    """The outcome of a run, and the future that gets the database's acknowledgement once it is written."""

    run: ClaimedRun
    outcome: Outcome
    done: asyncio.Future[Acknowledgement]
    refusals: int = 0
    """How often the database has refused this settlement alone."""

    def to_json(self) -> dict[str, Any]:
        """Return the settlement as `image_jobs.settle_runs` takes it."""
        return {**self.outcome.to_json(), "id": self.run.id, "claim": self.run.claim}

    def resolve(self, acknowledgement: Acknowledgement) -> None:
        """Give the waiter what became of the settlement."""
        if not self.done.done():
            self.done.set_result(acknowledgement)


@dataclass(slots=True)
class Progress:
    """How far a run is. Newer values replace older ones that still wait; events and calls are all kept.

    `waiters` get to know whether the claim holds.
    """

    run: ClaimedRun
    progress: int | None = None
    message: str | None = None
    preview_url: str | None = None
    events: list[Event] = field(default_factory=list[Event])
    waiters: list[asyncio.Future[bool]] = field(default_factory=list[asyncio.Future[bool]])
    calls: list[Call] = field(default_factory=list[Call])

    def merge(self, newer: "Progress") -> None:
        """Take over the values, events and waiters of a newer entry."""
        self.progress = self.progress if newer.progress is None else newer.progress
        self.message = self.message if newer.message is None else newer.message
        self.preview_url = self.preview_url if newer.preview_url is None else newer.preview_url
        self.events.extend(newer.events)
        self.waiters.extend(newer.waiters)
        self.calls.extend(newer.calls)

    def resolve(self, *, held: bool) -> None:
        """Resolve the waiters with whether the claim holds."""
        for future in self.waiters:
            if not future.done():
                future.set_result(held)

    def to_json(self) -> dict[str, Any]:
        """Return the entry as `image_jobs.record_progress` takes it."""
        return {
            "id": self.run.id,
            "claim": self.run.claim,
            "progress": self.progress,
            "message": self.message,
            "preview_url": self.preview_url,
            "events": [event.to_json() for event in self.events],
            "calls": [call.to_json() for call in self.calls],
        }


@dataclass(frozen=True, slots=True)
class Batch:
    """The entries of one sync."""

    settlements: Sequence[Settlement] = ()
    progress: Sequence[Progress] = ()

    def __len__(self) -> int:
        return len(self.settlements) + len(self.progress)

    def halves(self) -> "tuple[Batch, Batch]":
        """Split the batch into two smaller ones."""
        settlements, progress = self.settlements, self.progress
        if len(settlements) == 1 == len(progress):
            return Batch(settlements), Batch((), progress)
        first, second = len(settlements) // 2, len(progress) // 2
        return Batch(settlements[:first], progress[:second]), Batch(settlements[first:], progress[second:])

    def of(self, daemon: UUID) -> "Batch":
        """Return the part that was claimed under this daemon id."""
        return Batch(
            [item for item in self.settlements if item.run.daemon == daemon],
            [item for item in self.progress if item.run.daemon == daemon],
        )

    def daemons(self) -> set[UUID]:
        """Return the daemon ids under which its runs were claimed."""
        return {item.run.daemon for item in (*self.settlements, *self.progress)}


class Outbox:
    """Collects entries; the dispatcher takes them out.

    Args:
        signals: Wakes the dispatcher when an entry was added.
        settled: Called once for each settlement that is written, with what the database says has become of the run.
    """

    def __init__(
        self, signals: Signals, settled: Callable[[ClaimedRun, Fate], None] = lambda _run, _fate: None
    ) -> None:
        self._signals = signals
        self._count = settled
        self._settlements: deque[Settlement] = deque()
        self._progress: dict[int, Progress] = {}
        self._put_off: dict[int, Settlement] = {}
        self._closed = False

    def __bool__(self) -> bool:
        return bool(self._settlements or self._progress)

    def __len__(self) -> int:
        return len(self._settlements) + len(self._progress) + len(self._put_off)

    async def settle(self, run: ClaimedRun, outcome: Outcome) -> Acknowledgement:
        """Write a run's outcome back; return once the database has it.

        The run stays held until then, and its slot taken: a cancelled caller does not cancel the write.
        """
        return await asyncio.shield(self.post(run, outcome))

    def post(self, run: ClaimedRun, outcome: Outcome) -> asyncio.Future[Acknowledgement]:
        """Add a settlement without waiting for it; events of the run that still wait go with it, in front.

        What waits to be said of its calls does not: a settlement that names none goes by its outcome.
        """
        done: asyncio.Future[Acknowledgement] = asyncio.get_running_loop().create_future()
        _warn_of_incidents(run, outcome.events)
        waiting = self._progress.pop(run.claim, None)
        if waiting is not None:
            outcome = outcome.following(waiting.events)
            if waiting.calls or waiting.waiters:
                self._progress[run.claim] = Progress(run, waiters=waiting.waiters, calls=waiting.calls)
        self._settlements.append(Settlement(run, outcome, done))
        if self._closed:
            done.cancel()
        self._signals.work.set()
        return done

    def record(
        self,
        run: ClaimedRun,
        *events: Event,
        progress: int | None = None,
        message: str | None = None,
        preview_url: str | None = None,
        calls: Sequence[Call] = (),
    ) -> None:
        """Record progress of a run with the next sync; a newer value replaces one that still waits."""
        self._add(Progress(run, progress, message, preview_url, list(events), calls=list(calls)))

    async def confirm(
        self, run: ClaimedRun, *events: Event, message: str | None = None, calls: Sequence[Call] = ()
    ) -> bool:
        """Return whether the run is still held: one round trip, with the next sync.

        The events and the message are written if it is, and only then; what became of calls is written in any case.
        """
        held: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._add(Progress(run, message=message, events=list(events), waiters=[held], calls=list(calls)))
        return await held

    def close(self) -> None:
        """Cancel all waiters, now and from now on: nothing will be written any more."""
        self._closed = True
        for item in (*self._settlements, *self._put_off.values()):
            item.done.cancel()
        for entry in self._progress.values():
            for future in entry.waiters:
                future.cancel()

    def take(self) -> Batch:
        """Take out the entries of the next sync."""
        settlements = [self._settlements.popleft() for _ in range(min(BATCH, len(self._settlements)))]
        progress = list(self._progress.values())
        self._progress = {}
        if self._settlements:
            self._signals.work.set()
        return Batch(settlements, progress)

    def put_back(self, batch: Batch) -> None:
        """Requeue unwritten entries at the front. Does not wake the dispatcher.

        A part of the batch may have been acknowledged, or put back as busy, before the rest failed.
        """
        waiting = {item.run.claim for item in self._settlements}
        unwritten = [item for item in batch.settlements if not item.done.done() and item.run.claim not in waiting]
        self._settlements.extendleft(reversed(unwritten))
        for older in batch.progress:
            newer = self._progress.get(older.run.claim)
            if newer is not None:
                older.merge(newer)
            self._progress[older.run.claim] = older

    def put_off(self, item: Settlement, seconds: float) -> None:
        """Requeue a refused settlement once the time has passed, and wake the dispatcher then."""
        self._put_off[item.run.claim] = item
        asyncio.get_running_loop().call_later(seconds, self._bring_back, item.run.claim)

    def _bring_back(self, claim: int) -> None:
        self.put_back(Batch([self._put_off.pop(claim)]))
        self._signals.work.set()

    def acknowledge(self, batch: Batch, acknowledgements: Sequence[Acknowledgement]) -> tuple[set[int], set[int]]:
        """Resolve the waiters of a batch, and requeue its entries whose row was locked (`busy`).

        Returns:
            The claims that are settled, and those of progress that turned out to be lost.
        """
        results = {each.claim: each for each in acknowledgements}
        settled: set[int] = set()
        for item in batch.settlements:
            claim = item.run.claim
            acknowledgement = results.get(claim) or Acknowledgement(item.run.id, claim, "lost")
            if acknowledgement.result == "busy":
                item.outcome = item.outcome.noted()
                self.put_back(Batch([item]))
                continue
            settled.add(claim)
            if acknowledgement.fate is not None:
                self._count(item.run, acknowledgement.fate)
            item.resolve(acknowledgement)
        lost: set[int] = set()
        for entry in batch.progress:
            recorded = results.get(entry.run.claim)
            result: Result = "recorded" if recorded is None else recorded.result
            if result == "busy":
                self.put_back(
                    Batch((), [Progress(entry.run, events=entry.events, waiters=entry.waiters, calls=entry.calls)])
                )
            else:
                entry.resolve(held=result != "lost")
            if result == "lost":
                lost.add(entry.run.claim)
        return settled, lost

    def _add(self, progress: Progress) -> None:
        _warn_of_incidents(progress.run, progress.events)
        self._progress.setdefault(progress.run.claim, Progress(progress.run)).merge(progress)
        self._signals.work.set()


def _warn_of_incidents(run: ClaimedRun, events: Sequence[Event]) -> None:
    """Log incidents: an operator should look into them, and need not read events for that."""
    for event in events:
        if event.name == "incident":
            log.warning("run.incident", run_id=run.id, error=event.message, workflow=run.workflow_id, node=run.node_id)
