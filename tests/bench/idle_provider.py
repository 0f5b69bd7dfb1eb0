"""A daemon whose provider and storage take no time: everything else of it is real."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid5

import asyncpg

from daemon.events import Event
from daemon.queue.client import Queue
from daemon.queue.dispatcher import Dispatcher
from daemon.queue.listener import Listener
from daemon.run import ClaimedRun
from daemon.worker.outcomes import Completed
from tests.support.postgres import wait_until
from tests.support.runs import WORKFLOW
from tests.support.wiring import Wiring, completed, wired

Db = asyncpg.Connection
URL = "https://example.supabase.co/storage/v1/object/public/images/workflow/run.png?v=01234567"


class IdleProvider:
    """Listens, syncs, and hands each claimed run to `start`, which settles it at once unless told otherwise."""

    def __init__(self, dsn: str, queue: Queue, wiring: Wiring) -> None:
        self.settled = 0
        self.start: Callable[[ClaimedRun], None] = self.settle
        self.signals = wiring.signals
        self.outbox = wiring.outbox
        self._settling: set[asyncio.Task[None]] = set()
        self.dispatcher = Dispatcher(
            queue,
            wiring.identity,
            wiring.signals,
            wiring.outbox,
            unreachable=wiring.unreachable,
            slots=wiring.slots,
            start=self._on_claimed,
            drop=lambda _: None,
        )
        self.listener = Listener(dsn, wiring.identity, wiring.signals, drop=lambda _: None)

    def _on_claimed(self, run: ClaimedRun) -> None:
        self.start(run)

    def settle(self, run: ClaimedRun) -> None:
        """Write back that the image is there."""
        task = asyncio.create_task(self._settle(run))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _settle(self, run: ClaimedRun) -> None:
        assert (await self.outbox.settle(run, outcome())).result == "settled"
        self.settled += 1


@asynccontextmanager
async def idle_provider(dsn: str, *, slots: int, accepting: bool = True) -> AsyncIterator[IdleProvider]:
    """Run such a daemon for as long as the block lasts."""
    async with Queue(dsn) as queue:
        it = IdleProvider(dsn, queue, await wired(queue, slots=slots))
        it.dispatcher.accepting = accepting
        tasks = [asyncio.create_task(it.listener.run()), asyncio.create_task(it.dispatcher.run())]
        try:
            await wait_until(lambda: it.listener.hears)
            yield it
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def outcome() -> Completed:
    """Return an outcome with all parts of a real one: two events, a payload, timings."""
    generated = Event("generated", "The provider made the image.")
    return completed(URL, cost=0.04, events=[generated, Event("stored", "Stored.", data={"uploadTries": 1})])


def settlement() -> dict[str, Any]:
    """Return the JSON of such an outcome; its events get their ids in the database."""
    body = outcome().to_json()
    for event in body["events"]:
        del event["id"]
    return body


async def insert_with_nodes(db: Db, count: int, label: str, *, workflows: int = 20) -> None:
    """Inserts pending runs of several workflows, each with a node of its own."""
    ids = [uuid5(WORKFLOW, str(number)) for number in range(workflows)]
    await db.execute(
        """insert into workflow_nodes (id, workflow_id, node_type, node_data)
        select format('%s_%s', $1::text, n), ($2::uuid[])[1 + n % $3], 'image_generation', '{"label": "a fox"}'
        from generate_series(1, $4) n""",
        label,
        ids,
        workflows,
        count,
    )
    while await db.fetchval("select exists (select from image_jobs.stale_nodes)"):
        await db.execute("select image_jobs.refresh_stale_nodes()")
    await db.execute(
        """insert into runs (kind, subject_id, status, processor, metadata)
        select 'image_gen', ($2::uuid[])[1 + n % $3], 'pending', 'demo:painter', jsonb_build_object(
          'nodeId', format('%s_%s', $1::text, n), 'promptSpec', jsonb_build_object('basePrompt', 'a red fox'))
        from generate_series(1, $4) n""",
        label,
        ids,
        workflows,
        count,
    )
