"""The books of a run, as SQL tests read them."""

from decimal import Decimal
from typing import Any

from tests.sql.test_take_over import beat_for
from tests.support.protocol import Daemon, Db, insert_run, new_daemon, set_status
from tests.support.runs import run_row


async def call(db: Db, number: int) -> dict[str, Any]:
    """Fetch one call."""
    row = await db.fetchrow("select * from image_jobs.calls where id = $1", number)
    assert row is not None
    return dict(row)


async def state(db: Db, number: int) -> tuple[str, Decimal | None]:
    """Fetch the state and the cost of one call."""
    row = await call(db, number)
    assert (row["closed_at"] is None) == (row["state"] == "open")
    return row["state"], row["cost"]


async def payload(db: Db, run: str) -> dict[str, Any]:
    """Fetch what the payload of a run says of its cost."""
    found = (await run_row(db, run))["payload"] or {}
    return {key: found[key] for key in ("cost", "possibleCost") if key in found}


async def claimed(db: Db, daemon: Daemon, **options: Any) -> dict[str, Any]:
    """Insert a run and claim it."""
    await insert_run(db, **options)
    return await daemon.claim_one()


async def parked(db: Db, daemon: Daemon) -> dict[str, Any]:
    """Return the claim whose run is parked with a provider job."""
    first = await claimed(db, daemon)
    assert await daemon.park(first, due_in=0) == "settled"
    return first


def closes(claim: dict[str, Any], state: str, **more: Any) -> list[dict[str, Any]]:
    """Close the call of a claim in a settlement."""
    return [{"id": claim["call"], "state": state, **more}]


async def take_over(db: Db, daemon: Daemon, run: str) -> None:
    """Take a run away from a daemon that is silent, by another."""
    judge = await new_daemon(db)
    await beat_for(judge, 5, 40)
    assert await judge.take_over() == 1


async def cancel(db: Db, daemon: Daemon, run: str) -> None:
    """Cancel a run as an operator does."""
    await set_status(db, run, "cancelled")


async def requeue(db: Db, daemon: Daemon, run: str) -> None:
    """Requeue a run as an operator does."""
    await set_status(db, run, "pending")


async def delete(db: Db, daemon: Daemon, run: str) -> None:
    """Delete a run."""
    await db.execute("delete from runs where id = $1", run)
