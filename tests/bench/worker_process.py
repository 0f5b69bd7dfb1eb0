"""One worker of a system that is measured, as a process: `python -m tests.bench.worker_process KEY DSN`.

Prints a line once it listens, and works until it is killed. The daemon is ours without its provider and its storage
(`idle_provider.py`); pgqueuer runs as its own command runs it, on uvloop, with batches as large as ours.
"""

import asyncio
import json
import logging
import sys
from collections.abc import Awaitable, Callable

import asyncpg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.models import Job

from daemon.log import configure
from tests.bench.idle_provider import URL, idle_provider

BATCH = 100
POOL = 10
"""Connections of the handler that works by hand: asyncpg's own default."""

Handler = Callable[[Job], Awaitable[None]]


def say_ready() -> None:
    """Say that work may be inserted."""
    sys.stdout.write("ready\n")
    sys.stdout.flush()


async def daemon(dsn: str) -> None:
    """Work as the daemon."""
    async with idle_provider(dsn, slots=BATCH):
        say_ready()
        await asyncio.Event().wait()


async def bare(dsn: str) -> None:
    """Work as pgqueuer, with a handler that does nothing."""

    async def nothing(_job: Job) -> None:
        pass

    await pgqueuer(dsn, nothing)


async def handwritten(dsn: str) -> None:
    """Work as pgqueuer, with a handler that does what the daemon does: one statement after the other, as in the
    specification's patterns."""
    async with asyncpg.create_pool(dsn, min_size=POOL, max_size=POOL) as pool:

        async def note(run: str, kind: str, event: str, message: str) -> None:
            payload = json.dumps({"event": event, "message": message})
            await pool.execute("insert into run_events (run_id, kind, payload) values ($1, $2, $3)", run, kind, payload)

        async def work(job: Job) -> None:
            run = (job.payload or b"").decode()
            row = await pool.fetchrow(
                "update runs set status = 'running', started_at = now() where id = $1 returning metadata", run
            )
            assert row is not None
            node = json.loads(row["metadata"])["nodeId"]
            await note(run, "progress", "claimed", "A worker took the run.")
            await note(run, "progress", "submitted", "Sent to the provider.")
            # The provider answers at once.
            await note(run, "log", "generated", "The provider made the image.")
            await note(run, "log", "stored", "Stored.")
            payload = {"imageUrl": URL, "width": 1024, "height": 1024, "contentType": "image/png", "cost": 0.04}
            await pool.execute(
                "update runs set status = 'completed', finished_at = now(), payload = $2 where id = $1",
                run,
                json.dumps(payload),
            )
            await note(run, "progress", "completed", "The image is there.")
            data = {"imageUrl": URL, "status": "completed", "runId": run}
            await pool.execute(
                "update workflow_nodes set node_data = node_data || $2, updated_at = now() where id = $1",
                node,
                json.dumps(data),
            )

        await pgqueuer(dsn, work)


async def pgqueuer(dsn: str, handler: Handler) -> None:
    """Run pgqueuer with a handler."""
    connection = await asyncpg.connect(dsn)
    manager = PgQueuer(AsyncpgDriver(connection))
    manager.entrypoint("work")(handler)
    say_ready()
    await manager.qm.run(batch_size=BATCH)


if __name__ == "__main__":
    _, key, address = sys.argv
    configure("json")  # on stderr, as its command does
    logging.getLogger("daemon").setLevel(logging.WARNING)
    if key == "daemon":
        asyncio.run(daemon(address))
    else:
        uvloop.run({"bare": bare, "handwritten": handwritten}[key](address))
