"""The recipes of sql/README.md for a page: how many runs each is about, and then a slice at a time."""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import asyncpg
from pydantic import BaseModel, ConfigDict, Field

from daemon.database import Connection
from daemon.errors import ImageJobsError
from daemon.pages.dashboard.figures import PERIODS

SLICE = 500
"""Runs that one statement changes: each slice is a transaction of its own, and locks no more than these."""
TRIES = 3
"""Of a slice that meets a deadlock."""

Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=200)]
Limit: TypeAlias = Annotated[int, Field(ge=0, le=2**31 - 1)] | None


class _Operation(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Requeue(_Operation):
    """Put runs in line again that failed with a code, and ended in a period."""

    kind: Literal["requeue"]
    code: Annotated[str, Field(max_length=200)] | None
    period: Literal["15m", "1h", "24h", "7d"]


class RequeueRun(_Operation):
    """Put one run in line again, if it has failed or was cancelled."""

    kind: Literal["requeue_run"]
    run: Name


class Cancel(_Operation):
    """Cancel what waits for a provider or a model, or what it makes; or what waits to be tried again after a code."""

    kind: Literal["cancel"]
    state: Literal["pending", "running"]
    provider: Name | None = None
    model: Name | None = None
    code: Name | None = None


class Pause(_Operation):
    """Start nothing new at a provider or a model. What runs goes on."""

    kind: Literal["pause"]
    provider: Name
    model: Name | None = None


class Open(_Operation):
    """End a pause, and whatever has closed the model, or the provider with all its models."""

    kind: Literal["open"]
    provider: Name
    model: Name | None = None


class ChangeLimit(_Operation):
    """Change how many runs may start in a minute, and how many may be under way; null: any number."""

    kind: Literal["limit"]
    provider: Name
    model: Name | None = None
    per_minute: Limit = None
    max_running: Limit = None


Operation: TypeAlias = Annotated[
    Requeue | RequeueRun | Cancel | Pause | Open | ChangeLimit, Field(discriminator="kind")
]


class Bounds(_Operation):
    """Of the runs that were counted: none that is inserted, started, requeued or given back later is changed."""

    after: Annotated[datetime, Field(strict=False)]
    until: Annotated[datetime, Field(strict=False)]
    ticket: int


class Preview(NamedTuple):
    """How many runs an operation is about, and the present limits where it is about those."""

    runs: int
    bounds: Bounds
    per_minute: int | None = None
    max_running: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as the page reads it."""
        return {**self._asdict(), "bounds": self.bounds.model_dump(mode="json")}


class Done(NamedTuple):
    """How many runs a slice has changed, and how many are left for further ones."""

    done: int
    left: int


# Each part is an index of its own.
_FAILED = """
select r.id, r.status, r.ticket from public.runs r
where r.queue_state is null and r.ticket is not null and r.kind = 'image_gen'
  and r.claim >= (select image_jobs.claim_before($1)) and r.finished_at > $1 and r.finished_at <= $2
  and r.status = 'failed' and r.payload ->> 'code' is not distinct from $3::text"""
_UNFINISHED = """
select r.id, r.status, r.ticket from (
  select a.* from public.runs a where a.queue_state = 'pending' and a.kind = 'image_gen' and a.rank is not null and $2::text = 'pending'
  union all
  select b.* from public.runs b where b.queue_state = 'pending' and b.kind = 'image_gen' and b.rank is null and $2::text = 'pending'
  union all
  select c.* from public.runs c where c.queue_state = 'running' and c.kind = 'image_gen' and $2::text = 'running'
) r
where r.ticket <= $1
  -- A slice that is cancelled makes room: what starts in it was not counted.
  and ($2::text <> 'running' or r.started_at <= $6)
  -- Nor was what comes back to wait since then, or from another provider. Few have changed at all: of those events tell.
  and ($2::text = 'running' or r.updated_at <= $6 or not exists (
    select from public.run_events e where e.run_id = r.id and e.ts > $6
      and e.payload ->> 'event' in ('retry', 'taken_over', 'fallback')))
  and ($3::text is null or $3 = coalesce(
    (select p.name from image_jobs.providers p where p.name = split_part(coalesce(r.routed_to, r.processor), ':', 1)), '?'))
  and ($4::text is null or image_jobs.drawing_model(coalesce(r.routed_to, r.processor)) = $4)
  and ($5::text is null or r.payload ->> 'code' = $5)"""
_ONE = """
select r.id, r.status, r.ticket from public.runs r where r.kind = 'image_gen' and r.id = $1::text
  and r.ticket <= $2 and r.status in ('failed', 'cancelled')"""

_BOUNDS = """
select image_jobs.now() - $1::interval as after, image_jobs.now() as until, 9223372036854775807 as ticket"""
_LIMITS = """
select l.per_minute, l.max_running from image_jobs.provider_limits l
where l.provider = $1 and l.model is not distinct from $2"""


async def preview(connection: Connection, operation: Operation) -> Preview:
    """Count the runs that an operation is about. Change nothing."""
    period = PERIODS[operation.period if isinstance(operation, Requeue) else "1h"]
    bounds = Bounds.model_validate(dict(await _row(connection, _BOUNDS, period)))
    query, values = _chosen(operation, bounds)
    counted = await _row(
        connection,
        f"select count(*) as runs, max(ticket) as ticket from ({query}) chosen",  # noqa: S608 - of constants
        *values,
    )
    bounds = bounds.model_copy(update={"ticket": counted["ticket"] or 0})
    if isinstance(operation, ChangeLimit):
        limits = await connection.fetchrow(_LIMITS, operation.provider, operation.model)
        if limits is not None:
            return Preview(counted["runs"], bounds, limits["per_minute"], limits["max_running"])
    return Preview(counted["runs"], bounds)


async def carry_out(connection: Connection, operation: Operation, bounds: Bounds) -> Done:
    """Do an operation; of one that changes runs a slice.

    Raises:
        ImageJobsError: If an application's own trigger keeps a run as it is, and of every other error of the database.
    """
    match operation:
        case Requeue() | RequeueRun():
            return await _set_status(connection, "pending", operation, bounds)
        case Cancel():
            return await _set_status(connection, "cancelled", operation, bounds)
        case Pause():
            await connection.execute(
                "insert into image_jobs.provider_limits (provider, model, paused) values ($1, $2, true) "
                "on conflict (provider, model) do update set paused = true",
                operation.provider,
                operation.model,
            )
        case Open():
            async with connection.transaction():
                for statement in (
                    "update image_jobs.provider_limits set paused = false where provider = $1 and ($2::text is null or model = $2)",
                    "delete from image_jobs.provider_blocks where provider = $1 and ($2::text is null or model = $2)",
                ):
                    await connection.execute(statement, operation.provider, operation.model)
        case ChangeLimit():
            await connection.execute(
                "insert into image_jobs.provider_limits (provider, model, per_minute, max_running) values ($1, $2, $3, $4) "
                "on conflict (provider, model) do update set per_minute = $3, max_running = $4",
                operation.provider,
                operation.model,
                operation.per_minute,
                operation.max_running,
            )
    return Done(0, 0)


async def _set_status(
    connection: Connection, status: str, operation: Requeue | RequeueRun | Cancel, bounds: Bounds
) -> Done:
    query, values = _chosen(operation, bounds)
    change = f"""
        with slice as materialized (select c.id, c.status from ({query}) c limit {SLICE}),
        locked as materialized (
          select r.id from public.runs r join slice on slice.id = r.id and slice.status = r.status order by r.id for update of r
        )
        update public.runs r set status = '{status}' from locked where r.id = locked.id"""  # noqa: S608 - of constants
    done = int((await _persistently(connection, change, *values)).split()[-1])
    count = f"select count(*) as runs from ({query}) chosen"  # noqa: S608 - of constants
    left = 0 if isinstance(operation, RequeueRun) else (await _row(connection, count, *values))["runs"]
    return Done(done, left)


async def _persistently(connection: Connection, statement: str, *values: object) -> str:
    """Execute a statement; again after a deadlock, of which the database has ended one side."""
    for _ in range(TRIES - 1):
        try:
            return await connection.execute(statement, *values)
        except (asyncpg.DeadlockDetectedError, asyncpg.SerializationError):
            continue
    return await connection.execute(statement, *values)


def _chosen(operation: Operation, bounds: Bounds) -> tuple[str, Sequence[object]]:
    """Return the query for the runs that an operation is about, and its values."""
    match operation:
        case Requeue():
            return _FAILED, (bounds.after, bounds.until, operation.code)
        case RequeueRun():
            return _ONE, (operation.run, bounds.ticket)
        case Cancel():
            return _UNFINISHED, (
                *(bounds.ticket, operation.state),
                *(operation.provider, operation.model, operation.code, bounds.until),
            )
        case Pause() | Open() | ChangeLimit():
            return _UNFINISHED, (bounds.ticket, "pending", operation.provider, operation.model, None, bounds.until)


async def _row(connection: Connection, query: str, *values: object) -> asyncpg.Record:
    row = await connection.fetchrow(query, *values)
    if row is None:
        raise ImageJobsError("The database has returned nothing.", "Try again.")
    return row
