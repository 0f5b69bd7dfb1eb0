"""The daemon's side of the SQL contract, as any daemon in any language would call it."""

from dataclasses import dataclass
from typing import Any
from uuid import UUID, uuid4

import asyncpg

from tests.postgres import signed_in
from tests.runs import insert_run, run_row

Db = asyncpg.Connection

IMAGE = "https://example.supabase.co/storage/v1/object/public/images/w/r.png?v=0a1b2c3d"

STATES = ("pending", "running", "parked", "completed", "failed", "cancelled")
UNFINISHED = ("pending", "running", "parked")
TERMINAL = ("completed", "failed", "cancelled")
OPERATORS = ("postgres", "service_role")


@dataclass
class Daemon:
    """A registered daemon. Claims are the dictionaries that `private.claimed_run` makes."""

    connection: Db
    id: UUID

    async def turn(
        self,
        slots: int = 0,
        *,
        thorough: bool = True,
        settlements: list[dict[str, Any]] | None = None,
        progress: list[dict[str, Any]] | None = None,
        held: list[int] | None = None,
        awake: float | None = None,
    ) -> list[dict[str, Any]]:
        """One turn; answers what it claimed, recorded and settled."""
        rows = await self.connection.fetch(
            "select part, run from private.turn($1, $2, $3, $4, $5, $6, $7)",
            self.id,
            slots,
            thorough,
            settlements or [],
            progress or [],
            held,
            awake,
        )
        return [{"part": row["part"], **row["run"]} for row in rows]

    async def claim(self, slots: int = 1, *, thorough: bool = True) -> list[dict[str, Any]]:
        """Claims up to so many runs."""
        return await self.turn(slots, thorough=thorough)

    async def claim_one(self) -> dict[str, Any]:
        """Claims the one run that there is to claim."""
        (claimed,) = await self.claim(100)
        return claimed

    async def settle(self, claimed: dict[str, Any], outcome: str, **settlement: Any) -> str:
        """Settles one run; answers the result."""
        entry = {"id": claimed["id"], "claim": claimed["claim"], "outcome": outcome, **settlement}
        (answer,) = await self.turn(settlements=[entry])
        assert (answer["id"], answer["claim"]) == (claimed["id"], claimed["claim"])
        return answer["result"]

    async def complete(self, claimed: dict[str, Any], url: str = IMAGE, **payload: Any) -> str:
        """Settles one run as completed."""
        return await self.settle(claimed, "completed", payload={"imageUrl": url, **payload})

    async def fail(self, claimed: dict[str, Any], code: str = "refused", error: str = "No.", **payload: Any) -> str:
        """Settles one run as failed."""
        return await self.settle(
            claimed, "failed", payload={"error": error, "code": code, "hint": "Ask again.", **payload}
        )

    async def park(
        self, claimed: dict[str, Any], provider_job_id: str = "order-1", due_in: float = 5, **more: Any
    ) -> str:
        """Parks one run at the provider."""
        return await self.settle(claimed, "parked", provider_job_id=provider_job_id, due_in=due_in, **more)

    async def record(self, claimed: dict[str, Any], **progress: Any) -> str:
        """Records progress of one run; answers the result."""
        (answer,) = await self.turn(progress=[{"id": claimed["id"], "claim": claimed["claim"], **progress}])
        return answer["result"]

    async def beat(self, *, session_lock: bool = False) -> None:
        """Gives a sign of life."""
        await self.connection.execute("select private.heartbeat($1, 0, $2, false)", self.id, session_lock)

    async def take_over(self) -> int:
        """Takes over from silent daemons; answers how many runs."""
        return await self.connection.fetchval("select private.take_over($1)", self.id)


async def new_daemon(connection: Db, *providers: str, lease: str = "30 s") -> Daemon:
    """Registers a daemon that serves `providers` (demo if none are named)."""
    daemon = Daemon(connection, uuid4())
    await connection.execute(
        "select private.register_daemon($1, 'test', '0', 4, $2::text::interval, $3)",
        daemon.id,
        lease,
        list(providers or ("demo",)),
    )
    return daemon


async def move_clock(connection: Db, offset: str) -> None:
    """Moves the session's clock, to so much after the real one."""
    await connection.execute("select set_config('image_jobs.clock_offset', $1, false)", offset)


async def run_in(connection: Db, daemon: Daemon, state: str, **options: Any) -> str:
    """Inserts a run and brings it into a state: pending, running, parked, completed, failed or cancelled."""
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
    """The events of a run in order: their kind and payload in one dictionary."""
    rows = await connection.fetch("select kind, payload from run_events where run_id = $1 order by seq", run)
    return [{"kind": row["kind"], **row["payload"]} for row in rows]


async def insert_node(connection: Db, node: str, workflow: UUID, **node_data: Any) -> None:
    """Inserts a node, as an operator."""
    await connection.execute(
        "insert into workflow_nodes (id, workflow_id, node_type, node_data) values ($1, $2, 'image_generation', $3)",
        node,
        workflow,
        node_data,
    )


async def node_data(connection: Db, node: str) -> dict[str, Any]:
    """What a node shows, without the time of its last change."""
    data = await connection.fetchval("select node_data from workflow_nodes where id = $1", node)
    data.pop("updatedAt", None)
    return data


async def as_operator(connection: Db, role: str, query: str, *arguments: object) -> "asyncpg.Record | None":
    """Runs one statement as an operator: the owner, or what PostgREST makes of the service role's key."""
    if role == "postgres":
        return await connection.fetchrow(query, *arguments)
    async with signed_in(connection, role=role):
        return await connection.fetchrow(query, *arguments)


async def set_status(connection: Db, run: str, status: str, role: str = "postgres") -> None:
    """A plain UPDATE from outside."""
    await as_operator(connection, role, "update runs set status = $2 where id = $1", run, status)
