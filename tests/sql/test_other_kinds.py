"""Rows of other kinds are never changed, claimed, hidden or constrained by us."""

from uuid import uuid4

import asyncpg
import pytest

from tests.support.postgres import Cluster, signed_in
from tests.support.protocol import Db, new_daemon
from tests.support.runs import WORKFLOW, event_names, insert_run, run_row

pytestmark = pytest.mark.every_postgres

REFUSED = asyncpg.InvalidParameterValueError


FILE = "data:image/png;base64," + "iVBORw0KGgo" * 500
RESEARCH = "insert into runs (id, kind, subject_id, status, processor, started_at, finished_at, payload, metadata)"


async def test_rows_of_other_kinds_are_not_our_business(db: Db) -> None:
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


async def test_a_row_of_another_kind_founds_no_workflow(db: Db) -> None:
    await db.execute(RESEARCH + " values ('r', 'research', $1, 'new', null, null, null, null, null)", WORKFLOW)
    async with signed_in(db) as user:
        await db.execute(
            """insert into runs (kind, subject_id, status, processor, metadata)
            values ('image_gen', $1, 'pending', 'demo:painter', '{"promptSpec": {"basePrompt": "a red fox"}}')""",
            WORKFLOW,
        )
    assert await db.fetchval("select user_id from workflow_members where workflow_id = $1", WORKFLOW) == user


async def test_events_of_other_kinds_stay_as_they_were_written(db: Db) -> None:
    await db.execute(RESEARCH + " values ('r', 'research', $1, 'new', null, null, null, null, null)", WORKFLOW)
    await db.execute("insert into run_events (run_id, kind) values ('r', 'note'), (null, 'stray')")
    await db.execute("insert into run_events (run_id, kind, run_kind) values ('r', 'log', 'image_gen')")
    await db.execute("update run_events set kind = kind || 's' where run_kind is null")
    rows = await db.fetch("select kind, run_kind from run_events order by kind")
    assert [tuple(row) for row in rows] == [("logs", None), ("notes", None), ("strays", None)]


async def test_an_event_that_moves_to_an_image_run_is_checked(db: Db) -> None:
    await db.execute(RESEARCH + " values ('r', 'research', $1, 'new', null, null, null, null, null)", WORKFLOW)
    run = await insert_run(db)
    await db.execute("insert into run_events (run_id, kind, payload) values ('r', 'log', $1)", {"file": FILE})
    with pytest.raises(asyncpg.CheckViolationError, match="base64"):
        await db.execute("update run_events set run_id = $1 where run_id = 'r'", run)


async def test_statements_about_other_kinds_pay_for_little_of_ours(db: Db) -> None:
    """Each trigger, check, index and setting costs every statement on the table 1 to 10 µs; `tests/bench/test_other_kinds.py` measures."""
    checks = await db.fetchval("select count(*) from pg_constraint where conrelid = 'runs'::regclass and contype = 'c'")
    assert checks == 2
    triggers = await db.fetch(
        """
        select t.tgrelid::regclass::text as table_name, t.tgname, t.tgtype & 1 = 1 as by_row, t.tgqual is not null as conditional,
            (select array_agg(split_part(setting, '=', 1)) from unnest(p.proconfig) setting) as settings
        from pg_trigger t join pg_proc p on p.oid = t.tgfoid
        where not t.tgisinternal and t.tgrelid in ('runs'::regclass, 'run_events'::regclass) and t.tgtype & 16 = 16
        """
    )
    assert sorted((row["table_name"], row["by_row"], row["conditional"]) for row in triggers) == [
        ("run_events", False, True),  # not for events that are ours and numbered already
        ("runs", False, True),  # not unless one by the row has seen a run of ours
        *[("runs", True, True)] * 3,  # one of them for metadata alone
    ]
    for trigger in triggers:
        assert trigger["by_row"] or trigger["settings"] == ["search_path"], trigger["tgname"]


async def test_every_index_but_one_is_of_image_runs_alone(db: Db) -> None:
    """A row of another kind that changes its place writes an entry into each that is not: a third of what its update costs."""
    rows = await db.fetch(
        """select i.indexrelid::regclass::text from pg_index i
        where i.indrelid = 'runs'::regclass and i.indpred is null and not i.indisprimary"""
    )
    assert [row[0] for row in rows] == ["idx_runs_subject"]


async def test_runs_are_projected_after_a_savepoint(db: Db) -> None:
    """A savepoint that is rolled back takes along the note that a statement was about runs of ours."""
    run = await insert_run(db)
    async with db.transaction():
        with pytest.raises(asyncpg.DivisionByZeroError):
            async with db.transaction():
                await db.execute("update runs set status = 'cancelled' where id = $1", run)
                await db.execute("select 1 / 0")
        await db.execute(RESEARCH + " values ('r', 'research', $1, 'new', null, null, null, null, null)", WORKFLOW)
        await db.execute("update runs set status = 'odd' where id = 'r'")
        await db.execute("update runs set status = 'cancelled', message = 'x' where id = any ($1)", [run, "r"])
    assert await event_names(db, run) == ["created", "cancelled"]


async def test_no_index_names_a_column_of_the_application(db: Db) -> None:
    """A change of an indexed column cannot be HOT: it writes an entry into every index, and asks the condition of each."""
    named = await db.fetch(
        """
        select distinct a.attname from pg_index i
        join pg_depend d on d.classid = 'pg_class'::regclass and d.objid = i.indexrelid and d.refobjid = i.indrelid
        join pg_attribute a on a.attrelid = i.indrelid and a.attnum = d.refobjsubid
        where i.indrelid = 'runs'::regclass
        """
    )
    columns = {row["attname"] for row in named}
    assert {"queue_state", "kind"} <= columns
    assert columns.isdisjoint({"status", "payload", "started_at", "finished_at", "progress", "updated_at"})


async def test_updates_of_other_kinds_are_hot(db: Db) -> None:
    await db.execute(RESEARCH + " values ('r', 'research', $1, 'new', null, null, null, null, null)", WORKFLOW)
    async with db.transaction():
        for status in ("pending", "running", "completed", "pending", "cancelled"):
            await db.execute("update runs set status = $1, payload = '{}' where kind = 'research'", status)
        counted = await db.fetchrow(
            "select n_tup_upd, n_tup_hot_upd from pg_stat_xact_user_tables where relid = 'runs'::regclass"
        )
    assert tuple(counted) == (5, 5)
