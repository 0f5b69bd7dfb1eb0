"""A worker in the process of the tests, with a real database and storage, and a provider whose behaviour a test decides."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import asyncpg

from daemon.providers import Generated, Model, Reporter, Request
from daemon.queue.client import Queue
from daemon.queue.dispatcher import Dispatcher
from daemon.queue.heartbeat import Heartbeat, State
from daemon.queue.lease import Lease
from daemon.storage.client import Storage
from tests.fakes.server import picture
from tests.support.daemons import Supabase, supabase
from tests.support.postgres import wait_until
from tests.support.runs import run_row
from tests.support.storage_gate import StorageGate
from tests.support.wiring import POLICY, wired

Db = asyncpg.Connection
Draw = Callable[[Request, Reporter], Awaitable[Generated]]
Prepare = Callable[[Request, Reporter], Awaitable[None]]
STORAGE_AWAY = timedelta(seconds=0.2)
QUICK = timedelta(milliseconds=1)
ESTIMATE = 0.05
"""USD of each request to the painter, and of each picture of it."""


async def red_fox(request: Request, _: Reporter) -> Generated:
    """Draw as it should."""
    path = request.workdir / "fox"
    path.write_bytes(picture())
    return Generated(path, ESTIMATE)


async def ready(_: Request, __: Reporter) -> None:
    """Prepare nothing."""


@dataclass
class Painter:
    """A provider that draws as the test says, and counts. `prepare` comes before the request is sent, `sent` are those that
    were."""

    draw: Draw = red_fox
    prepare: Prepare = ready
    sent: int = 0
    calls: int = 0
    models: tuple[Model, ...] = ()
    max_conversation_bytes: int = 1000
    heard: bytes | None = None

    async def generate(self, request: Request, report: Reporter) -> Generated:
        self.calls += 1
        self.heard = None if request.previous_conversation is None else request.previous_conversation.read_bytes()
        await self.prepare(request, report)
        report.submitted({}, estimate=ESTIMATE)
        self.sent += 1
        return await self.draw(request, report)

    async def aclose(self) -> None:
        pass


@dataclass
class Shop:
    """A worker under way, with the storage and the provider it uses."""

    db: Db
    project: Supabase
    gate: StorageGate
    lease: Lease
    kept: Storage
    painter: Painter

    async def ended(self, run: str) -> asyncpg.Record:
        """Return the row, once it is final."""

        async def over() -> asyncpg.Record | None:
            row = await run_row(self.db, run)
            return row if row["finished_at"] else None

        return await wait_until(over, timeout=40)

    async def calls(self, run: str) -> list[tuple[str, float | None, float | None]]:
        """State, cost and estimate of the calls of a run, in sequence."""
        rows = await self.db.fetch(
            "select state, cost::float8, estimate::float8 from image_jobs.calls where run_id = $1 order by id", run
        )
        return [tuple(row) for row in rows]

    async def tried(self, run: str) -> str:
        """Wait until the run is to be tried again, and make it due; return the code of its failure."""
        (retry,) = await wait_until(lambda: self.events(run, "retry"))
        await self.db.execute("update runs set due_at = now() where id = $1 and status = 'pending'", run)
        return retry["data"]["code"]

    async def events(self, run: str, name: str) -> list[asyncpg.Record]:
        return await self.db.fetch(
            "select payload ->> 'message' as message, payload -> 'data' as data from run_events"
            " where run_id = $1 and payload ->> 'event' = $2 order by seq",
            run,
            name,
        )


@asynccontextmanager
async def open_shop(database: str, db: Db, *, painter: Painter | None = None, **policy: Any) -> AsyncIterator[Shop]:
    """A worker under way, with these limits of runs besides the usual ones."""
    gate = StorageGate()
    async with (
        supabase(database, gate.before) as project,
        Queue(database) as queue,
        Storage(project.url, project.keys.service_role_key, bucket="images", first_wait=QUICK) as storage,
        Storage(project.url, project.keys.service_role_key, bucket="images-context", first_wait=QUICK) as conversations,
        Storage(project.url, project.keys.service_role_key, bucket="images-kept", first_wait=QUICK) as kept,
        asyncio.TaskGroup() as group,
    ):
        it = await wired(queue, slots=1)
        shop = Shop(db, project, gate, it.lease, kept, painter or Painter())
        providers = {"demo": shop.painter}
        worker = it.worker(
            group,
            storage,
            conversations,
            providers,
            kept=kept,
            storage_away=STORAGE_AWAY,
            policy=replace(POLICY, **policy),
        )
        dispatcher = Dispatcher(
            queue,
            it.identity,
            it.signals,
            it.outbox,
            unreachable=it.unreachable,
            slots=1,
            start=worker.start,
            drop=worker.drop,
        )
        heartbeat = Heartbeat(queue, it.identity, it.lease, lambda: State(0, False, False))
        tasks = [group.create_task(dispatcher.run()), group.create_task(heartbeat.run())]
        yield shop
        for task in tasks:
            task.cancel()
        await it.decoder.aclose()
        it.workdirs.close()
