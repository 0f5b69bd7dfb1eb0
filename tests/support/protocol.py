"""The daemon's side of the SQL contract, as any daemon in any language would call it."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from tests.support.postgres import signed_in
from tests.support.runs import insert_run, run_row

Db = asyncpg.Connection

IMAGE = "https://example.supabase.co/storage/v1/object/public/images/w/r.png?v=0a1b2c3d"

STATES = ("pending", "running", "parked", "completed", "failed", "cancelled")
UNFINISHED = ("pending", "running", "parked")
TERMINAL = ("completed", "failed", "cancelled")
OPERATORS = ("postgres", "service_role")

NOON = datetime(2031, 6, 15, 12, tzinfo=UTC)
"""Of a day in the middle of a month: budgets, which end at midnight, do not end meanwhile."""


@dataclass
class Daemon:
    """A registered daemon. Claims are the dictionaries that `image_jobs.claimed_run` makes."""

    connection: Db
    id: UUID

    async def sync(
        self,
        slots: int = 0,
        *,
        full_scan: bool = True,
        settlements: list[dict[str, Any]] | None = None,
        progress: list[dict[str, Any]] | None = None,
        held: list[int] | None = None,
        awake: float | None = None,
        unreachable: list[str] | None = None,
        newest: int | None = None,
    ) -> list[dict[str, Any]]:
        """Sync once; return what was claimed, recorded and settled."""
        rows = await self.connection.fetch(
            "select part, run from image_jobs.sync($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            self.id,
            slots,
            full_scan,
            settlements or [],
            progress or [],
            held,
            awake,
            unreachable,
            newest,
        )
        return [{"part": row["part"], **row["run"]} for row in rows]

    async def claim(self, slots: int = 1, *, full_scan: bool = True) -> list[dict[str, Any]]:
        """Claim up to so many runs."""
        return await self.sync(slots, full_scan=full_scan)

    async def claim_one(self) -> dict[str, Any]:
        """Claim the one run that there is to claim."""
        (claimed,) = await self.claim(100)
        return claimed

    async def settle(self, claimed: dict[str, Any], outcome: str, **settlement: Any) -> str:
        """Settle one run; return the result."""
        entry = {"id": claimed["id"], "claim": claimed["claim"], "outcome": outcome, **settlement}
        (row,) = await self.sync(settlements=[entry])
        assert (row["id"], row["claim"]) == (claimed["id"], claimed["claim"])
        return row["result"]

    async def complete(self, claimed: dict[str, Any], url: str = IMAGE, **payload: Any) -> str:
        """Settle one run as completed."""
        return await self.settle(claimed, "completed", payload={"imageUrl": url, **payload})

    async def fail(self, claimed: dict[str, Any], code: str = "refused", error: str = "No.", **payload: Any) -> str:
        """Settle one run as failed."""
        return await self.settle(
            claimed,
            "failed",
            payload={"error": error, "code": code, "hint": "Ask again.", **payload},
            calls=[{"id": claimed["call"], "state": "free"}],
        )

    async def park(
        self, claimed: dict[str, Any], provider_job_id: str = "order-1", due_in: float = 5, **more: Any
    ) -> str:
        """Park one run at the provider."""
        return await self.settle(claimed, "parked", provider_job_id=provider_job_id, due_in=due_in, **more)

    async def record(self, claimed: dict[str, Any], **progress: Any) -> str:
        """Record progress of one run; return the result."""
        (row,) = await self.sync(progress=[{"id": claimed["id"], "claim": claimed["claim"], **progress}])
        return row["result"]

    async def beat(self, *, session_lock: bool = False) -> None:
        """Beat once."""
        await self.connection.execute("select image_jobs.heartbeat($1, 0, $2, false)", self.id, session_lock)

    async def take_over(self) -> int:
        """Take over from silent daemons; return how many runs."""
        return await self.connection.fetchval("select image_jobs.take_over($1)", self.id)


async def new_daemon(connection: Db, *providers: str, lease: str = "30 s") -> Daemon:
    """Register a daemon that serves `providers` (demo if none are named)."""
    daemon = Daemon(connection, uuid4())
    await connection.execute(
        "select image_jobs.register_daemon($1, 'test', '0', 4, $2::text::interval, $3)",
        daemon.id,
        lease,
        list(providers or ("demo",)),
    )
    return daemon


async def move_clock(connection: Db, offset: str) -> None:
    """Move the session's clock, to so much after the real one."""
    await connection.execute("select set_config('image_jobs.clock_offset', $1, false)", offset)


async def move_clock_to(connection: Db, moment: datetime) -> None:
    """Move the session's clock to a moment, from which it goes on."""
    await move_clock(connection, f"{(moment - datetime.now(UTC)).total_seconds()} s")


async def run_in(connection: Db, daemon: Daemon, state: str, **options: Any) -> str:
    """Insert a run and bring it into a state: pending, running, parked, completed, failed or cancelled."""
    run = await insert_run(connection, **options)
    if state == "cancelled":
        await connection.execute("update runs set status = 'cancelled' where id = $1", run)
    elif state != "pending":
        claimed = await daemon.claim_one()
        assert claimed["id"] == run
        match state:
            case "parked":
                await daemon.park(claimed)
            case "completed":
                await daemon.complete(claimed)
            case "failed":
                await daemon.fail(claimed)
            case _:
                assert state == "running"
    assert (await run_row(connection, run))["status"] == {"parked": "running"}.get(state, state)
    return run


async def events(connection: Db, run: str) -> list[dict[str, Any]]:
    """Fetch the events of a run in sequence: their kind and payload in one dictionary."""
    rows = await connection.fetch("select kind, payload from run_events where run_id = $1 order by seq", run)
    return [{"kind": row["kind"], **row["payload"]} for row in rows]


async def insert_node(connection: Db, node: str, workflow: UUID, **node_data: Any) -> None:
    """Insert a node, as an operator."""
    await connection.execute(
        "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ($1, $2, 'image_generation', $3)",
        node,
        workflow,
        node_data,
    )


async def node_data(connection: Db, node: str) -> dict[str, Any]:
    """Fetch the data of a node, without the time of its last change."""
    data = await connection.fetchval("select node_data from workflow_nodes where id = $1", node)
    data.pop("updatedAt", None)
    return data


async def as_operator(connection: Db, role: str, query: str, *arguments: object) -> "asyncpg.Record | None":
    """Run one statement as an operator: the owner, or the service role as PostgREST sets it."""
    if role == "postgres":
        return await connection.fetchrow(query, *arguments)
    async with signed_in(connection, role=role):
        return await connection.fetchrow(query, *arguments)


async def set_status(connection: Db, run: str, status: str, role: str = "postgres") -> None:
    """Set the status by a plain UPDATE from outside."""
    await as_operator(connection, role, "update runs set status = $2 where id = $1", run, status)
