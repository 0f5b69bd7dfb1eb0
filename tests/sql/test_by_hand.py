"""Updates of runs from outside: what is allowed, what is refused, and the idioms that DBAs are used to."""

from datetime import datetime
from uuid import UUID

import asyncpg
import pytest

from tests.support.postgres import signed_in
from tests.support.protocol import (
    OPERATORS,
    STATES,
    TERMINAL,
    UNFINISHED,
    Daemon,
    Db,
    as_operator,
    move_clock,
    run_in,
    set_status,
)
from tests.support.runs import WORKFLOW, insert_run, run_row

REFUSED = asyncpg.InvalidParameterValueError


# refused to all


async def test_no_trigger_of_others_takes_a_run_out_of_its_kind(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "running")
    await db.execute(
        """create function archive() returns trigger language plpgsql as $$ begin new.kind := 'archived'; return new; end $$;
        create trigger archive before update on runs for each row execute function archive()"""
    )
    with pytest.raises(REFUSED, match="kind"):
        await db.execute("update runs set priority = 1 where id = $1", run)


@pytest.mark.parametrize("role", OPERATORS)
@pytest.mark.parametrize("state", TERMINAL)
async def test_a_finished_run_cannot_be_cancelled_by_update(db: Db, daemon: Daemon, role: str, state: str) -> None:
    run = await run_in(db, daemon, state)
    before = await run_row(db, run)
    with pytest.raises(REFUSED) as refused:
        await set_status(db, run, "cancelled", role)
    assert refused.value.message == f"A run that is {state} cannot be set to cancelled by hand."
    assert "cancel_run" in refused.value.hint
    assert await run_row(db, run) == before


@pytest.mark.parametrize("state", TERMINAL)
async def test_cancel_run_returns_a_finished_run_unchanged(db: Db, daemon: Daemon, member: UUID, state: str) -> None:
    run = await run_in(db, daemon, state)
    before = await run_row(db, run)
    async with signed_in(db, member):
        record = await db.fetchval("select cancel_run($1)", run)
    assert (record["jobId"], record["status"]) == (run, state)
    assert await run_row(db, run) == before


@pytest.mark.parametrize("wanted", ["running", "completed", "failed", "done", ""])
@pytest.mark.parametrize("state", STATES)
async def test_no_other_status_is_set_from_outside(db: Db, daemon: Daemon, state: str, wanted: str) -> None:
    run = await run_in(db, daemon, state)
    before = await run_row(db, run)
    if before["status"] == wanted:
        return
    with pytest.raises(REFUSED) as refused:
        await set_status(db, run, wanted)
    assert refused.value.hint
    assert await run_row(db, run) == before


async def test_a_status_cannot_be_emptied(db: Db, daemon: Daemon) -> None:
    run = await run_in(db, daemon, "failed")
    with pytest.raises((REFUSED, asyncpg.NotNullViolationError)):
        await db.execute("update runs set status = null where id = $1", run)


@pytest.mark.parametrize("role", ["anon", "authenticated"])
@pytest.mark.parametrize(
    "statement",
    [
        "update runs set status = 'cancelled'",
        "delete from runs",
        "update run_events set kind = 'log'",
        "delete from run_events",
        "insert into run_events (kind) values ('log')",
    ],
)
async def test_clients_have_no_update_and_no_delete(db: Db, member: UUID, role: str, statement: str) -> None:
    await insert_run(db)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        async with signed_in(db, member if role == "authenticated" else None, role=role):
            await db.execute(statement)


@pytest.mark.parametrize("function", ["cancel_run", "requeue_run"])
async def test_a_missing_run_is_not_found(db: Db, function: str) -> None:
    with pytest.raises(asyncpg.PostgresError) as refused:
        async with signed_in(db):
            await db.fetchval(f"select {function}('nothing')")
    assert refused.value.sqlstate == "PT404"


