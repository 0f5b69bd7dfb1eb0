"""Limits and requeues: of who asks, and of who made the run."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.sql.test_budgets import INSERT, OTHER, PROMPT, USER, limit, refused
from tests.support.postgres import connect, signed_in, wait_until
from tests.support.protocol import Db

pytestmark = pytest.mark.one_postgres

WAITING_FOR_A_LOCK = "select exists (select from pg_locks where not granted and pid = $1)"


@pytest.fixture
async def workflow(db: Db) -> UUID:
    """Return a workflow of two members."""
    workflow = uuid4()
    await db.execute("insert into image_jobs.workflows (id) values ($1)", workflow)
    await db.execute(
        "insert into workflow_members (workflow_id, user_id) values ($1, $2), ($1, $3)", workflow, USER, OTHER
    )
    return workflow


async def cancelled(db: Db, workflow: UUID, user: UUID | None) -> str:
    """Return a cancelled run of a user, or (null) of an operator's for nobody."""
    if user is None:
        await db.execute(INSERT, workflow, PROMPT, 1)
    else:
        async with signed_in(db, user):
            await db.execute(INSERT, workflow, PROMPT, 1)
    run: str = await db.fetchval("update runs set status = 'cancelled' returning id")
    return run


async def requeue(db: Db, run: str, user: UUID) -> dict[str, Any]:
    async with signed_in(db, user):
        record: dict[str, Any] = await db.fetchval("select requeue_run($1)", run)
        return record


@pytest.mark.parametrize("creator", [USER, None], ids=["of another member", "of nobody"])
async def test_a_requeue_meets_the_limits_of_who_asks(db: Db, workflow: UUID, creator: UUID | None) -> None:
    run = await cancelled(db, workflow, creator)
    await limit(db, "user", user=OTHER, images_per_day=0)
    error = await refused(requeue(db, run, OTHER))
    assert error["message"] == "One user may make 0 images a day, and this would be more."
    assert (await requeue(db, run, USER))["status"] == "pending"


async def test_a_requeue_meets_the_limits_of_the_creator(db: Db, workflow: UUID) -> None:
    run = await cancelled(db, workflow, USER)
    await limit(db, "user", user=USER, images_per_day=0)
    await refused(requeue(db, run, OTHER))


async def test_a_requeue_that_waited_for_a_cancel_is_limited(db: Db, database: str, workflow: UUID) -> None:
    run = await cancelled(db, workflow, USER)
    assert (await requeue(db, run, USER))["status"] == "pending"
    await limit(db, "user", user=USER, images_per_day=0)
    member = await connect(database)
    async with db.transaction():
        await db.execute("update runs set status = 'cancelled' where id = $1", run)
        again = asyncio.create_task(refused(requeue(member, run, USER)))
        pid = member.get_server_pid()

        async def stuck() -> bool:
            return again.done() or bool(await db.fetchval(WAITING_FOR_A_LOCK, pid))

        await wait_until(stuck)
    await again
    await member.close()
