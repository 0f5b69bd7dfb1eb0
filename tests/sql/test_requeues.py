"""Limits and requeues: of who asks, and of who made the run."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest

from tests.sql.test_budgets import INSERT, OTHER, PROMPT, USER, insert_as, limit, refused, usage
from tests.support.postgres import connect, signed_in, wait_until
from tests.support.protocol import Db, new_daemon

pytestmark = pytest.mark.one_postgres

WAITS = "select exists (select from pg_locks where not granted and pid = $1)"


@pytest.fixture
async def crowd(database: str) -> AsyncIterator[list[Db]]:
    connections = [await connect(database) for _ in range(2)]
    yield connections
    for connection in connections:
        await connection.close()


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
        await insert_as(db, user, 1, workflow)
    run: str = await db.fetchval("update runs set status = 'cancelled' where status = 'pending' returning id")
    return run


async def requeue(db: Db, run: str, user: UUID) -> dict[str, Any]:
    async with signed_in(db, user):
        record: dict[str, Any] = await db.fetchval("select requeue_run($1)", run)
        return record


async def until_it_waits(db: Db, task: asyncio.Task[Any], connection: Db) -> None:
    """Wait until a connection's statement waits for a lock, or is done."""
    pid = connection.get_server_pid()

    async def waits() -> bool:
        return task.done() or bool(await db.fetchval(WAITS, pid))

    await wait_until(waits, 30)


@pytest.mark.parametrize("creator", [USER, None], ids=["of another member", "of nobody"])
async def test_a_requeue_meets_the_limits_of_who_asks(db: Db, workflow: UUID, creator: UUID | None) -> None:
    run = await cancelled(db, workflow, creator)
    await limit(db, "user", user=OTHER, images_per_day=0)
    error = await refused(requeue(db, run, OTHER))
    assert error["message"] == "One user may make 0 images a day, and this would be more."
    assert (await requeue(db, run, USER))["status"] == "pending"


async def test_a_requeue_counts_on_who_asks(db: Db, workflow: UUID) -> None:
    """A member who could requeue at the creator's expense could spend all that the creator may use."""
    daemon = await new_daemon(db)
    runs = [await cancelled(db, workflow, USER) for _ in range(3)]
    await limit(db, images_per_day=2)
    assert (await usage(db, OTHER))[0]["used_images"] == 0
    await requeue(db, runs[0], OTHER)
    for user, used, waiting in ((USER, 0, 0), (OTHER, 1, 1)):
        row = (await usage(db, user))[0]
        assert (row["used_images"], row["waiting"]) == (used, waiting)
    await daemon.complete(await daemon.claim_one())
    await requeue(db, runs[1], OTHER)
    assert [(await usage(db, user))[0]["used_images"] for user in (USER, OTHER)] == [0, 2]
    assert "2 images a day" in (await refused(requeue(db, runs[2], OTHER)))["message"]
    # Its creator's again, once the creator asks.
    await db.execute("update runs set status = 'cancelled' where id = $1", runs[1])
    await requeue(db, runs[1], USER)
    assert [(await usage(db, user))[0]["used_images"] for user in (USER, OTHER)] == [1, 1]
    await requeue(db, runs[2], OTHER)
    await db.execute("select image_jobs.forget_user($1)", OTHER)
    assert await db.fetchval("select count(*) from runs where requeued_by is not null") == 0
    assert await db.fetchval("select count(*) from image_jobs.calls where user_id = $1", OTHER) == 0


async def test_a_requeue_that_waited_for_a_cancel_is_limited(db: Db, crowd: list[Db], workflow: UUID) -> None:
    run = await cancelled(db, workflow, USER)
    await requeue(db, run, USER)
    await limit(db, "user", user=USER, images_per_day=0)
    async with db.transaction():
        await db.execute("update runs set status = 'cancelled' where id = $1", run)
        again = asyncio.create_task(refused(requeue(crowd[0], run, USER)))
        await until_it_waits(db, again, crowd[0])
    await again


async def test_insert_and_requeue_open_a_lane_without_deadlock(db: Db, crowd: list[Db], workflow: UUID) -> None:
    """A requeue has the lock of the workflow's limit and waits for the run; an insert comes, and waits for that lock."""
    run = await cancelled(db, workflow, USER)
    await limit(db, "workflow", workflow=workflow, images_per_day=9)
    await db.execute("insert into image_jobs.provider_limits (provider, model) values ('demo', 'painter')")
    async with db.transaction():
        await db.execute("select from runs where id = $1 for update", run)
        again = asyncio.create_task(requeue(crowd[0], run, USER))
        await until_it_waits(db, again, crowd[0])
        inserted = asyncio.create_task(insert_as(crowd[1], OTHER, 1, workflow))
        await until_it_waits(db, inserted, crowd[1])
    await asyncio.gather(again, inserted)
    assert await db.fetchval("select count(*) from runs where lane = 'demo:painter' and status = 'pending'") == 2
