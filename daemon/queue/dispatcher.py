"""One round trip settles finished runs and claims new ones: `image_jobs.sync`.

One sync is in flight at a time; whatever happens meanwhile goes with the next. So a busy daemon writes in large batches
and an idle one at once, without any timer.
"""

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from uuid import UUID

import structlog

from daemon.database import EXPECTED
from daemon.errors import DaemonFenced
from daemon.queue.client import Acknowledgement, Queue
from daemon.queue.culprits import Culprits
from daemon.queue.identity import Identity
from daemon.queue.outage import Outage, describe
from daemon.queue.outbox import Batch, Outbox, Settlement
from daemon.queue.signals import Signals
from daemon.queue.unreachable import Unreachable
from daemon.run import ClaimedRun

log = structlog.stdlib.get_logger()

TICK = 1.0
"""Full scan after this many idle seconds: a slow transaction may have committed a run below the watermark."""
AWAKE_CLAIMS = 50, 1.0
"""So many claims within so many seconds, and a daemon looks by itself, so that inserts need no NOTIFY."""
AWAKE_TICK = 0.005
"""Seconds between two looks of a daemon that is awake: what a run waits then (NOTIFY, where it is sent, takes 3 ms)."""
BUSY_PAUSE = 0.05
RECONCILE = 5.0
"""Seconds between two comparisons of the claims held here and in the database: so long may a deaf daemon go on with a run
that was cancelled."""
LONGEST_ASIDE = 300.0
"""Seconds between two tries to write a settlement that was set aside."""


