"""What waits to be written: settlements and progress of the runs that are held."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from daemon.queue import Answer, Claimed, Result

Body = Mapping[str, Any]

BATCH = 400
"""Settlements in one turn at most. Larger batches were slower (a plan flip at 500 was measured)."""


@dataclass(slots=True)
class Settlement:
    """How a run ended, and who waits to hear that it is written."""

    run: Claimed
    body: Body
    done: asyncio.Future[Result]
    since: float = field(default_factory=time.monotonic)

    def entry(self) -> dict[str, Any]:
        """As `private.settle_runs` takes it; the last of the run's timings is how long it waited for its turn."""
        entry = {**self.body, "id": self.run.id, "claim": self.run.claim}
        payload: Body = self.body.get("payload") or {}
        if timings := payload.get("timings"):
            waited = round(1000 * (time.monotonic() - self.since))
            entry["payload"] = {**payload, "timings": {**timings, "settleMs": waited}}
        return entry


@dataclass(slots=True)
class Progress:
    """How far a run is. Newer values replace older ones that still wait; events are all kept."""

    run: Claimed
    body: dict[str, Any] = field(default_factory=dict[str, Any])
    events: list[Body] = field(default_factory=list[Body])
    asking: list[asyncio.Future[bool]] = field(default_factory=list[asyncio.Future[bool]])

    def merge(self, newer: "Progress") -> None:
        """Takes over what came later."""
        self.body.update(newer.body)
        self.events.extend(newer.events)
        self.asking.extend(newer.asking)

    def answer(self, *, ours: bool) -> None:
        """Tells whoever asked whether the claim holds."""
        for future in self.asking:
            if not future.done():
                future.set_result(ours)

    def entry(self) -> dict[str, Any]:
        """As `private.record_progress` takes it."""
        return {"id": self.run.id, "claim": self.run.claim, **self.body, "events": self.events}


@dataclass(frozen=True, slots=True)
class Batch:
    """What goes with one turn."""

    settlements: Sequence[Settlement] = ()
    progress: Sequence[Progress] = ()

    def __len__(self) -> int:
        return len(self.settlements) + len(self.progress)

    def halves(self) -> "tuple[Batch, Batch]":
        """Two smaller batches that are this one together."""
        settlements, progress = self.settlements, self.progress
        if len(settlements) == 1 == len(progress):
            return Batch(settlements), Batch((), progress)
        first, second = len(settlements) // 2, len(progress) // 2
        return Batch(settlements[:first], progress[:second]), Batch(settlements[first:], progress[second:])

    def of(self, daemon: UUID) -> "Batch":
        """The part that was claimed under this id."""
        return Batch(
            [item for item in self.settlements if item.run.daemon == daemon],
            [item for item in self.progress if item.run.daemon == daemon],
        )

    def daemons(self) -> set[UUID]:
        """The ids under which its runs were claimed."""
        return {item.run.daemon for item in (*self.settlements, *self.progress)}


class Outbox:
    """Collects what waits.

    Args:
        filled: Called when something was added.
    """

    def __init__(self, filled: Callable[[], None]) -> None:
        self._filled = filled
        self._settlements: deque[Settlement] = deque()
        self._progress: dict[int, Progress] = {}
        self._closed = False

    def __bool__(self) -> bool:
        return bool(self._settlements or self._progress)

    def settle(self, run: Claimed, body: Body) -> asyncio.Future[Result]:
        """Adds a settlement; progress of the run that still waits goes with it, in front."""
        done: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        waiting = self._progress.pop(run.claim, None)
        if waiting is not None:
            body = {**body, "events": [*waiting.events, *body.get("events", ())]}
        self._settlements.append(Settlement(run, body, done))
        if self._closed:
            done.cancel()
        self._filled()
        return done

    def record(self, progress: Progress) -> None:
        """Adds progress."""
        self._progress.setdefault(progress.run.claim, Progress(progress.run)).merge(progress)
        self._filled()

    def close(self) -> None:
        """Nothing will be written any more: whoever waits for it is cancelled."""
        self._closed = True
        for item in self._settlements:
            item.done.cancel()
        for entry in self._progress.values():
            for future in entry.asking:
                future.cancel()

    def take(self) -> Batch:
        """Takes out what goes with the next turn."""
        settlements = [self._settlements.popleft() for _ in range(min(BATCH, len(self._settlements)))]
        progress = list(self._progress.values())
        self._progress = {}
        if self._settlements:
            self._filled()
        return Batch(settlements, progress)

    def put_back(self, batch: Batch) -> None:
        """What could not be written goes first with the next turn. Nobody is called: the caller knows when to try.

        A part of it may have been answered, or put back as busy, before the rest failed.
        """
        waiting = {item.run.claim for item in self._settlements}
        unwritten = [item for item in batch.settlements if not item.done.done() and item.run.claim not in waiting]
        self._settlements.extendleft(reversed(unwritten))
        for older in batch.progress:
            newer = self._progress.get(older.run.claim)
            if newer is not None:
                older.merge(newer)
            self._progress[older.run.claim] = older

    def answer(self, batch: Batch, answers: Sequence[Answer]) -> tuple[set[int], set[int]]:
        """Tells whoever waits what became of it, and keeps what was busy for the next turn.

        Returns:
            The claims that are settled, and those of progress that turned out to be no longer ours.
        """
        results: dict[int, Result] = {answer.claim: answer.result for answer in answers}
        settled: set[int] = set()
        for item in batch.settlements:
            result: Result = results.get(item.run.claim, "lost")
            if result == "busy":
                self.put_back(Batch([item]))
                continue
            settled.add(item.run.claim)
            if not item.done.done():
                item.done.set_result(result)
        lost: set[int] = set()
        for entry in batch.progress:
            result = results.get(entry.run.claim, "recorded")
            if result == "busy":
                self.put_back(Batch((), [Progress(entry.run, {}, entry.events, entry.asking)]))
            else:
                entry.answer(ours=result != "lost")
            if result == "lost":
                lost.add(entry.run.claim)
        return settled, lost
