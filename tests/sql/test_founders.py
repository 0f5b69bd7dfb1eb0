"""Founders of workflows: the first user of an id becomes its member, and no other one."""

import asyncio
from uuid import uuid4

import asyncpg
import pytest

from tests.sql.test_rls import ANN, ANNS, BOB, DENIED, INSERT_NODE, INSERT_RUN, asking
from tests.sql.test_rls import db as db  # noqa: PLC0414 - a fixture
from tests.support.postgres import connect, signed_in

pytestmark = pytest.mark.every_postgres


async def test_the_first_user_of_a_new_workflow_becomes_its_member(db):
    async with signed_in(db, ANN):
        assert [tuple(row) for row in await db.fetch("select workflow_id, user_id from workflow_members")] == [
            (ANNS, ANN)
        ]


@pytest.mark.parametrize("first", ["node", "run"])
async def test_the_founder_gets_the_row_returned(db, first):
    workflow = uuid4()
    async with signed_in(db, ANN):
        if first == "node":
            row = await db.fetchrow(INSERT_NODE + " returning id, version", "n", workflow, {})
            assert row["id"] == "n" and row["version"]
        else:
            row = await db.fetchrow(INSERT_RUN + " returning id, status, created_by", "r", workflow, asking("n"))
            assert tuple(row) == ("r", "pending", ANN)


async def test_a_workflow_id_that_was_used_before_is_not_founded_again(db):
    await db.execute("delete from workflow_members; delete from runs; delete from workflow_nodes")
    for user in (ANN, BOB):
        for insert in (INSERT_RUN, INSERT_NODE):
            with pytest.raises(DENIED):
                async with signed_in(db, user):
                    await db.execute(insert, "again", ANNS, asking())


async def test_a_workflow_first_used_by_an_operator_has_no_member(db):
    workflow = uuid4()
    await db.execute(INSERT_NODE, "ops", workflow, {})
    with pytest.raises(DENIED):
        async with signed_in(db, ANN):
            await db.execute(INSERT_RUN, "r", workflow, asking("ops"))
    await db.execute("insert into workflow_members (workflow_id, user_id) values ($1, $2)", workflow, ANN)
    async with signed_in(db, ANN):
        await db.execute(INSERT_RUN, "r", workflow, asking("ops"))


async def test_a_failed_attempt_founds_nothing(db):
    workflow = uuid4()
    with pytest.raises(asyncpg.InvalidParameterValueError):
        async with signed_in(db, BOB):
            await db.execute(INSERT_RUN, "r", workflow, {"promptSpec": {}})
    with pytest.raises(asyncpg.CheckViolationError, match="base64"):
        async with signed_in(db, BOB):
            await db.execute(INSERT_RUN, "r", workflow, asking(x="data:image/png;base64,AAAA"))
    async with signed_in(db, ANN):
        await db.execute(INSERT_RUN, "r", workflow, asking())


@pytest.mark.parametrize("outcome", ["commit", "rollback"])
@pytest.mark.parametrize("insert", [INSERT_RUN, INSERT_NODE])
async def test_of_two_founders_at_once_one_wins(database, outcome, insert):
    workflow = uuid4()
    first, second = await connect(database), await connect(database)
    transaction = first.transaction()
    await transaction.start()
    async with signed_in(first, ANN):
        await first.execute(insert, "first", workflow, asking())

    async def follow() -> None:
        async with signed_in(second, BOB):
            await second.execute(insert, "second", workflow, asking())

    pid = second.get_server_pid()
    following = asyncio.create_task(follow())
    while not await first.fetchval("select cardinality(pg_blocking_pids($1)) > 0", pid):
        assert not following.done()
    if outcome == "commit":
        await transaction.commit()
        with pytest.raises(DENIED):
            await following
        winner = ANN
    else:
        await transaction.rollback()
        await following
        winner = BOB
    rows = await first.fetch("select user_id from workflow_members where workflow_id = $1", workflow)
    assert [row[0] for row in rows] == [winner]
    await first.close()
    await second.close()


async def test_eight_founders_at_once_leave_one_member(database):
    connections = [await connect(database) for _ in range(8)]
    for _ in range(5):
        workflow = uuid4()

        async def found(connection, workflow=workflow) -> bool:
            try:
                async with signed_in(connection):
                    await connection.execute(INSERT_NODE, str(uuid4()), workflow, {})
            except DENIED:
                return False
            return True

        assert sum(await asyncio.gather(*map(found, connections))) == 1
        assert (
            await connections[0].fetchval("select count(*) from workflow_members where workflow_id = $1", workflow) == 1
        )
    for connection in connections:
        await connection.close()
