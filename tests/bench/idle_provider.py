"""A daemon whose provider and storage take no time: everything else of it is real."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid5

import asyncpg

from daemon.listener import Listener
from daemon.queue import Claimed, Queue
from daemon.turns import Turns
from tests.postgres import wait_until
from tests.runs import WORKFLOW, register

Db = asyncpg.Connection


class IdleProvider:
    """Listens, takes turns, and hands each claimed run to `start`, which settles it at once unless told otherwise."""

    def __init__(self, dsn: str, queue: Queue, daemon: UUID, slots: int) -> None:
        self.settled = 0
        self.start: Callable[[Claimed], None] = self.settle
        self._settling: set[asyncio.Task[None]] = set()
        self.turns = Turns(
            queue,
            daemon=lambda: daemon,
            slots=slots,
            start=self._on_claimed,
            lost=lambda _: None,
            fenced=_never_fenced,
        )
        self.listener = Listener(
            dsn,
            daemon=lambda: daemon,
            wake=self.turns.wake,
            connected=self.turns.look_closely,
            drop=lambda _: None,
        )

    def _on_claimed(self, run: Claimed) -> None:
        self.start(run)

    def settle(self, run: Claimed) -> None:
        """Writes back that the image is there."""
        task = asyncio.create_task(self._settle(run))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _settle(self, run: Claimed) -> None:
        assert await self.turns.settle(run, done()) == "settled"
        self.settled += 1


async def _never_fenced(_: UUID) -> None:
    raise AssertionError


@asynccontextmanager
async def idle_provider(dsn: str, *, slots: int, accepting: bool = True) -> AsyncIterator[IdleProvider]:
    """Such a daemon, for as long as the block lasts."""
    async with Queue(dsn) as queue:
        it = IdleProvider(dsn, queue, await register(queue, slots=slots), slots)
        it.turns.accepting = accepting
        tasks = [asyncio.create_task(it.listener.run()), asyncio.create_task(it.turns.run())]
        try:
            await wait_until(lambda: it.listener.hears)
            yield it
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def done() -> dict[str, Any]:
    """A settlement with what a real one has: two events, a payload, timings."""
    url = "https://example.supabase.co/storage/v1/object/public/images/workflow/run.png?v=01234567"
    return {
        "outcome": "completed",
        "payload": {
            "imageUrl": url,
            "thumbnailUrl": url.replace(".png", ".thumb.webp"),
            "width": 1024,
            "height": 1024,
            "contentType": "image/png",
            "bytes": 1_234_567,
            "model": "painter",
            "requestedModel": "painter",
            "cost": 0.04,
            "timings": {"queuedMs": 3, "generateMs": 9000, "storeMs": 300},
        },
        "events": [
            {"kind": "log", "payload": {"event": "generated", "message": "The provider made the image."}},
            {"kind": "log", "payload": {"event": "stored", "message": "Stored.", "data": {"uploadTries": 1}}},
        ],
    }


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
    while await db.fetchval("select exists (select from private.stale_nodes)"):
        await db.execute("select private.refresh_stale_nodes()")
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
