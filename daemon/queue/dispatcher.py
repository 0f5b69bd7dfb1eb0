"""claim and settle: the daemon's one conversation with the queue.

A turn is one statement: what has finished is settled, progress is recorded, free slots are filled. One turn is in flight
at a time; whatever happens meanwhile goes with the next. So a busy daemon writes in large batches and an idle one at
once, without any timer.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any
from uuid import UUID

import structlog

from daemon.errors import DaemonFenced
from daemon.outbox import Batch, Body, Outbox, Progress, Settlement
from daemon.queue import REFUSED, UNAVAILABLE, Answer, Claimed, Queue, Result

log = structlog.stdlib.get_logger()

TICK = 1.0
"""Seconds of idleness after which whole lanes are looked at: a slow transaction may have committed an older rank."""
AWAKE_TURNS = 50
"""Claims a second from which on a daemon looks by itself, so that inserts need no NOTIFY."""
AWAKE_TICK = 0.005
"""Seconds between two looks of a daemon that is awake: what a run waits then (NOTIFY, where it is sent, takes 3 ms)."""
BUSY_PAUSE = 0.05
RECONCILE = 5.0
"""Seconds between two comparisons of what is held here and what the database thinks is held: so long may a deaf daemon
go on with a run that was cancelled."""
LONGEST_PAUSE = 5.0
"""Seconds between two tries to reach a database that is away."""


class Turns:
    """Takes turns with the database for as long as it runs.

    Args:
        queue: The database.
        daemon: Answers the daemon's present id.
        slots: How many runs may be held at once.
        start: Called with each run that was claimed. It is held until it is settled.
        lost: Called with the claims that turned out to be no longer ours.
        fenced: Called with the id under which others took this daemon for dead; it registers anew.
    """

    def __init__(
        self,
        queue: Queue,
        *,
        daemon: Callable[[], UUID],
        slots: int,
        start: Callable[[Claimed], None],
        lost: Callable[[set[int]], None],
        fenced: Callable[[UUID], Awaitable[None]],
    ) -> None:
        self._queue = queue
        self._daemon = daemon
        self._slots = slots
        self._start = start
        self._lost = lost
        self._fenced = fenced
        self._something = asyncio.Event()
        self._answered = asyncio.Event()
        self._outbox = Outbox(self._something.set)
        self._held: dict[int, Claimed] = {}
        self._look = True
        self._thorough = True
        self._reconcile_at = 0.0
        self._awake_until = 0.0
        self._claims: deque[float] = deque(maxlen=AWAKE_TURNS)
        self.accepting = True

    @property
    def held(self) -> int:
        """How many runs are held."""
        return len(self._held)

    @property
    def idle(self) -> bool:
        """Whether nothing is held and nothing waits to be written."""
        return not self._held and not self._outbox

    async def wait_idle(self) -> None:
        """Returns once nothing is held and everything is written."""
        while not self.idle:
            self._answered.clear()
            await self._answered.wait()

    def wake(self) -> None:
        """There may be something to claim."""
        self._look = True
        self._something.set()

    def look_closely(self) -> None:
        """The connection was interrupted: compare what is held, and look at everything."""
        self._reconcile_at = 0.0
        self._thorough = True
        self.wake()

    async def settle(self, run: Claimed, body: Body) -> Result:
        """Writes a run's outcome back; see `private.settle_runs` for `body`. Returns once the database has it.

        The run stays held until then, and its slot taken: a cancelled caller does not cancel the write.
        """
        return await asyncio.shield(self._outbox.settle(run, body))

    def release(self, run: Claimed) -> None:
        """Gives back a run on which nothing was done."""
        self._outbox.settle(run, {"outcome": "released", "message": "Handed back before work began."})

    def record(self, run: Claimed, *, events: Sequence[Body] = (), **body: Any) -> None:
        """Records progress of a run with the next turn; a newer value replaces one that still waits."""
        self._outbox.record(Progress(run, body, list(events)))

    async def confirm(self, run: Claimed, *, events: Sequence[Body] = (), **body: Any) -> bool:
        """Asks the database whether the run is still ours: one round trip, with the next turn.

        Takes what `record` takes; it is written if the answer is yes, and only then.
        """
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._outbox.record(Progress(run, body, list(events), [answer]))
        return await answer

    async def run(self) -> None:
        """Takes turns until cancelled. Whoever waits for a settlement then is cancelled too: it will not be written."""
        try:
            await self._take_turns()
        finally:
            self._outbox.close()

    async def _take_turns(self) -> None:
        failures = 0
        while True:
            await self._wait()
            daemon = self._daemon()
            batch = self._outbox.take()
            try:
                await self._turn(daemon, batch)
                await self._fall_asleep()
                failures = 0
            except (DaemonFenced, *UNAVAILABLE) as error:
                failures += 1
                self._outbox.put_back(batch)
                self.look_closely()
                log.warning("turn.failed", error=type(error).__name__, failures=failures)
                if isinstance(error, DaemonFenced):
                    await self._rejoin(daemon)
                else:
                    await asyncio.sleep(min(0.05 * 2 ** min(failures, 7), LONGEST_PAUSE))
            except BaseException:
                self._outbox.put_back(batch)
                raise

    async def _rejoin(self, daemon: UUID) -> None:
        try:
            await self._fenced(daemon)
        except UNAVAILABLE as error:
            log.warning("daemon.not_rejoined", error=type(error).__name__)
            await asyncio.sleep(TICK)

    async def _wait(self) -> None:
        """Until there is something to do; at the latest a tick later, when everything is looked at."""
        awake = time.monotonic() < self._awake_until
        try:
            await asyncio.wait_for(self._something.wait(), AWAKE_TICK if awake else TICK)
        except TimeoutError:
            self._look = True
            self._thorough |= not awake
        self._something.clear()

    async def _fall_asleep(self) -> None:
        """Once the time has lapsed in which inserts did without NOTIFY, everybody looks once more."""
        if self._awake_until and time.monotonic() > self._awake_until + TICK / 2:
            self._awake_until = 0.0
            await self._queue.wake_all()

    async def _turn(self, daemon: UUID, batch: Batch) -> None:
        # Runs of an earlier life of this process (it was fenced) are settled under that name; their claims decide.
        for former in batch.daemons() - {daemon}:
            await self._write(former, batch.of(former))
        batch = batch.of(daemon)

        now = time.monotonic()
        slots = self._slots - len(self._held) + len(batch.settlements) if self.accepting else 0
        if not (self._look or batch.settlements):
            slots = 0
        held = (
            [claim for claim, run in self._held.items() if run.daemon == daemon] if now >= self._reconcile_at else None
        )
        self._look = False
        if not (len(batch) or slots > 0 or held is not None):
            return
        # A busy daemon is never idle for a second; so with each comparison it looks at whole lanes too.
        thorough, self._thorough = self._thorough or held is not None, False
        try:
            turned = await self._queue.turn(
                daemon,
                slots=max(0, min(slots, self._slots)),
                thorough=thorough,
                settlements=[item.entry() for item in batch.settlements],
                progress=[item.entry() for item in batch.progress],
                held=held,
                awake=self._stay_awake(now, slots),
            )
        except REFUSED as error:
            log.warning("turn.refused", error=type(error).__name__, batch=len(batch))
            await self._write(daemon, batch)
            self.wake()
            return
        if held is not None:
            self._reconcile_at = now + RECONCILE
        self._held.update((run.claim, run) for run in turned.claimed)
        self._answer(batch, turned.answers)
        if lost := turned.lost - {item.run.claim for item in batch.settlements}:
            self._lost(lost)
        for run in turned.claimed:
            self._start(run)
        if turned.claimed:
            self._claims.append(now)
        if len(turned.claimed) >= slots > 0 and len(self._held) < self._slots:
            self.wake()

    async def _write(self, daemon: UUID, batch: Batch) -> None:
        """Writes without claiming, in halves where the database refuses: one bad entry must not sink its batch."""
        if not len(batch):
            return
        try:
            turned = await self._queue.turn(
                daemon,
                slots=0,
                settlements=[item.entry() for item in batch.settlements],
                progress=[item.entry() for item in batch.progress],
            )
        except REFUSED as error:
            if len(batch) > 1:
                for half in batch.halves():
                    await self._write(daemon, half)
            else:
                await self._write_safely(daemon, batch, str(error).split("\n", 1)[0])
            return
        self._answer(batch, turned.answers)

    async def _write_safely(self, daemon: UUID, culprit: Batch, reason: str) -> None:
        """The culprit alone suffers: progress is left out, a settlement says so and keeps its image's URL."""
        for entry in culprit.progress:
            log.warning("progress.refused", run_id=entry.run.id, reason=reason)
            entry.answer(ours=True)
        for item in culprit.settlements:
            log.warning("settlement.refused", run_id=item.run.id, reason=reason)
            safe = Settlement(item.run, _unwritable(item.body), item.done)
            turned = await self._queue.turn(daemon, slots=0, settlements=[safe.entry()])
            self._answer(Batch([safe]), turned.answers)

    def _answer(self, batch: Batch, answers: Sequence[Answer]) -> None:
        settled, lost = self._outbox.answer(batch, answers)
        for claim in settled:
            self._held.pop(claim, None)
        if lost:
            self._lost(lost)
        if self._outbox:
            # Rows that somebody had locked: soon again, but not in a spin.
            asyncio.get_running_loop().call_later(BUSY_PAUSE, self._something.set)
        self._answered.set()

    def _stay_awake(self, now: float, slots: int) -> float | None:
        """Seconds for which to look by itself. Only with free slots: a full daemon would look in vain."""
        busy = len(self._claims) == AWAKE_TURNS and now - self._claims[0] < 1.0
        if busy and slots > 0:
            self._awake_until = now + TICK
            return TICK
        return None


def _unwritable(body: Body) -> dict[str, Any]:
    """The settlement of a run whose own settlement the database refused."""
    payload: dict[str, Any] = body.get("payload") or {}
    return {
        "outcome": "failed",
        "payload": {
            "error": "The result could not be written to the database.",
            "code": "internal",
            "hint": "The daemon's log says why. If there is an imageUrl beside this, the image is stored and can be used.",
            "imageUrl": payload.get("imageUrl"),
        },
    }