# what never changes


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "change",
    ["processor = 'openai:gpt-image-2'", "id = 'other'", "subject_id = gen_random_uuid()", "kind = 'research'"],
)
async def test_identity_and_processor_of_a_run_never_change(db: Db, daemon: Daemon, state: str, change: str) -> None:
    run = await run_in(db, daemon, state)
    with pytest.raises(REFUSED) as refused:
        await db.execute(f"update runs set {change} where id = $1", run)
    assert refused.value.hint


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    "change",
    [
        "created_at = 'epoch'",
        "claim = 1",
        "ticket = 1",
        "claimed_by = null",
        "claimed_by = gen_random_uuid()",
        "attempt = 99",
        "created_by = gen_random_uuid()",
        "submitted_at = 'epoch'",
        "rank = 5",
        "lane = 'other'",
        "webhook = 'came'",
        "queue_state = 'pending'",
        "queue_state = null",
        "updated_at = 'epoch'",
    ],
)
async def test_our_columns_stay_as_they_are(db: Db, daemon: Daemon, state: str, change: str) -> None:
    run = await run_in(db, daemon, state)
    before = dict(await run_row(db, run))
    await db.execute(f"update runs set {change} where id = $1", run)
    after = dict(await run_row(db, run))
    assert after.pop("updated_at") >= before.pop("updated_at")
    assert after == before


@pytest.mark.parametrize("state", STATES)
async def test_finished_at_is_null_unless_terminal(db: Db, daemon: Daemon, state: str) -> None:
    run = await run_in(db, daemon, state)
    finished: datetime | None = (await run_row(db, run))["finished_at"]
    assert (finished is not None) == (state in TERMINAL)
    with pytest.raises(asyncpg.CheckViolationError, match="runs_finished_at_only_when_terminal"):
        await db.execute(f"update runs set finished_at = {'now()' if finished is None else 'null'} where id = $1", run)


