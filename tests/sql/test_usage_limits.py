"""Usage limits: how many runs may wait."""

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import asyncpg
import pytest

from tests.support.postgres import connect, signed_in
from tests.support.protocol import Daemon, Db, as_operator, new_daemon

USER = UUID("aaaaaaaa-0000-4000-8000-00000000000a")
OTHER = UUID("bbbbbbbb-0000-4000-8000-00000000000b")
PROMPT = {"promptSpec": {"basePrompt": "a red fox"}}
INSERT = """insert into runs (kind, subject_id, processor, metadata)
select 'image_gen', $1, 'demo:painter', $2 from generate_series(1, $3)"""

Refusal = asyncpg.PostgresError


async def insert_as(db: Db, user: UUID, count: int, workflow: UUID | None = None, **claims: Any) -> None:
    """Insert runs in one statement as a signed-in user."""
    async with signed_in(db, user, **claims):
        await db.execute(INSERT, workflow or uuid4(), PROMPT, count)


async def refused(db: Db, user: UUID, count: int, workflow: UUID | None = None, **claims: Any) -> Refusal:
    """Return the error of an insert that a limit refuses."""
    with pytest.raises(Refusal) as error:
        await insert_as(db, user, count, workflow, **claims)
    assert error.value.sqlstate == "PT429"
    return error.value


async def limit(db: Db, applies_to: str, max_waiting: int | None, user: Any = None, workflow: Any = None) -> None:
    await db.execute(
        """insert into image_jobs.usage_limits (applies_to, user_id, workflow_id, max_waiting) values ($1, $2, $3, $4)
        on conflict (applies_to, user_id, workflow_id) do update set max_waiting = excluded.max_waiting""",
        applies_to,
        user,
        workflow,
        max_waiting,
    )


async def test_the_501st_waiting_run_of_a_user_is_refused(db: Db) -> None:
    workflow = uuid4()
    await insert_as(db, USER, 500, workflow)
    error = await refused(db, USER, 1, workflow)
    assert error.as_dict()["message"] == "At most 500 runs of one user may wait at a time, and this would make more."
    assert error.as_dict()["message"].isascii()
    assert error.as_dict()["hint"] == "Cancel runs that wait, or wait until some have started."
    await insert_as(db, OTHER, 1)


async def test_a_statement_beyond_the_limit_inserts_nothing(db: Db) -> None:
    await limit(db, "each user", 5)
    await refused(db, USER, 6)
    assert await db.fetchval("select count(*) from runs") == 0
    await insert_as(db, USER, 5)


async def test_a_run_that_has_started_makes_room(db: Db, daemon: Daemon) -> None:
    await limit(db, "each user", 2)
    await insert_as(db, USER, 2)
    await refused(db, USER, 1)
    await daemon.claim(1)
    await insert_as(db, USER, 1)
    await refused(db, USER, 1)


async def test_runs_that_were_put_off_count_as_waiting(db: Db) -> None:
    await limit(db, "each user", 2)
    async with signed_in(db, USER):
        await db.execute(
            """insert into runs (kind, subject_id, processor, metadata, due_at)
            select 'image_gen', gen_random_uuid(), 'demo:painter', $1, now() + interval '1 day'
            from generate_series(1, 2)""",
            PROMPT,
        )
    await refused(db, USER, 1)


@pytest.mark.parametrize("role", ["postgres", "service_role"])
async def test_operators_count_for_a_user_and_are_not_refused(db: Db, role: str) -> None:
    await limit(db, "each user", 2)
    for _ in range(3):
        await as_operator(
            db,
            role,
            """insert into runs (kind, subject_id, processor, metadata, created_by)
            values ('image_gen', $1, 'demo:painter', $2, $3)""",
            uuid4(),
            PROMPT,
            USER,
        )
    await refused(db, USER, 1)


async def test_a_row_for_a_user_holds_instead_of_each(db: Db) -> None:
    await limit(db, "each user", 1)
    await limit(db, "user", None, user=USER)
    await insert_as(db, USER, 3)
    await refused(db, OTHER, 2)
    await limit(db, "user", 4, user=USER)
    await refused(db, USER, 2)


async def test_anonymous_users_have_a_limit_of_their_own(db: Db) -> None:
    await limit(db, "each anonymous user", 1)
    await refused(db, USER, 2, is_anonymous=True)
    await insert_as(db, OTHER, 2, is_anonymous=False)


async def test_a_limit_of_a_workflow_counts_all_members(db: Db, member: UUID) -> None:
    workflow = uuid4()
    await db.execute(
        "insert into workflow_members (workflow_id, user_id) values ($1, $2), ($1, $3)", workflow, USER, OTHER
    )
    await limit(db, "workflow", 2, workflow=workflow)
    await insert_as(db, USER, 1, workflow)
    await insert_as(db, OTHER, 1, workflow)
    error = await refused(db, USER, 1, workflow)
    assert "of this workflow" in str(error)
    await insert_as(db, USER, 3)


async def test_all_together_have_a_limit(db: Db) -> None:
    await limit(db, "all together", 3)
    await insert_as(db, USER, 2)
    await refused(db, OTHER, 2)
    await insert_as(db, OTHER, 1)


