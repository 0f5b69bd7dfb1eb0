"""Rows of other kinds are never changed, claimed, hidden or constrained by us."""

from uuid import uuid4

import asyncpg
import pytest

from tests.postgres import Cluster
from tests.runs import WORKFLOW, insert_run, run_row
from tests.sql.protocol import Db, new_daemon

REFUSED = asyncpg.InvalidParameterValueError


FILE = "data:image/png;base64," + "iVBORw0KGgo" * 500
RESEARCH = "insert into runs (id, kind, subject_id, status, processor, started_at, finished_at, payload, metadata)"


async def test_rows_of_other_kinds_are_nobodys_business_but_their_own(db: Db) -> None:
    await db.execute(
        RESEARCH + " values ('a/b c', 'research', gen_random_uuid(), 'halfway', null, null, now(), $1, $2)",
        {"file": FILE},
        FILE,
    )
    row = await run_row(db, "a/b c")
    assert (row["status"], row["started_at"], row["payload"], row["metadata"]) == (
        "halfway",
        None,
        {"file": FILE},
        FILE,
    )
    for column in ("claim", "ticket", "created_at", "updated_at", "due_at", "progress", "attempt", "lane", "rank"):
        assert row[column] is None
    for status in ("pending", "running", "completed", "pending", "cancelled", "anything"):
        await db.execute("update runs set status = $1, finished_at = null, claimed_by = gen_random_uuid()", status)
        assert (await run_row(db, "a/b c"))["status"] == status
    await db.execute("update runs set id = 'renamed', subject_id = gen_random_uuid(), processor = 'x', progress = 1000")
    daemon = await new_daemon(db)
    assert await daemon.claim(10) == []
    assert await db.fetchval("select count(*) from run_events") == 0
    await db.execute(
        "insert into run_events (run_id, kind, payload) values ('renamed', 'anything', $1)", {"file": FILE}
    )
    await db.execute("update run_events set kind = 'else', payload = $1", FILE)
    await db.execute("delete from run_events")
    await db.execute("delete from runs")


async def test_daemons_leave_rows_of_other_kinds_alone(db: Db) -> None:
    await db.execute(
        RESEARCH + " values ('r', 'research', $1, 'pending', 'demo:painter', now(), null, null, null)", WORKFLOW
    )
    before = await run_row(db, "r")
    await insert_run(db)
    daemon = await new_daemon(db)
    claimed = await daemon.claim_one()
    assert await daemon.settle({"id": "r", "claim": claimed["claim"]}, "completed", payload={"imageUrl": "x"}) == "lost"
    await daemon.complete(claimed)
    assert await run_row(db, "r") == before
    for function in ("cancel_run", "requeue_run"):
        with pytest.raises(asyncpg.PostgresError) as refused:
            await db.fetchval(f"select {function}('r')")
        assert refused.value.sqlstate == "PT404"


async def test_a_row_of_another_kind_does_not_become_ours(db: Db) -> None:
    await db.execute(
        RESEARCH + " values ('r', 'research', $1, 'pending', 'demo:painter', now(), null, null, null)", WORKFLOW
    )
    with pytest.raises(REFUSED):
        await db.execute("update runs set kind = 'image_gen'")


async def test_a_role_of_the_other_orchestrator_writes_its_rows(db: Db, postgres: Cluster, database: str) -> None:
    name = "orchestrator_" + uuid4().hex
    await postgres.sudo(f"create role {name} bypassrls; grant {name} to postgres")
    try:
        await db.execute(f"grant select, insert, update, delete on runs, run_events to {name}")
        await db.execute(f"grant execute on function private.has_base64(jsonb) to {name}")
        async with db.transaction():
            await db.execute(f"set local role {name}")
            await db.execute(
                RESEARCH + " values ('r', 'research', $1, 'odd', null, null, null, $2, null)", WORKFLOW, FILE
            )
            await db.execute("update runs set status = 'odder', payload = $1 where id = 'r'", [FILE])
            await db.execute(
                "insert into run_events (id, run_id, kind, payload) values (gen_random_uuid(), 'r', 'note', $1)", FILE
            )
            await db.execute("delete from run_events where run_id = 'r'")
            await db.execute("delete from runs where id = 'r'")
    finally:
        await postgres.sudo(f"drop owned by {name}", database.rsplit("/", 1)[1])
        await postgres.sudo(f"drop role {name}")