async def test_started_at_is_the_latest_start_else_the_insert_time(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    inserted = await run_row(db, run)
    assert inserted["started_at"] == inserted["created_at"]
    await move_clock(db, "1 min")
    await daemon.fail(await daemon.claim_one())
    first = await run_row(db, run)
    assert 60 <= (first["started_at"] - first["created_at"]).total_seconds() < 120
    await move_clock(db, "2 min")
    await set_status(db, run, "pending")
    assert (await run_row(db, run))["started_at"] == first["started_at"]
    await move_clock(db, "3 min")
    await daemon.claim_one()
    second = await run_row(db, run)
    assert 180 <= (second["started_at"] - second["created_at"]).total_seconds() < 240
    assert second["created_at"] == inserted["created_at"]


async def test_started_at_cannot_be_chosen_at_insert(db: Db) -> None:
    run = await db.fetchval(
        "insert into runs (kind, subject_id, status, processor, metadata, started_at, created_at) "
        "values ('image_gen', $1, 'pending', 'demo:painter', $2, 'epoch', 'epoch') returning id",
        WORKFLOW,
        {"promptSpec": {"basePrompt": "a red fox"}},
    )
    row = await run_row(db, run)
    assert row["started_at"] == row["created_at"] == row["updated_at"]


# what DBAs do


async def test_the_usual_unlock_idiom_works_on_a_held_run(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    await db.execute("update runs set status = 'pending', claimed_by = null, attempt = 0 where id = $1", run)
    assert (await run_row(db, run))["status"] == "pending"
    assert await daemon.complete(claimed) == "lost"
    again = await daemon.claim_one()
    assert (again["id"], again["attempt"]) == (run, 1)
    assert again["claim"] > claimed["claim"]
    assert await daemon.complete(again) == "settled"


@pytest.mark.parametrize("state", [state for state in STATES if state not in ("pending", "cancelled")])
async def test_saving_a_whole_row_as_it_was_read_changes_nothing(db: Db, daemon: Daemon, state: str) -> None:
    run = await run_in(db, daemon, state)
    before = dict(await run_row(db, run))
    await save(db, before)
    after = dict(await run_row(db, run))
    assert after.pop("updated_at") >= before.pop("updated_at")
    assert after == before


async def test_saving_a_whole_row_with_another_status_is_that_request(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    before = dict(await run_row(db, run))
    await save(db, {**before, "status": "cancelled"})
    row = await run_row(db, run)
    assert row["status"] == "cancelled"
    assert row["claim"] > claimed["claim"]


async def save(db: Db, row: dict[str, object]) -> None:
    """Save every column as it was read, as an ORM does."""
    columns = [column for column in row if column != "id"]
    settings = ", ".join(f"{column} = ${number}" for number, column in enumerate(columns, 2))
    await db.execute(f"update runs set {settings} where id = $1", row["id"], *(row[column] for column in columns))


async def test_saving_a_whole_pending_row_keeps_its_rank(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await save(db, dict(await run_row(db, run)))
    assert (await daemon.claim_one())["id"] == run


@pytest.mark.parametrize("state", UNFINISHED)
async def test_a_run_whose_due_at_is_emptied_is_due_now(db: Db, daemon: Daemon, state: str) -> None:
    run = await run_in(db, daemon, state)
    await db.execute("update runs set due_at = null where id = $1", run)
    row = await run_row(db, run)
    assert (row["due_at"] is None) == (state == "running")
    if state != "running":
        assert (await daemon.claim_one())["id"] == run


@pytest.mark.one_postgres
@pytest.mark.parametrize("state", ["pending", "parked"])
async def test_a_run_is_not_put_off_for_ever(db: Db, daemon: Daemon, state: str) -> None:
    run = await run_in(db, daemon, state)
    before = await run_row(db, run)
    with pytest.raises(REFUSED, match="due_at must be a point in time"):
        await db.execute("update runs set due_at = 'infinity' where id = $1", run)
    assert await run_row(db, run) == before


@pytest.mark.one_postgres
@pytest.mark.parametrize("status", ["running", "cancelled"])
@pytest.mark.parametrize("job", ["null", "''", "'other'"])
async def test_a_job_under_way_is_not_forgotten(db: Db, daemon: Daemon, status: str, job: str) -> None:
    run = await run_in(db, daemon, "parked")
    await db.execute(f"update runs set provider_job_id = {job}, status = '{status}' where id = $1", run)
    assert (await run_row(db, run))["provider_job_id"] == "order-1"


async def test_an_operator_moves_a_run_forward(db: Db, daemon: Daemon) -> None:
    await insert_run(db)
    urgent = await insert_run(db)
    await db.execute("update runs set priority = 10 where id = $1", urgent)
    assert (await daemon.claim(1))[0]["id"] == urgent


async def test_an_operator_grants_more_attempts(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    await db.execute("update runs set max_attempts = 1 where id = $1", run)
    claimed = await daemon.claim_one()
    await db.execute("update runs set max_attempts = 2 where id = $1", run)
    await daemon.settle(claimed, "retry", payload={"error": "Later."}, due_in=0)
    assert (await run_row(db, run))["status"] == "pending"


@pytest.mark.parametrize("role", OPERATORS)
@pytest.mark.parametrize("state", STATES)
async def test_an_operator_deletes_a_run_with_its_events(db: Db, daemon: Daemon, role: str, state: str) -> None:
    run = await run_in(db, daemon, state)
    await as_operator(db, role, "delete from runs where id = $1", run)
    assert await db.fetchval("select count(*) from run_events where run_id = $1", run) == 0
    await move_clock(db, "1 min")
    assert await daemon.claim(10) == []


async def test_deleting_a_held_run_notifies_its_daemon(db: Db, daemon: Daemon) -> None:
    run = await insert_run(db)
    claimed = await daemon.claim_one()
    heard: list[str] = []
    await db.add_listener("image_jobs_drop", lambda *notification: heard.append(notification[-1]))
    await db.execute("delete from runs where id = $1", run)
    await db.execute("select")
    assert [payload for payload in heard if payload] == [str(claimed["claim"])]
    assert await daemon.complete(claimed) == "lost"
    assert await daemon.record(claimed, progress=50) == "lost"


# from before the migration


async def insert_from_before(db: Db, processor: str | None) -> str:
    """Insert a pending run as the application did before it had a daemon."""
    async with db.transaction():
        await db.execute("alter table runs disable trigger user")
        run = await db.fetchval(
            "insert into runs (kind, subject_id, status, processor) values ('image_gen', $1, 'pending', $2) returning id",
            WORKFLOW,
            processor,
        )
        await db.execute("alter table runs enable trigger user")
    return run


async def test_an_old_run_without_a_processor_is_cancelled(db: Db) -> None:
    run = await insert_from_before(db, None)
    await set_status(db, run, "cancelled")
    assert (await run_row(db, run))["status"] == "cancelled"


async def test_an_old_run_is_in_line_once_it_is_requeued(db: Db, daemon: Daemon) -> None:
    run = await insert_from_before(db, "demo:painter")
    await db.execute("update runs set metadata = $2 where id = $1", run, {"promptSpec": {"basePrompt": "a red fox"}})
    assert (await run_row(db, run))["queue_state"] is None
    assert await daemon.claim() == []
    await set_status(db, run, "pending")
    assert (await run_row(db, run))["queue_state"] == "pending"
    assert (await daemon.claim_one())["id"] == run