async def test_a_repeat_of_an_idempotency_key_is_not_refused(db: Db) -> None:
    await limit(db, "each user", 1)
    request: dict[str, Any] = {
        "nodeId": "n",
        "workflowId": str(uuid4()),
        "provider": "demo",
        "model": "painter",
        "idempotencyKey": "once",
        **PROMPT,
    }
    async with signed_in(db, USER):
        first = await db.fetchval("select start_image_job($1)", request)
    async with signed_in(db, USER):
        assert (await db.fetchval("select start_image_job($1)", request))["jobId"] == first["jobId"]
    with pytest.raises(asyncpg.UniqueViolationError):
        async with signed_in(db, USER):
            await db.execute(
                INSERT, UUID(request["workflowId"]), {**PROMPT, "idempotencyKey": "once", "nodeId": "n"}, 1
            )
    with pytest.raises(Refusal) as error:
        async with signed_in(db, USER):
            await db.fetchval("select start_image_job($1)", {**request, "idempotencyKey": "twice"})
    assert error.value.sqlstate == "PT429"


async def test_a_requeue_beyond_the_limit_is_refused(db: Db) -> None:
    await limit(db, "each user", 1)
    await insert_as(db, USER, 1)
    run = await db.fetchval("update runs set status = 'cancelled' returning id")
    await insert_as(db, USER, 1)
    with pytest.raises(Refusal) as error:
        async with signed_in(db, USER):
            await db.fetchval("select requeue_run($1)", run)
    assert error.value.sqlstate == "PT429"
    await db.execute("update runs set status = 'cancelled' where status = 'pending'")
    async with signed_in(db, USER):
        assert (await db.fetchval("select requeue_run($1)", run))["status"] == "pending"


async def test_rows_of_other_kinds_are_not_counted(db: Db) -> None:
    await limit(db, "all together", 0)
    await db.execute(
        "insert into runs (id, kind, subject_id, status) select 'r' || n, 'research', gen_random_uuid(), 'pending' "
        "from generate_series(1, 3) n"
    )
    await limit(db, "all together", 1)
    await insert_as(db, USER, 1)


@pytest.fixture
async def crowd(database: str) -> AsyncIterator[list[Db]]:
    connections = [await connect(database) for _ in range(6)]
    yield connections
    for connection in connections:
        await connection.close()


async def test_concurrent_inserts_do_not_pass_the_limit(db: Db, crowd: list[Db]) -> None:
    await limit(db, "each user", 20)

    async def insert(connection: Db) -> int:
        inserted = 0
        for _ in range(6):
            try:
                await insert_as(connection, USER, 1)
            except Refusal as error:
                assert error.sqlstate == "PT429"
            else:
                inserted += 1
        return inserted

    assert sum(await asyncio.gather(*map(insert, crowd))) == 20


# The load has to last to mean something; IMAGE_JOBS_LOAD=20 by hand.
SECONDS = float(os.environ.get("IMAGE_JOBS_LOAD", "2"))


@pytest.mark.one_postgres
async def test_inserts_in_opposite_order_meet_no_deadlock(db: Db, crowd: list[Db]) -> None:
    """Two members insert into the same two workflows, and requeue there, while daemons settle. Errors of clients are raised."""
    workflows = [uuid4(), uuid4()]
    await db.execute("insert into image_jobs.workflows (id) select unnest($1::uuid[])", workflows)
    await db.execute(
        "insert into workflow_members (workflow_id, user_id) select w, u from unnest($1::uuid[]) w, unnest($2::uuid[]) u",
        workflows,
        [USER, OTHER],
    )
    for workflow in workflows:
        await limit(db, "workflow", 1_000_000, workflow=workflow)
    await limit(db, "all together", 1_000_000)
    await limit(db, "each user", 1_000_000)
    until = time.monotonic() + SECONDS
    done = {"inserted": 0, "requeued": 0, "settled": 0}

    async def act(connection: Db, user: UUID, sequence: list[UUID], chance: random.Random) -> None:
        while time.monotonic() < until:
            async with signed_in(connection, user):
                await connection.execute(
                    """insert into runs (kind, subject_id, processor, metadata)
                    select 'image_gen', w, 'demo:painter', $2 from unnest($1::uuid[]) w""",
                    sequence,
                    PROMPT,
                )
            done["inserted"] += 1
            runs = await connection.fetch("select id from runs where status = 'failed' order by random() limit 1")
            for run in runs:
                try:
                    async with signed_in(connection, user):
                        await connection.fetchval("select requeue_run($1)", run["id"])
                    done["requeued"] += 1
                except asyncpg.InvalidParameterValueError as error:
                    assert "cannot be requeued" in str(error)  # the other member was faster

    async def serve(connection: Db) -> None:
        daemon = await new_daemon(connection)
        held: list[dict[str, Any]] = []
        while time.monotonic() < until:
            settlements = [
                {"id": run["id"], "claim": run["claim"], "outcome": "failed", "payload": {"error": "No."}}
                for run in held
            ]
            rows = await daemon.sync(8, full_scan=False, settlements=settlements)
            held = [row for row in rows if row["part"] == "claimed"]
            done["settled"] += len(settlements)

    async with asyncio.TaskGroup() as group:
        for number, connection in enumerate(crowd[:4]):
            sequence = workflows if number % 2 else workflows[::-1]
            group.create_task(act(connection, [USER, OTHER][number % 2], sequence, random.Random(number)))
        for connection in crowd[4:]:
            group.create_task(serve(connection))
    assert all(done.values()), done