class Dispatcher:
    """Syncs with the database for as long as it runs.

    Args:
        queue: The database.
        identity: The daemon's id, which is renewed if others took this daemon for dead.
        signals: The events that it waits for.
        outbox: The entries to write.
        unreachable: The providers of which nothing is claimed.
        slots: How many runs may be held at once.
        start: Called with each run that was claimed. It is held until it is settled.
        drop: Called with claims that turned out to be lost.
        awake_claims: How many claims, within how many seconds, make it look by itself.
        intake: Returns how many runs may be claimed beside a number of held ones; none while their pictures could not be
            kept.
    """

    def __init__(
        self,
        queue: Queue,
        identity: Identity,
        signals: Signals,
        outbox: Outbox,
        *,
        unreachable: Unreachable,
        slots: int,
        start: Callable[[ClaimedRun], None],
        drop: Callable[[set[int]], None],
        awake_claims: tuple[int, float] = AWAKE_CLAIMS,
        intake: Callable[[int], int] = lambda _: sys.maxsize,
    ) -> None:
        self._queue = queue
        self._identity = identity
        self._signals = signals
        self._outbox = outbox
        self._unreachable = unreachable
        self._slots = slots
        self._start = start
        self._drop = drop
        self._intake = intake
        self._written = asyncio.Event()
        self._syncing = False
        self._held: dict[int, ClaimedRun] = {}
        self._aside: dict[int, ClaimedRun] = {}
        self._most = slots
        self._culprits = Culprits(queue, outbox, acknowledge=self._acknowledge, set_aside=self._set_aside)
        self._full_scan = True
        self._reconcile_at = 0.0
        self._awake_until = 0.0
        many, self._awake_within = awake_claims
        self._claims: deque[float] = deque(maxlen=many)
        self.accepting = True

    @property
    def held(self) -> int:
        """How many runs are held."""
        return len(self._held)

    @property
    def idle(self) -> bool:
        """Whether nothing is held, nothing waits to be written, and no sync is under way: it may be claiming."""
        return not self._held and not self._outbox and not self._syncing

    async def wait_idle(self) -> None:
        """Return once nothing is held and everything is written."""
        while not self.idle:
            self._written.clear()
            await self._written.wait()

    async def run(self) -> None:
        """Sync until cancelled. Waiters for a settlement are cancelled then, too: it will not be written."""
        try:
            await self._sync_forever()
        finally:
            self._outbox.close()

    async def _sync_forever(self) -> None:
        outage = Outage("sync.failed", "sync.resumed")
        while True:
            await self._wait()
            daemon = self._identity.id
            batch = self._outbox.take()
            try:
                refused = await self._sync_once(daemon, batch)
                await self._fall_asleep()
            except DaemonFenced:
                self._outbox.put_back(batch)
                self._signals.resync()
                await self._rejoin(daemon)
            except Exception as error:  # noqa: BLE001 - whatever the database says, the next sync may pass
                self._outbox.put_back(batch)
                self._signals.resync()
                await asyncio.sleep(outage.failed(error))
            except BaseException:
                self._outbox.put_back(batch)
                raise
            else:
                if refused is None:
                    outage.passed()
                else:
                    await asyncio.sleep(outage.failed(refused))

    async def _sync_once(self, daemon: UUID, batch: Batch) -> Exception | None:
        self._syncing = True
        try:
            return await self._sync(daemon, batch)
        finally:
            self._syncing = False
            self._written.set()

    async def _rejoin(self, daemon: UUID) -> None:
        log.warning("sync.fenced", daemon=str(daemon))
        try:
            await self._identity.rejoin(daemon)
        except Exception as error:  # noqa: BLE001 - as above
            log.warning("daemon.not_rejoined", error=describe(error))
            await asyncio.sleep(TICK)

    async def _wait(self) -> None:
        """Wait until there is something to do; at the latest a tick later, when a full scan is due."""
        awake = time.monotonic() < self._awake_until
        try:
            async with asyncio.timeout(AWAKE_TICK if awake else TICK):
                await self._signals.work.wait()
        except TimeoutError:
            self._signals.look = True
            self._full_scan |= not awake
        self._signals.work.clear()

    async def _fall_asleep(self) -> None:
        """Wake all daemons once the time has lapsed in which inserts did without NOTIFY."""
        if self._awake_until and time.monotonic() > self._awake_until + TICK / 2:
            self._awake_until = 0.0
            await self._queue.wake_all()

    async def _sync(self, daemon: UUID, batch: Batch) -> Exception | None:
        """Make one round trip. Returns the error of one that the database refused, where its entries were written apart."""
        # Runs of an earlier life of this process (it was fenced) are settled under that name; their claims decide.
        for former in batch.daemons() - {daemon}:
            await self._culprits.write(former, batch.of(former))
        batch = batch.of(daemon)

        now = time.monotonic()
        newest = await self._queue.newest_claim() if self._is_to_compare(now) else None
        slots = self._slots - len(self._held) + len(batch.settlements) if self.accepting else 0
        look, self._signals.look = self._signals.look, False
        slots = max(0, min(slots, self._most)) if look or batch.settlements else 0
        if slots:
            slots = min(slots, self._intake(len(self._held) - len(batch.settlements)))
        held = None if newest is None else self._claims_held_as(daemon)
        if not (len(batch) or slots > 0 or held is not None):
            return None
        # A busy daemon is never idle for a second; so with each comparison it looks at whole lanes too.
        full_scan, self._full_scan = self._full_scan or held is not None, False
        try:
            synced = await self._queue.sync(
                daemon,
                slots=slots,
                full_scan=full_scan,
                settlements=[item.to_json() for item in batch.settlements],
                progress=[item.to_json() for item in batch.progress],
                held=held,
                awake=self._stay_awake(now, slots),
                unreachable=self._unreachable.closed(),
                newest=newest,
            )
        except Exception as error:  # noqa: BLE001 - raised again, unless the rest of the database works
            await self._write_apart(daemon, batch, slots, error)
            return error
        self._most = min(2 * self._most, self._slots)
        self._held.update((run.claim, run) for run in synced.claimed)
        self._acknowledge(batch, synced.acknowledgements)
        if lost := synced.lost - {item.run.claim for item in batch.settlements}:
            self._lose(lost)
        for run in synced.claimed:
            self._start(run)
        if synced.claimed:
            self._claims.append(now)
        if len(synced.claimed) >= slots > 0 and len(self._held) < self._slots:
            self._signals.wake()
        if held is not None:
            self._reconcile_at = now + RECONCILE
            with suppress(*EXPECTED):  # a connection that fails is cut; the next one has a session of its own
                await self._queue.reset_session()
        return None

    async def _write_apart(self, daemon: UUID, batch: Batch, slots: int, error: Exception) -> None:
        """Write the entries of a sync that the database refused, without claiming. Raises its error if nothing works."""
        if isinstance(error, DaemonFenced) or not await self._culprits.database_works():
            raise error
        log.warning("sync.refused", error=describe(error), entries=len(batch), slots=slots)
        self._signals.resync()
        if slots:  # the culprit may be a run to be claimed, or they are too many for the time there is
            self._most = max(1, slots // 2)
        await self._culprits.write(daemon, batch)

    def _is_to_compare(self, now: float) -> bool:
        """Return whether the claims held here are to be compared with the database's."""
        if self._signals.out_of_sync:
            self._signals.out_of_sync = False
            self._reconcile_at = 0.0
        return now >= self._reconcile_at

    def _claims_held_as(self, daemon: UUID) -> list[int]:
        """Return the claims held under this daemon id."""
        return [claim for claim, run in (self._held | self._aside).items() if run.daemon == daemon]

    def _set_aside(self, item: Settlement, error: Exception) -> None:
        """Free the slot of a run whose row refuses every settlement; it is tried again after growing pauses.

        The claim stays this daemon's: given back, the run would be made, and paid for, again.
        """
        pause = min(2.0**item.refusals, LONGEST_ASIDE)
        log.warning("settlement.set_aside", run_id=item.run.id, reason=describe(error), again_in=pause)
        self._held.pop(item.run.claim, None)
        self._aside[item.run.claim] = item.run
        item.resolve(Acknowledgement(item.run.id, item.run.claim, "set_aside"))
        again: asyncio.Future[Acknowledgement] = asyncio.get_running_loop().create_future()
        self._outbox.put_off(replace(item, done=again), pause)
        self._written.set()

    def _acknowledge(self, batch: Batch, acknowledgements: Sequence[Acknowledgement]) -> None:
        settled, lost = self._outbox.acknowledge(batch, acknowledgements)
        for claim in settled:
            self._held.pop(claim, None)
            self._aside.pop(claim, None)
        if lost:
            self._lose(lost)
        if self._outbox:
            # Rows that were locked: soon again, but not in a spin.
            asyncio.get_running_loop().call_later(BUSY_PAUSE, self._signals.work.set)
        self._written.set()

    def _lose(self, claims: set[int]) -> None:
        """Drop lost claims; their provider jobs may have to be cancelled."""
        self._drop(claims)
        self._signals.cancel.set()

    def _stay_awake(self, now: float, slots: int) -> float | None:
        """Seconds for which to look by itself. Only with free slots: a full daemon would look in vain."""
        busy = len(self._claims) == self._claims.maxlen and now - self._claims[0] < self._awake_within
        if busy and slots > 0:
            self._awake_until = now + TICK
            return TICK
        return None
