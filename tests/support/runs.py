"""Runs and daemons for tests, by plain SQL."""

import json
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from daemon.queue.client import Queue

WORKFLOW = UUID("aaaaaaaa-0000-4000-8000-000000000000")


async def insert_runs(
    connection: "asyncpg.Connection[asyncpg.Record]",
    count: int = 1,
    *,
    processor: str = "demo:painter",
    workflow: UUID = WORKFLOW,
    prompt: dict[str, Any] | None = None,
    **metadata: Any,
) -> list[str]:
    """Insert runs in one statement, as an operator; return their ids."""
    rows = await connection.fetch(
        """insert into runs (kind, subject_id, status, processor, metadata)
        select 'image_gen', $1, 'pending', $2, $3::jsonb || jsonb_build_object('number', n)
        from generate_series(1, $4) n returning id""",
        workflow,
        processor,
        {"promptSpec": {"basePrompt": "a red fox", **(prompt or {})}, **metadata},
        count,
    )
    return [row["id"] for row in rows]


async def insert_run(connection: "asyncpg.Connection[asyncpg.Record]", **options: Any) -> str:
    """Insert one run; see `insert_runs`."""
    (run,) = await insert_runs(connection, **options)
    return run


async def run_row(connection: "asyncpg.Connection[asyncpg.Record]", run: str) -> "asyncpg.Record":
    """Fetch the row of a run."""
    row = await connection.fetchrow("select * from runs where id = $1", run)
    assert row is not None
    return row


async def event_names(connection: "asyncpg.Connection[asyncpg.Record]", run: str) -> list[str]:
    """Fetch the names of the events of a run, in sequence."""
    rows = await connection.fetch(
        "select payload ->> 'event' as event from run_events where run_id = $1 order by seq", run
    )
    return [row["event"] for row in rows]


async def register(queue: Queue, *, slots: int = 4, lease: float = 30, providers: tuple[str, ...] = ("demo",)) -> UUID:
    """Register a daemon and return its id."""
    daemon = uuid4()
    await queue.register_daemon(
        daemon, name="test", version="0", slots=slots, lease=timedelta(seconds=lease), providers=providers
    )
    return daemon


def completed(url: str = "https://example.supabase.co/x.png") -> dict[str, Any]:
    """Return the body of a settlement that completes a run."""
    return {"outcome": "completed", "payload": {"imageUrl": url, "cost": 0.01}, "events": []}


def in_milliseconds(took: timedelta) -> int:
    """Return whole milliseconds, a half rounded up as Postgres does it: Python's `round` goes to the even one."""
    return (took // timedelta(microseconds=1) + 500) // 1000


def as_json(value: object) -> Any:
    """Return a jsonb column as Python, whichever codec the connection has."""
    return json.loads(value) if isinstance(value, str) else value
