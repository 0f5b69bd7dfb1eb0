"""The parts of a daemon that others are built from, for tests that run some of them in their own process."""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from uuid import UUID

from daemon.fetch.client import Fetcher
from daemon.images.decoder import Decoder
from daemon.providers import Provider
from daemon.queue.client import Queue
from daemon.queue.identity import Identity
from daemon.queue.lease import Lease
from daemon.queue.outbox import Outbox
from daemon.queue.signals import Signals
from daemon.queue.unreachable import Unreachable
from daemon.storage.breaker import Breaker
from daemon.storage.client import Storage
from daemon.worker.attempt import Attempts
from daemon.worker.inputs import Inputs
from daemon.worker.inspector import Inspector
from daemon.worker.intake import Intake
from daemon.worker.keeper import Keeper
from daemon.worker.late_uploads import LateUploads
from daemon.worker.outcomes import Completed, Picture
from daemon.worker.polling import Policy, Polling
from daemon.worker.publisher import Publisher
from daemon.worker.retries import Retries
from daemon.worker.room import Room
from daemon.worker.uploads import STORAGE_AWAY, Uploads
from daemon.worker.workdirs import Workdirs
from daemon.worker.worker import Worker

POLICY = Policy(
    run_timeout=timedelta(minutes=1),
    poll_interval=timedelta(seconds=1),
    poll_timeout=timedelta(minutes=1),
    webhook_wait=timedelta(minutes=1),
    webhooks=frozenset(),
    strict_models=False,
)


@dataclass
class Wiring:
    """Signals, outbox, lease and identity of one daemon; without a database, its id is registered nowhere."""

    queue: Queue | None = None
    slots: int = 4
    lease_seconds: float = 30
    signals: Signals = field(default_factory=Signals)
    unreachable: Unreachable = field(default_factory=Unreachable)
    registered: list[UUID] = field(default_factory=list)
    breaker: Breaker = field(default_factory=Breaker)
    workdirs: Workdirs = field(default_factory=lambda: Workdirs(None))
    decoder: Decoder = field(default_factory=lambda: Decoder(1))
    lease: Lease = field(init=False)
    outbox: Outbox = field(init=False)
    identity: Identity = field(init=False)

    def __post_init__(self) -> None:
        self.lease = Lease(timedelta(seconds=self.lease_seconds))
        self.outbox = Outbox(self.signals)
        self.identity = Identity(self._register, self.lease, self.signals)

    async def _register(self, daemon: UUID) -> None:
        assert self.queue is not None
        self.registered.append(daemon)
        register = partial(self.queue.register_daemon, daemon, name="test", version="0", providers=("demo",))
        await register(slots=self.slots, lease=self.lease.length)

    def worker(
        self,
        group: asyncio.TaskGroup,
        storage: Storage,
        conversations: Storage,
        providers: Mapping[str, Provider],
        *,
        kept: Storage | None = None,
        storage_away: timedelta = STORAGE_AWAY,
        policy: Policy = POLICY,
    ) -> Worker:
        """Return a worker that writes to this outbox, with storage taken to work. Images of a megabyte are the largest."""
        assert self.queue is not None
        self.breaker.passed()
        inspector = Inspector(self.decoder, 1_000_000, 1_000_000)
        late = LateUploads(storage, kept or conversations, self.workdirs, max_bytes=1_000_000)
        uploads = Uploads(
            storage, conversations, self.outbox, self.lease, inspector, late=late, storage_away=storage_away
        )
        keeper = Keeper(kept or conversations, self.outbox, patience=storage_away)
        publisher = Publisher(storage, uploads, inspector, keeper, self.lease)
        retries = Retries()
        attempts = Attempts(
            self.queue,
            self.lease,
            inputs=Inputs(storage, conversations, Fetcher([]), inspector),
            polling=Polling(self.lease, policy),
            publisher=publisher,
            intake=Intake(self.breaker, Room(None, picture_bytes=1_000_000)),
            retries=retries,
            unreachable=self.unreachable,
            providers=providers,
            policy=policy,
            workdirs=self.workdirs,
        )
        return Worker(group, self.outbox, attempts=attempts, publisher=publisher, retries=retries)


async def wired(queue: Queue, *, slots: int = 4, lease: float = 30) -> Wiring:
    """Return the wiring of a daemon that is registered."""
    it = Wiring(queue, slots, lease)
    await it.identity.join()
    return it


def completed(
    url: str = "https://example.supabase.co/x.png",
    *,
    revised_prompt: str | None = None,
    cost: float = 0.01,
    **fields: object,
) -> Completed:
    """Return the outcome of a run whose picture is stored; `fields` are the outcome's own."""
    picture = Picture(None, revised_prompt, 1024, 1024, "image/png", 1_234_567, cost)
    thumbnail = url.replace(".png", ".thumb.webp")
    paths = ("w/x.png", "w/x.thumb.webp")
    return Completed(picture, url, paths[0], thumbnail, paths[1], "demo", "painter", "painter", 0.0, **fields)
